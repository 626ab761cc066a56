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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megamor.errors import ConfigError
from megamor.serve.engine.pages import PageBook, PageTable, TableSpec
from megamor.serve.engine.prefix import PageCopy, PrefixBlock, PrefixCache
from megamor.serve.options import EngineOptions

BOUND_BROKEN = (
    "token {position} takes {depth} recursions where {bound} is the bound (max_depth of the request, or the depth "
    "before a preemption): the router must select through RoutingSession.bounded, see docs/routers.md"
)


@dataclass(eq=False)
class Chunk:
    """Tokens `start` to `start` + `length` of a sequence, in flight. Its rows count from 0.

    The `active` rows take `recursion` next. `depths` counts the recursions each row has taken. `entries` [recursion]
    [row] is the index of a row's entry in the table of a recursion it takes. `slots` are the rows' indices in the
    runner's tables of per-token state.
    """

    sequence: SequenceState
    start: int
    length: int
    slots: list[int]
    recursion: int = 0
    active: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    entries: dict[int, dict[int, int]] = field(default_factory=dict)

    def seen(self, row: int, table: int, window: int) -> int:
        """How many tokens at the last `window` positions up to that of `row` have an entry in the table of a recursion.

        A position that a sliding window hides may have none, so they can't be counted in entries.
        """
        first = self.start + row + 1 - window
        before = sum(depth > table for depth in self.sequence.depths[max(0, first) : self.start])
        return before + sum(first <= self.start + other <= self.start + row for other in self.entries[table])


@dataclass(eq=False)
class SequenceState:
    """A prompt and one continuation: the one with `index` of `request`. `number` is its order of arrival.

    `num_read` of its tokens are in the tables. `depths` are those of all tokens that were ever read, which are more
    after a preemption. `leader` is an earlier sequence with the same prompt, which this one waits for in order to find
    the prompt in the prefix cache. `reuse` False means that every prompt token must be read here, because the client
    wants to see what each predicts.
    """

    number: int
    tokens: list[int]
    prompt_length: int
    max_depth: int
    leader: SequenceState | None = None
    reuse: bool = True
    request: int = 0
    index: int = 0
    num_read: int = 0
    depths: list[int] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    chunk: Chunk | None = None
    block: PrefixBlock | None = None
    cached_tokens: int | None = None
    state: Literal["waiting", "resident", "doomed", "gone"] = "waiting"

    @property
    def unread(self) -> int:
        """Tokens that are not in the tables yet."""
        return len(self.tokens) - self.num_read

    @property
    def num_new(self) -> int:
        """Tokens of the continuation so far."""
        return len(self.tokens) - self.prompt_length

    def bounds(self, position: int) -> tuple[int, int]:
        """Least and most recursions that the token at `position` may take.

        A token that was read before must take the same depth again. Its keys were used by later tokens, and a router
        that recomputes its scores in another batch could decide a near tie differently.
        """
        if position < len(self.depths):
            return self.depths[position], self.depths[position]
        return 0, self.max_depth


@dataclass(frozen=True)
class ScheduledBatch:
    """What the engine runs next: `chunks` in the order of their rows, after `copies` of pages."""

    kind: Literal["entry", "core", "exit"]
    chunks: list[Chunk]
    copies: list[PageCopy] = field(default_factory=list)


