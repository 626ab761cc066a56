"""Which tokens run next: continuous depth-wise batching in plain integers.

A *piece* is a run of consecutive tokens of one sequence that are under way together: one token while decoding, a chunk
of the prompt while prefilling. A sequence has at most one piece, so that every cache a piece reads is complete. All
rows of a piece stand before the same recursion; those that the router lets go on take it in the next core launch, the
others wait, since the exit layers of a token need those of all earlier ones: a piece leaves when its last row has left
the core.

There are three launches, `next` names one and `complete` tells how it went:

    entry   embedding and prelude, for pieces that begin
    core    one recursion, whichever it is, for every row in the core
    exit    coda, head and sampling, for pieces that have left the core

Exit and entry are done together, at a *boundary*. The policy says when that is:

    full        all rows take all recursions (idle ones compute for nothing), then comes the boundary
    shrink      rows leave the launch as they finish, the boundary comes when the core is empty (lock-step early exit)
    depthwise   the boundary comes after every `hold` core launches: those who have left make room for new tokens, so
                that rows of all depths share the next launch. Holding makes boundary launches fewer and wider

Pages are reserved for the worst case when a piece enters and given back when it leaves, so that nothing can run out
half-way. If they lack, the prefix cache shrinks first; then the youngest sequence loses everything but its tokens and
their depths, and is read again later. The oldest is never interrupted, so everything that is admitted finishes.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megamor.errors import ConfigError
from megamor.serve.engine.pages import EVERY_TOKEN, PageBook, PageTable, TableSpec
from megamor.serve.engine.prefix import Copy, Node, PrefixCache

Policy = Literal["full", "shrink", "depthwise"]
POLICIES: tuple[Policy, ...] = ("full", "shrink", "depthwise")
BOUND_BROKEN = (
    "token {row} takes {depth} recursions where {bound} is the bound (max_depth of its request, or what it took "
    "before): a router must select through RoutingSession.bounded, see docs/routers.md"
)


@dataclass(frozen=True)
class Limits:
    """What the scheduler has to get along with.

    `max_resident` sequences, `max_rows` tokens under way at once, `chunk_size` prompt tokens in a piece; `tables` of
    every sequence, `num_pages` of each pool. `hold` is in core launches.
    """

    num_recursions: int
    page_size: int
    tables: tuple[TableSpec, ...]
    num_pages: Mapping[str, int]
    policy: Policy = "depthwise"
    hold: int = 1
    max_resident: int = 64
    max_rows: int = 320
    chunk_size: int = 128
    prefix_caching: bool = True


@dataclass(eq=False)
class Piece:
    """Tokens `start` to `start` + `length` of a sequence, under way; rows are numbered from 0.

    They stand before `recursion`, which the `active` ones take. `depths` counts the recursions of each row so far,
    `places` [recursion][row] is its entry in the table of a recursion it takes, `slots` are the engine's for its state.
    """

    sequence: SequenceState
    start: int
    length: int
    slots: list[int]
    recursion: int = 0
    active: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    places: dict[int, dict[int, int]] = field(default_factory=dict)


@dataclass(eq=False)
class SequenceState:
    """A text under way. `number` is its order of arrival, `tokens` are prompt and continuation.

    `num_read` of them are in the tables; `depths` are those of all that were ever read, which after a preemption are
    more. `leader` is a sequence with the same prompt that reads it first. `reuse` False means that every prompt token
    must be read, because somebody wants to see what it predicts.
    """

    number: int
    tokens: list[int]
    prompt_length: int
    max_depth: int
    leader: SequenceState | None = None
    reuse: bool = True
    num_read: int = 0
    depths: list[int] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    piece: Piece | None = None
    node: Node | None = None
    cached_tokens: int | None = None
    state: Literal["waiting", "resident", "doomed", "gone"] = "waiting"

    @property
    def unread(self) -> int:
        """Tokens that are not in the tables yet."""
        return len(self.tokens) - self.num_read

    def bounds(self, position: int) -> tuple[int, int]:
        """Least and most recursions of the token at `position`: what it took before, if it was ever read."""
        if position < len(self.depths):
            return self.depths[position], self.depths[position]
        return 0, self.max_depth


@dataclass(frozen=True)
class Launch:
    """`pieces` in the order of their rows; `copies` of pages come before anything else."""

    kind: Literal["entry", "core", "exit"]
    pieces: list[Piece]
    copies: list[Copy] = field(default_factory=list)


class Scheduler:
    """See the module docstring. `launched` is what `next` has named and `complete` hasn't heard of yet."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.book = PageBook(limits.page_size, limits.tables, limits.num_pages)
        self.prefixes = PrefixCache(self.book)
        self.table_of = {spec.recursion: place for place, spec in enumerate(limits.tables)}
        self.waiting: list[SequenceState] = []
        self.residents: list[SequenceState] = []
        self.in_core: list[Piece] = []
        self.leaving: list[Piece] = []
        self.free_slots = list(range(limits.max_rows - 1, -1, -1))
        self.launched: Launch | None = None
        self.hold = limits.hold
        self.since_boundary = 0
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.waiting or self.residents)

    def fits(self, num_tokens: int, max_depth: int) -> bool:
        """Whether a sequence that reads `num_tokens` could be served if it were alone."""
        worst = self.book.worst_case(num_tokens, max_depth)
        return all(count <= self.book.num_pages[pool] for pool, count in worst.items())

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence; it must fit."""
        bisect.insort(self.waiting, sequence, key=lambda other: other.number)

    def next(self) -> Launch | None:
        """The next launch; None when there is nothing to do."""
        assert self.launched is None, "complete one launch before the next"
        launch = None
        if self.at_boundary():
            launch = Launch("exit", list(self.leaving)) if self.leaving else self.enter()
        if launch is None and self.in_core:
            launch = Launch("core", sorted(self.in_core, key=lambda piece: piece.recursion))
        self.launched = launch
        return launch

    def at_boundary(self) -> bool:
        """Whether tokens may leave and enter now."""
        return not self.in_core or (self.limits.policy == "depthwise" and self.since_boundary >= self.hold)

    def complete(self, launch: Launch, going_on: Sequence[Sequence[int]] = ()) -> None:
        """Record that a launch has run; after entry and core `going_on` names the rows of each piece that take the
        recursion they now stand before."""
        assert launch is self.launched, "only the launch under way can be completed"
        self.launched = None
        if launch.kind == "exit":
            for piece in launch.pieces:
                self.leave(piece)
        else:
            self.since_boundary = self.since_boundary + 1 if launch.kind == "core" else 0
            for piece, rows in zip(launch.pieces, going_on, strict=True):
                self.advance(piece, rows, took_recursion=launch.kind == "core")
        for piece in launch.pieces:
            if piece.sequence.state == "doomed":
                self.remove(piece.sequence)

    def extend(self, sequence: SequenceState, token: int) -> None:
        """Append a token to read next."""
        sequence.tokens.append(token)

    def remove(self, sequence: SequenceState) -> None:
        """A sequence is finished or given up; what it holds is free, after the launch under way if it takes part."""
        if self.launched is not None and sequence.piece in self.launched.pieces:
            sequence.state = "doomed"
            return
        if sequence.state == "waiting":
            self.waiting.remove(sequence)
        elif sequence.state != "gone":
            self.evict(sequence)
        sequence.state = "gone"

    def enter(self) -> Launch | None:
        """Pieces for residents that have none, decoding ones first, then for as many newcomers as there is room."""
        entered, copies = list[Piece](), list[Copy]()
        idle = [sequence for sequence in self.residents if sequence.piece is None]
        for sequence in sorted(idle, key=lambda sequence: (sequence.unread > 1, sequence.number)):
            if self.free_slots and sequence.state == "resident":
                count = min(sequence.unread, self.limits.chunk_size, len(self.free_slots))
                if self.reserve(sequence, count):
                    entered.append(self.begin(sequence, count))
        while self.waiting and self.free_slots and len(self.residents) < self.limits.max_resident:
            sequence = self.waiting[0]
            if sequence.leader is not None and self.is_reading_prompt(sequence.leader):
                break
            fresh = self.admit(sequence)
            if fresh is None:
                break
            copies += fresh
            count = min(sequence.unread, self.limits.chunk_size, len(self.free_slots))
            self.book.reserve(sequence.tables, count, sequence.max_depth)
            entered.append(self.begin(sequence, count))
        # A sequence that was given a piece may have had to yield to an older one.
        pieces = [piece for piece in entered if piece.sequence.piece is piece]
        return Launch("entry", pieces, copies) if pieces else None

    def is_reading_prompt(self, leader: SequenceState) -> bool:
        """Whether a sequence with the same prompt will soon have put it into the prefix cache."""
        return self.limits.prefix_caching and leader.state != "gone" and leader.num_read < leader.prompt_length

    def admit(self, sequence: SequenceState) -> list[Copy] | None:
        """Make the first in the queue a resident with what the prefix cache knows; None if there are too few pages.

        One page of each pool is left for every other resident, so that newcomers don't push each other out.
        """
        sequence.tables = [PageTable() for _ in self.limits.tables]
        chain = []
        if self.limits.prefix_caching and (sequence.reuse or len(sequence.depths) >= sequence.prompt_length):
            chain = self.prefixes.find(sequence.tokens, sequence.max_depth)
        if chain:
            self.prefixes.adopt(chain, sequence.tables)
        read = len(chain) * self.limits.page_size
        count = min(len(sequence.tokens) - read, self.limits.chunk_size, len(self.free_slots))
        needed = self.book.missing(sequence.tables, count, sequence.max_depth)
        for pool, partial in self.prefixes.num_partial(sequence.tables).items():
            needed[pool] += partial
            if not self.make_room({pool: needed[pool] + len(self.residents)}):
                self.book.release(sequence.tables)
                return None
        copies = self.prefixes.detach(sequence.tables)
        self.waiting.pop(0)
        self.residents.append(sequence)
        sequence.state = "resident"
        sequence.num_read, sequence.node = read, chain[-1] if chain else None
        if sequence.cached_tokens is None:
            sequence.cached_tokens = read
        known = [depth for node in chain for depth in node.depths]
        sequence.depths += known[len(sequence.depths) :]
        return copies

    def make_room(self, needed: Mapping[str, int]) -> bool:
        """Shrink the prefix cache until `needed` pages of each pool are free; False if that isn't enough."""
        for pool, count in needed.items():
            while len(self.book.pools[pool].free) < count:
                if not self.prefixes.drop_oldest():
                    return False
        return True

    def reserve(self, sequence: SequenceState, count: int) -> bool:
        """Pages for `count` more tokens of a resident, if need be at the cost of younger ones."""
        while not self.make_room(needed := self.book.missing(sequence.tables, count, sequence.max_depth)):
            youngest = max(self.residents, key=lambda other: other.number)
            if youngest is sequence:
                return False
            self.preempt(youngest)
        if any(needed.values()):
            self.book.reserve(sequence.tables, count, sequence.max_depth)
        return True

    def begin(self, sequence: SequenceState, count: int) -> Piece:
        """A piece of the next `count` tokens."""
        slots = [self.free_slots.pop() for _ in range(count)]
        sequence.piece = Piece(sequence, sequence.num_read, count, slots, depths=[0] * count)
        return sequence.piece

    def advance(self, piece: Piece, going_on: Sequence[int], took_recursion: bool) -> None:
        """Rows have taken a recursion (or entered), and some go on."""
        if took_recursion:
            for row in piece.active:
                piece.depths[row] += 1
            piece.recursion += 1
        else:
            self.in_core.append(piece)
        piece.active = list(going_on)
        recursion = piece.recursion
        for row in piece.active:
            if recursion >= (most := piece.sequence.bounds(piece.start + row)[1]):
                raise ConfigError(BOUND_BROKEN.format(row=piece.start + row, depth=recursion + 1, bound=most))
        if recursion in self.table_of:
            first = piece.sequence.tables[self.table_of[recursion]].length
            piece.places[recursion] = {row: first + rank for rank, row in enumerate(piece.active)}
        stays = recursion < self.limits.num_recursions if self.limits.policy == "full" else bool(piece.active)
        if not stays:
            self.in_core.remove(piece)
            self.leaving.append(piece)

    def leave(self, piece: Piece) -> None:
        """A piece has passed the exit: its tokens are read."""
        sequence = piece.sequence
        self.leaving.remove(piece)
        self.free_slots += piece.slots
        sequence.piece = None
        for spec, table in zip(self.limits.tables, sequence.tables, strict=True):
            table.length += sum([spec.lists(depth) for depth in piece.depths])
        self.book.trim(sequence.tables)
        known = max(0, len(sequence.depths) - piece.start)
        for row, depth in enumerate(piece.depths[:known]):
            if depth < (least := sequence.bounds(piece.start + row)[0]):
                raise ConfigError(BOUND_BROKEN.format(row=piece.start + row, depth=depth, bound=least))
        sequence.depths += piece.depths[known:]
        before, sequence.num_read = sequence.num_read, sequence.num_read + piece.length
        if self.limits.prefix_caching:
            self.remember(sequence, before)

    def remember(self, sequence: SequenceState, before: int) -> None:
        """Put the blocks into the prefix cache that were completed since `before` tokens were read."""
        size = self.limits.page_size
        for start in range(before - before % size, sequence.num_read - size + 1, size):
            parent = sequence.node if start else None
            if start and (parent is None or parent.dropped):
                return
            sequence.node = self.prefixes.insert(
                parent,
                sequence.tokens[start : start + size],
                sequence.depths[start : start + size],
                sequence.max_depth,
                sequence.tables,
            )

    def preempt(self, sequence: SequenceState) -> None:
        """Take everything from a resident but its tokens and depths, and queue it again in its old place."""
        self.num_preempted += 1
        self.evict(sequence)
        sequence.state = "waiting"
        self.add(sequence)

    def evict(self, sequence: SequenceState) -> None:
        """Free the pages and slots of a resident."""
        self.residents.remove(sequence)
        self.book.release(sequence.tables)
        piece, sequence.piece = sequence.piece, None
        if piece is not None:
            self.free_slots += piece.slots
            for group in (self.in_core, self.leaving):
                if piece in group:
                    group.remove(piece)
        sequence.num_read, sequence.node = 0, None

    def pages_by_depth(self) -> list[int]:
        """Pages of the core that residents' tables of each recursion hold."""
        counts = Counter[int]()
        for sequence in self.residents:
            for spec, table in zip(self.limits.tables, sequence.tables, strict=True):
                counts[spec.recursion] += len(table.pages)
        counts.pop(EVERY_TOKEN, None)
        return [counts[recursion] for recursion in range(self.limits.num_recursions)]
