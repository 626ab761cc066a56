"""Which tokens run next: continuous depth-wise batching, in plain integers.

The shared core has the same weights at every depth. So depth is data: tokens that are about to take their first, second
and third recursion can go through the core in one batch, and a token that stops early makes room for the next at once.

A *chunk* is a range of consecutive tokens of one sequence that are in flight together: a single token while decoding,
up to `chunk_size` tokens while reading the prompt. A sequence has at most one chunk in flight, so every cache that a
chunk reads is complete. All rows of a chunk are at the same recursion. Those that the router keeps take it in the next
core batch; the others wait, because the exit layers of a token read the exit keys of all earlier tokens. The chunk
leaves the core together with its last row.

The engine runs one batch at a time. `next` says which, `complete` reports its result:

    entry   embedding and prelude, for chunks that begin
    core    one recursion for every active row, whichever recursion that is
    exit    coda, head and sampling, for chunks that have left the core

Exit and entry batches run at a *boundary*. The policy decides when one is due:

    full        all rows take all recursions, the stopped ones for nothing; then comes the boundary
    shrink      rows leave the batch as they stop; the boundary comes when the core is empty (lock-step early exit)
    depthwise   the boundary comes after every `hold` core batches. What has stopped makes room for new tokens, so the
                next core batch mixes depths. A larger hold makes boundary batches fewer and wider

Pages for the worst case are reserved when a chunk enters and the unused ones given back when it leaves, so memory
cannot run out half-way. If there are too few, the prefix cache shrinks first. Then the youngest sequence is preempted:
it keeps its tokens and their depths, and is read again later. The oldest sequence is never preempted, so every admitted
sequence finishes.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from megamor.errors import ConfigError
from megamor.serve.engine.flight import (
    ACTIVE,
    DEPTH,
    LEAST,
    MOST,
    POSITION,
    RECURSION,
    SEAT,
    UNREAD_TOKEN,
    Chunk,
    Flight,
    Ints,
    Marks,
    ScheduledBatch,
    SequenceState,
    integers,
    slots_of,
)
from megamor.serve.engine.pages import PageBook, PageTable, TableSpec
from megamor.serve.engine.prefix import PageCopy, PrefixBlock, PrefixCache
from megamor.serve.options import EngineOptions

BOUND_BROKEN = (
    "token {position} takes {depth} recursions where {bound} is the bound (max_depth of the request, or the depth "
    "before a preemption): the router must select through RoutingSession.bounded, see docs/routers.md"
)


class Scheduler:
    """See the module docstring. Each sequence has a table for every one of `tables`; `num_pages` is by pool.

    No text is longer than `context`.
    """

    def __init__(
        self,
        options: EngineOptions,
        num_recursions: int,
        tables: tuple[TableSpec, ...],
        num_pages: Mapping[str, int],
        context: int,
    ) -> None:
        self.options, self.num_recursions = options, num_recursions
        self.book = PageBook(options.page_size, tables, num_pages)
        self.prefixes = PrefixCache(self.book)
        size, seats = options.page_size, options.max_resident
        self.flight = Flight(options.num_slots, seats, tables, num_recursions, context, size)
        self.waiting: list[SequenceState] = []
        self.residents: list[SequenceState] = []
        # Slots of the tokens that take the next core batch: by recursion, so that rows that share a block without
        # sharing all weights are neighbours; the rows of a chunk together.
        self.core: Ints = np.empty(0, np.int64)
        self.chunk_of: dict[int, Chunk] = {}
        # Of the chunks in the core, those of several tokens.
        self.long: list[Chunk] = []
        self.leaving: list[Chunk] = []
        self.doomed: list[SequenceState] = []
        self.free_slots = list(range(options.num_slots - 1, -1, -1))
        self.free_seats = list(range(seats - 1, -1, -1))
        self.running: ScheduledBatch | None = None
        # With hold 0 in the options, the engine changes it as it learns what batches cost.
        self.hold = options.hold or 1
        self.since_boundary = 0
        # Prompt tokens that may still enter in this batch.
        self.budget = 0
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.waiting or self.residents)

    @property
    def in_core(self) -> list[Chunk]:
        """The chunks in the core."""
        return list(dict.fromkeys(self.chunk_of[slot] for slot in self.core.tolist()))

    def fits(self, num_tokens: int, max_depth: int) -> bool:
        """Whether a sequence that reads `num_tokens` could be served if it were the only one."""
        worst = self.book.worst_case(num_tokens, max_depth)
        return all(count <= self.book.num_pages[pool] for pool, count in worst.items())

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence, which must fit. A preempted one goes before all younger ones."""
        bisect.insort(self.waiting, sequence, key=lambda other: other.number)

    def next(self) -> ScheduledBatch | None:
        """The next batch; None when there is nothing to do."""
        assert self.running is None, "complete one batch before the next"
        batch = None
        # Exits first: they free slots and pages, and their sampled tokens can enter in the next step.
        if self.exits_next:
            batch = ScheduledBatch("exit", slots_of(self.leaving), list(self.leaving))
        elif self.at_boundary():
            batch = self.enter()
        if batch is None and len(self.core):
            recursions = self.flight.rows[RECURSION, self.core]
            bounds = recursions.searchsorted(np.arange(self.num_recursions + 1)).tolist()
            batch = ScheduledBatch("core", self.core, bounds=bounds)
        self.running = batch
        return batch

    def at_boundary(self) -> bool:
        """Whether tokens may leave and enter now."""
        # An empty core always is one: nothing else could run.
        return not len(self.core) or (self.options.policy == "depthwise" and self.since_boundary >= self.hold)

    @property
    def exits_next(self) -> bool:
        """Whether the next batch is an exit."""
        return bool(self.leaving) and self.at_boundary()

    def complete(self, batch: ScheduledBatch, kept: Marks | None = None, checked: bool = True) -> None:
        """Record that a batch has run.

        After entry and core batches `kept` marks the rows that take the next recursion. After an exit that isn't
        `checked`, call `remember` for the chunks whose numbers turn out to be fine.
        """
        assert batch is self.running, "only the running batch can be completed"
        self.running = None
        if kept is None:
            self.leave(batch.chunks)
            for chunk in batch.chunks if checked else ():
                self.remember(chunk)
        else:
            self.since_boundary = self.since_boundary + 1 if batch.kind == "core" else 0
            self.advance(batch, kept)
        doomed, self.doomed = self.doomed, []
        for sequence in doomed:
            self.remove(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forget a finished or aborted sequence and free what it holds."""
        if self.running is not None and sequence.chunk is not None and sequence.chunk.stage == self.running.kind:
            # The batch writes to these pages. If they were free now, another sequence could be given them while it
            # runs. `complete` removes the sequence.
            if sequence.state != "doomed":
                self.doomed.append(sequence)
            sequence.state = "doomed"
            return
        if sequence.state == "waiting":
            self.waiting.remove(sequence)
        elif sequence.state != "gone":
            self.evict(sequence)
        sequence.state = "gone"

    def enter(self) -> ScheduledBatch | None:
        """New chunks: first for residents, decoding before prompts, then for waiting sequences while there is room."""
        entered, copies = list[Chunk](), list[PageCopy]()
        self.budget = self.options.prefill_budget or self.options.num_slots
        # One that has nothing to read has ended, which the engine will know once it has read the last token.
        # Decoding before prompts: a long prompt may take all slots, and answers that are being streamed would stall.
        # Then by age, as the oldest must make progress.
        idle = sorted((s.unread > 1, s.number, s) for s in self.residents if s.chunk is None and s.unread)
        for (reads_prompt, _, sequence), roomy in zip(idle, self.with_room(s for _, _, s in idle), strict=True):
            if self.free_slots and sequence.state == "resident":
                count = 1 if roomy and not reads_prompt else self.reserve(sequence)
                if count:
                    entered.append(self.begin(sequence, count))
        for sequence in list(self.waiting):
            if not (self.free_slots and self.budget and len(self.residents) < self.options.max_resident):
                break
            if sequence.tokens[-1] == UNREAD_TOKEN:
                break  # preempted just now; without its token, the prefix cache can't be asked
            # Continuations of one request would all read its prompt at the same time. If they wait for the first of
            # them, they find it in the prefix cache. Others may start meanwhile: only the leader is waited for.
            if sequence.leader is not None and self.is_reading_prompt(sequence.leader):
                continue
            fresh = self.admit(sequence)
            if fresh is None:
                # Strictly in order of arrival. If smaller requests could overtake a large one, it might never start.
                break
            copies += fresh
            entered.append(self.begin(sequence, self.chunk_length(sequence.unread)))
        # A sequence that was given a chunk above may have been preempted for an older one afterwards.
        chunks = [chunk for chunk in entered if chunk.sequence.chunk is chunk]
        return ScheduledBatch("entry", self.place(chunks), chunks, copies) if chunks else None

    def with_room(self, sequences: Iterable[SequenceState]) -> Marks:
        """Of residents whose tables were trimmed: whether all tables have room for a token without another page."""
        seats, reads = integers((s.seat, s.num_read) for s in sequences).reshape(-1, 2).T
        filled = self.flight.before[:-1, seats, reads] % self.options.page_size
        roomy: Marks = np.all(filled > 0, axis=0)
        return roomy

    def is_reading_prompt(self, leader: SequenceState) -> bool:
        """Whether the prompt of `leader` is not in the prefix cache yet, but soon will be."""
        return self.options.prefix_caching and leader.state != "gone" and leader.checked < leader.prompt_length

    def admit(self, sequence: SequenceState) -> list[PageCopy] | None:
        """Make a waiting sequence a resident, starting from what the prefix cache has of its tokens.

        Returns the page copies to make, or None if there are too few pages.
        """
        sequence.tables = [PageTable() for _ in self.book.specs]
        chain = list[PrefixBlock]()
        if self.options.prefix_caching and (sequence.reuse or len(sequence.depths) >= sequence.prompt_length):
            chain = self.prefixes.find(sequence.tokens, sequence.max_depth, sequence.depths)
        # Adopted before room is made: the references keep `make_room` from freeing the chain's own pages.
        partial = self.prefixes.adopt(chain, sequence.tables)
        read = len(chain) * self.options.page_size
        count = self.chunk_length(len(sequence.tokens) - read)
        # A spare page of each pool for every resident. Otherwise newcomers and residents would preempt each other in
        # turns, and prompts would be read again and again.
        needed = self.book.missing(sequence.tables, count, sequence.max_depth)
        fits = self.make_room({pool: number + len(self.residents) for pool, number in needed.items()})
        if fits:
            self.book.reserve(sequence.tables, count, sequence.max_depth)
        else:
            self.book.release(sequence.tables)
        # A source may be free from here on. It keeps its contents until the copies, which come before any write.
        for pool, source, _ in partial:
            self.book.pools[pool].release([source])
        if not fits:
            return None
        size = self.options.page_size
        copies = [PageCopy(pool, source, table.pages[table.length // size]) for pool, source, table in partial]
        self.waiting.remove(sequence)
        self.residents.append(sequence)
        sequence.state, sequence.seat = "resident", self.free_seats.pop()
        sequence.num_read = sequence.checked = read
        sequence.block = chain[-1] if chain else None
        if sequence.cached_tokens is None:
            sequence.cached_tokens = read
        # After a preemption the depths are longer than the chain, and equal where both know a token.
        known = [depth for block in chain for depth in block.depths]
        sequence.depths += known[len(sequence.depths) :]
        self.flight.seat(sequence.seat, sequence.tables, known)
        return copies

    def make_room(self, needed: Mapping[str, int]) -> bool:
        """Shrink the prefix cache until `needed` pages of each pool are free; False if that isn't enough."""
        for pool, count in needed.items():
            while len(self.book.pools[pool].free) < count:
                if not self.prefixes.drop_oldest():
                    return False
        return True

    def reserve(self, sequence: SequenceState) -> int:
        """Reserve pages for the next chunk of a resident, preempting younger sequences if necessary.

        Returns the number of tokens there is room for, 0 if the sequence must wait for older ones to finish.
        """
        count = self.chunk_length(sequence.unread)
        needed = self.book.missing(sequence.tables, count, sequence.max_depth)
        if not any(needed.values()):
            return count
        while not self.make_room(needed):
            youngest = max(self.residents, key=lambda other: other.number)
            if youngest is sequence:
                return 0
            self.preempt(youngest)
        for number, first in self.book.reserve(sequence.tables, count, sequence.max_depth):
            self.flight.set_pages(number, sequence.seat, sequence.tables[number].pages, first)
        return count

    def chunk_length(self, unread: int) -> int:
        """Tokens in the next chunk of a sequence."""
        return min(unread, self.options.chunk_size, len(self.free_slots), self.budget if unread > 1 else 1)

    def begin(self, sequence: SequenceState, count: int) -> Chunk:
        """A chunk of the next `count` tokens, for which there are pages."""
        # Other answers wait for the rows of a prompt in the same batch. The token of an answer is not on the budget.
        self.budget -= count if sequence.unread > 1 else 0
        slots = [self.free_slots.pop() for _ in range(count)]
        sequence.chunk = Chunk(sequence, sequence.num_read, count, slots)
        return sequence.chunk

    def place(self, chunks: Sequence[Chunk]) -> Ints:
        """Note the tokens of `chunks` in `flight`, and return their slots."""
        slots, lengths = slots_of(chunks), [chunk.length for chunk in chunks]
        tokens = integers(c.sequence.tokens[c.start : c.start + c.length] for c in chunks)
        numbers = integers((c.sequence.seat, c.start, c.sequence.max_depth) for c in chunks).reshape(-1, 3).T
        offsets: Ints | int = 0
        if len(slots) > len(chunks):
            numbers, offsets = numbers.repeat(lengths, 1), np.concatenate([np.arange(length) for length in lengths])
        self.flight.enter(slots, numbers[0], numbers[1], numbers[1] + offsets, tokens, numbers[2])
        for chunk in chunks:
            for slot in chunk.slots:
                self.chunk_of[slot] = chunk
            if len(chunk.sequence.depths) > chunk.start:
                known = chunk.sequence.depths[chunk.start : chunk.start + chunk.length]
                # These tokens were read before. Their keys and their continuation were computed at these depths, and
                # another batch could decide a near tie differently.
                self.flight.rows[LEAST : MOST + 1, chunk.slots[: len(known)]] = known
        return slots

    def advance(self, batch: ScheduledBatch, kept: Marks) -> None:
        """Move the rows of a batch to their next recursion, which those that are `kept` take."""
        rows, before, slots = self.flight.rows, self.flight.before, batch.slots
        # Rows of their own: NumPy takes two indices several times slower than one.
        recursion, active, depth = rows[RECURSION], rows[ACTIVE], rows[DEPTH]
        if batch.kind == "core":
            depth[slots] += active[slots]
            recursion[slots] += 1
            long, self.long = self.long, []
        else:
            long = [chunk for chunk in batch.chunks if chunk.length > 1]
            for chunk in batch.chunks:
                chunk.stage = "core"
        active[slots] = kept
        taking = slots[kept]
        recursions, seats, positions = recursion[taking], rows[SEAT][taking], rows[POSITION][taking]
        # A router that ignores the bound would write keys for which no page was reserved.
        if (over := recursions >= rows[MOST][taking]).any():
            position, depth, most = (int(row[over][0]) for row in (positions, recursions + 1, rows[MOST, taking]))
            raise ConfigError(BOUND_BROKEN.format(position=position, depth=depth, bound=most))
        places = self.flight.places(self.flight.table_of[recursions], seats, positions)
        entries = before.reshape(-1)
        entries[places + 1] = entries[places] + 1
        for chunk in long:
            # Entries are numbered without gaps: the n-th of the rows that take this recursion comes after the n - 1
            # before it, wherever they are in the text. RoPE still uses their original positions.
            counts = before[self.flight.table_of[recursion[chunk.slots].max()], chunk.sequence.seat]
            counts[chunk.start + 1 :][: chunk.length] = counts[chunk.start] + active[chunk.slots].cumsum()
        # Under the policy full a chunk goes through all recursions, even if none of its rows takes them.
        stays = recursion[slots] < self.num_recursions if self.options.policy == "full" else kept
        # What is in the core has taken a recursion since, so this keeps the order.
        self.core = slots[stays] if batch.kind == "core" else np.concatenate((slots[stays], self.core))
        for slot in slots[~stays].tolist():
            chunk = self.chunk_of[slot]
            if chunk.stage == "core" and (chunk.length == 1 or not active[chunk.slots].any()):
                chunk.stage = "exit"
                self.leaving.append(chunk)
        self.long += [chunk for chunk in long if chunk.stage == "core"]

    def leave(self, chunks: Sequence[Chunk]) -> None:
        """These chunks have passed the exit: their entries become part of the tables, their tokens count as read."""
        self.leaving = []
        depths = self.flight.rows[DEPTH, slots_of(chunks)].tolist()
        seats, ends = [chunk.sequence.seat for chunk in chunks], [chunk.start + chunk.length for chunk in chunks]
        first = 0
        for chunk, lengths in zip(chunks, self.flight.before[:-1, seats, ends].T.tolist(), strict=True):
            sequence, taken = chunk.sequence, depths[first : first + chunk.length]
            first += chunk.length
            self.free_slots += chunk.slots
            sequence.chunk = None
            for table, length in zip(sequence.tables, lengths, strict=True):
                table.length = length
            self.book.trim(sequence.tables)
            if known := len(sequence.depths) - chunk.start:  # after a preemption
                for row, (depth, least) in enumerate(zip(taken, sequence.depths[chunk.start :], strict=False)):
                    if depth < least:
                        raise ConfigError(BOUND_BROKEN.format(position=chunk.start + row, depth=depth, bound=least))
            sequence.depths += taken[known:]
            sequence.num_read += chunk.length

    def remember(self, chunk: Chunk) -> None:
        """Put the blocks into the prefix cache that a chunk has completed, which has left: its numbers are fine."""
        sequence, size, end = chunk.sequence, self.options.page_size, chunk.start + chunk.length
        if sequence.state != "resident" or sequence.num_read != end or not self.options.prefix_caching:
            return
        sequence.checked = end
        # From the beginning of a block that was only partly read before.
        for start in range(chunk.start - chunk.start % size, end - size + 1, size):
            parent = sequence.block if start else None
            if start and (parent is None or parent.dropped):
                return  # a block can only be found through its parent
            sequence.block = self.prefixes.insert(
                parent,
                sequence.tokens[start : start + size],
                sequence.depths[start : start + size],
                sequence.max_depth,
                sequence.tables,
            )

    def preempt(self, sequence: SequenceState) -> None:
        """Take everything from a resident but its tokens and depths, and queue it again."""
        self.num_preempted += 1
        self.evict(sequence)
        sequence.state = "waiting"
        self.add(sequence)

    def evict(self, sequence: SequenceState) -> None:
        """Free the pages and slots of a resident."""
        self.residents.remove(sequence)
        self.book.release(sequence.tables)
        self.free_seats.append(sequence.seat)
        chunk, sequence.chunk = sequence.chunk, None
        if chunk is not None:
            self.free_slots += chunk.slots
            self.core = self.core[self.flight.rows[SEAT, self.core] != sequence.seat]
            for chunks in (self.long, self.leaving):
                if chunk in chunks:
                    chunks.remove(chunk)
        # The tokens and their depths stay. A preempted sequence is read again from what the prefix cache still has.
        sequence.num_read = sequence.checked = 0