class Scheduler:
    """See the module docstring. Each sequence has a table for every one of `tables`; `num_pages` is by pool."""

    def __init__(
        self,
        options: EngineOptions,
        num_recursions: int,
        tables: tuple[TableSpec, ...],
        num_pages: Mapping[str, int],
    ) -> None:
        self.options, self.num_recursions = options, num_recursions
        self.book = PageBook(options.page_size, tables, num_pages)
        self.prefixes = PrefixCache(self.book)
        self.table_of = {spec.recursion: index for index, spec in enumerate(tables)}
        self.waiting: list[SequenceState] = []
        self.residents: list[SequenceState] = []
        self.in_core: list[Chunk] = []
        self.leaving: list[Chunk] = []
        self.free_slots = list(range(options.num_slots - 1, -1, -1))
        self.running: ScheduledBatch | None = None
        # With hold 0 in the options, the engine changes it as it learns what batches cost.
        self.hold = options.hold or 1
        self.since_boundary = 0
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.waiting or self.residents)

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
        if self.at_boundary():
            # Exits first: they free slots and pages, and their sampled tokens can enter in the next step.
            batch = ScheduledBatch("exit", list(self.leaving)) if self.leaving else self.enter()
        if batch is None and self.in_core:
            # By recursion, so that rows that share a block without sharing all weights are neighbours.
            batch = ScheduledBatch("core", sorted(self.in_core, key=lambda chunk: chunk.recursion))
        self.running = batch
        return batch

    def at_boundary(self) -> bool:
        """Whether tokens may leave and enter now."""
        # An empty core always is one: nothing else could run.
        return not self.in_core or (self.options.policy == "depthwise" and self.since_boundary >= self.hold)

    def complete(self, batch: ScheduledBatch, continuing: Sequence[Sequence[int]] = ()) -> None:
        """Record that a batch has run.

        After entry and core batches `continuing` names the rows of each chunk that take the next recursion.
        """
        assert batch is self.running, "only the running batch can be completed"
        self.running = None
        if batch.kind == "exit":
            for chunk in batch.chunks:
                self.leave(chunk)
        else:
            self.since_boundary = self.since_boundary + 1 if batch.kind == "core" else 0
            for chunk, rows in zip(batch.chunks, continuing, strict=True):
                self.advance(chunk, rows, took_recursion=batch.kind == "core")
        for chunk in batch.chunks:
            if chunk.sequence.state == "doomed":
                self.remove(chunk.sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forget a finished or aborted sequence and free what it holds."""
        if self.running is not None and sequence.chunk in self.running.chunks:
            # The batch writes to these pages. If they were free now, another sequence could be given them while it
            # runs. `complete` removes the sequence.
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
        idle = [sequence for sequence in self.residents if sequence.chunk is None]
        # Decoding before prompts: a long prompt may take all slots, and answers that are being streamed would stall.
        # Then by age, as the oldest must make progress.
        for sequence in sorted(idle, key=lambda sequence: (sequence.unread > 1, sequence.number)):
            if self.free_slots and sequence.state == "resident" and (count := self.reserve(sequence)):
                entered.append(self.begin(sequence, count))
        while self.waiting and self.free_slots and len(self.residents) < self.options.max_resident:
            sequence = self.waiting[0]
            # Continuations of one request would all read its prompt at the same time. If they wait for the first of
            # them, they find it in the prefix cache.
            if sequence.leader is not None and self.is_reading_prompt(sequence.leader):
                break
            fresh = self.admit(sequence)
            if fresh is None:
                # Strictly in order of arrival. If smaller requests could overtake a large one, it might never start.
                break
            copies += fresh
            entered.append(self.begin(sequence, self.chunk_length(sequence)))
        # A sequence that was given a chunk above may have been preempted for an older one afterwards.
        chunks = [chunk for chunk in entered if chunk.sequence.chunk is chunk]
        return ScheduledBatch("entry", chunks, copies) if chunks else None

    def is_reading_prompt(self, leader: SequenceState) -> bool:
        """Whether the prompt of `leader` is not in the prefix cache yet, but soon will be."""
        return self.options.prefix_caching and leader.state != "gone" and leader.num_read < leader.prompt_length

    def admit(self, sequence: SequenceState) -> list[PageCopy] | None:
        """Make the first waiting sequence a resident, starting from what the prefix cache has of its tokens.

        Returns the page copies to make, or None if there are too few pages.
        """
        sequence.tables = [PageTable() for _ in self.book.specs]
        chain = list[PrefixBlock]()
        if self.options.prefix_caching and (sequence.reuse or len(sequence.depths) >= sequence.prompt_length):
            chain = self.prefixes.find(sequence.tokens, sequence.max_depth, sequence.depths)
        # Adopted before room is made: the references keep `make_room` from freeing the chain's own pages.
        partial = self.prefixes.adopt(chain, sequence.tables)
        read = len(chain) * self.options.page_size
        count = min(len(sequence.tokens) - read, self.options.chunk_size, len(self.free_slots))
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
        self.waiting.pop(0)
        self.residents.append(sequence)
        sequence.state = "resident"
        sequence.num_read, sequence.block = read, chain[-1] if chain else None
        if sequence.cached_tokens is None:
            sequence.cached_tokens = read
        # After a preemption the depths are longer than the chain, and equal where both know a token.
        known = [depth for block in chain for depth in block.depths]
        sequence.depths += known[len(sequence.depths) :]
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
        count = self.chunk_length(sequence)
        while not self.make_room(self.book.missing(sequence.tables, count, sequence.max_depth)):
            youngest = max(self.residents, key=lambda other: other.number)
            if youngest is sequence:
                return 0
            self.preempt(youngest)
        self.book.reserve(sequence.tables, count, sequence.max_depth)
        return count

    def chunk_length(self, sequence: SequenceState) -> int:
        """Tokens in the next chunk."""
        return min(sequence.unread, self.options.chunk_size, len(self.free_slots))

    def begin(self, sequence: SequenceState, count: int) -> Chunk:
        """A chunk of the next `count` tokens, for which there are pages."""
        slots = [self.free_slots.pop() for _ in range(count)]
        sequence.chunk = Chunk(sequence, sequence.num_read, count, slots, depths=[0] * count)
        return sequence.chunk

    def advance(self, chunk: Chunk, continuing: Sequence[int], took_recursion: bool) -> None:
        """Move a chunk to its next recursion, which the rows `continuing` take; without any it leaves the core."""
        if took_recursion:
            for row in chunk.active:
                chunk.depths[row] += 1
            chunk.recursion += 1
        else:
            self.in_core.append(chunk)
        chunk.active = list(continuing)
        recursion = chunk.recursion
        for row in chunk.active:
            # A router that ignores the bound would write keys for which no page was reserved.
            if recursion >= (most := chunk.sequence.bounds(chunk.start + row)[1]):
                raise ConfigError(BOUND_BROKEN.format(position=chunk.start + row, depth=recursion + 1, bound=most))
        if recursion in self.table_of:
            # Entries are numbered without gaps: the n-th of the rows that take this recursion comes after the n - 1
            # before it, wherever they are in the text. RoPE still uses their original positions.
            first = chunk.sequence.tables[self.table_of[recursion]].length
            chunk.entries[recursion] = {row: first + rank for rank, row in enumerate(chunk.active)}
        # Under the policy full a chunk goes through all recursions, even if none of its rows takes them.
        stays = recursion < self.num_recursions if self.options.policy == "full" else bool(chunk.active)
        if not stays:
            self.in_core.remove(chunk)
            self.leaving.append(chunk)

    def leave(self, chunk: Chunk) -> None:
        """A chunk has passed the exit: its entries become part of the tables and its tokens count as read."""
        sequence = chunk.sequence
        self.leaving.remove(chunk)
        self.free_slots += chunk.slots
        sequence.chunk = None
        # Only now: all recursions of the chunk have numbered their entries from the same lengths.
        for spec, table in zip(self.book.specs, sequence.tables, strict=True):
            table.length += sum([spec.holds(depth) for depth in chunk.depths])
        self.book.trim(sequence.tables)
        known = max(0, len(sequence.depths) - chunk.start)
        for row, depth in enumerate(chunk.depths[:known]):
            if depth < (least := sequence.bounds(chunk.start + row)[0]):
                raise ConfigError(BOUND_BROKEN.format(position=chunk.start + row, depth=depth, bound=least))
        sequence.depths += chunk.depths[known:]
        before, sequence.num_read = sequence.num_read, sequence.num_read + chunk.length
        if self.options.prefix_caching:
            self.remember(sequence, before)

    def remember(self, sequence: SequenceState, before: int) -> None:
        """Put the blocks into the prefix cache that were completed since `before` tokens were read."""
        # From the beginning of a block that was only partly read before.
        size = self.options.page_size
        for start in range(before - before % size, sequence.num_read - size + 1, size):
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
        chunk, sequence.chunk = sequence.chunk, None
        if chunk is not None:
            self.free_slots += chunk.slots
            for chunks in (self.in_core, self.leaving):
                if chunk in chunks:
                    chunks.remove(chunk)
        # The tokens and their depths stay. A preempted sequence is read again from what the prefix cache still has.
        sequence.num_read, sequence.block = 0, None
