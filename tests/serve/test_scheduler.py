"""The scheduler alone, on a memory of plain dictionaries: who writes and reads what, and that nothing is lost or late.

The "model" is a function: the depth of a token follows from the tokens before it, and what is stored for a token is
those tokens. So every page that is read can be checked entry by entry, through sharing, copies and preemption.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamor.serve.engine.pages import EVERY_TOKEN, TableSpec
from megamor.serve.engine.scheduler import POLICIES, Launch, Limits, Piece, Scheduler, SequenceState

NUM_RECURSIONS = 3
EDGE = TableSpec("edge", EVERY_TOKEN)
TABLES = {
    "recursion_wise": (EDGE, *(TableSpec("core", recursion) for recursion in range(NUM_RECURSIONS))),
    "share_first": (EDGE, TableSpec("core", 0)),
    "no_edge": tuple(TableSpec("core", recursion) for recursion in range(NUM_RECURSIONS)),
}


def chosen_depth(tokens: Sequence[int], max_depth: int) -> int:
    """Recursions (0 to max_depth) of the last of `tokens`."""
    return min(max_depth, hash(tuple(tokens)) % (NUM_RECURSIONS + 1))


class Memory:
    """A model without numbers: runs the launches of a scheduler and checks what they see."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.pages: dict[tuple[str, int, int], tuple[int, ...]] = {}
        self.everyone: list[SequenceState] = []
        self.targets: dict[int, int] = {}
        self.in_slots: dict[int, Piece] = {}
        self.history: list[tuple[str, bool]] = []
        """Kind of each launch, and whether anything was in the core then."""

    def submit(self, prompt: list[int], new_tokens: int, max_depth: int, leader: SequenceState | None = None) -> None:
        sequence = SequenceState(len(self.everyone), list(prompt), len(prompt), max_depth, leader)
        length = len(prompt) + new_tokens - 1
        if self.scheduler.fits(length, max_depth):
            self.everyone.append(sequence)
            self.targets[sequence.number] = len(prompt) + new_tokens
            self.scheduler.add(sequence)

    def step(self, abort_inside: SequenceState | None = None) -> bool:
        launch = self.scheduler.next()
        if launch is None:
            return False
        self.history.append((launch.kind, bool(self.scheduler.in_core)))
        held = self.pages_of(launch)
        for copy in launch.copies:
            for place in range(self.limits.page_size):
                self.pages[copy.pool, copy.target, place] = self.pages.get((copy.pool, copy.source, place), ())
        if abort_inside is not None:
            self.scheduler.remove(abort_inside)
        for pool, page in held:
            assert page not in self.scheduler.book.pools[pool].free, "a page of the launch was freed while it runs"
        going_on = []
        if launch.kind == "entry":
            going_on = [self.enter(piece) for piece in launch.pieces]
        elif launch.kind == "core":
            for piece in launch.pieces:
                self.core(piece)
            going_on = [
                [row for row in piece.active if self.depth(piece, row) > piece.recursion + 1] for piece in launch.pieces
            ]
        else:
            for piece in launch.pieces:
                self.leave(piece)
        self.scheduler.complete(launch, going_on)
        if launch.kind == "exit":
            self.answer(launch)
        self.check()
        return True

    def pages_of(self, launch: Launch) -> list[tuple[str, int]]:
        return [
            (spec.pool, page)
            for piece in launch.pieces
            for spec, table in zip(self.limits.tables, piece.sequence.tables, strict=True)
            for page in table.pages
        ]

    def depth(self, piece: Piece, row: int) -> int:
        position = piece.start + row
        least, most = piece.sequence.bounds(position)
        return max(least, min(most, chosen_depth(piece.sequence.tokens[: position + 1], piece.sequence.max_depth)))

    def enter(self, piece: Piece) -> list[int]:
        for slot in piece.slots:
            assert slot not in self.in_slots or self.in_slots[slot].sequence.piece is not self.in_slots[slot]
            self.in_slots[slot] = piece
        self.write(piece, EVERY_TOKEN, {row: piece.start + row for row in range(piece.length)})
        return [row for row in range(piece.length) if self.depth(piece, row) > 0]

    def core(self, piece: Piece) -> None:
        if piece.recursion in self.scheduler.table_of:
            self.write(piece, piece.recursion, piece.places[piece.recursion])
        for table, places in piece.places.items():
            for row in piece.active:
                self.read(piece, table, row, places[row])

    def leave(self, piece: Piece) -> None:
        assert all(self.depth(piece, row) == piece.depths[row] for row in range(piece.length)), "left before its time"
        if EVERY_TOKEN in self.scheduler.table_of:
            for row in range(piece.length):
                self.read(piece, EVERY_TOKEN, row, piece.start + row)

    def answer(self, launch: Launch) -> None:
        for piece in launch.pieces:
            sequence = piece.sequence
            if sequence.state == "resident" and not sequence.unread:
                self.scheduler.extend(sequence, hash(tuple(sequence.tokens)) % 3)
                if len(sequence.tokens) == self.targets[sequence.number]:
                    self.scheduler.remove(sequence)

    def where(self, piece: Piece, recursion: int, entry: int) -> tuple[str, int, int]:
        number = self.scheduler.table_of[recursion]
        table, size = piece.sequence.tables[number], self.limits.page_size
        return self.limits.tables[number].pool, table.pages[entry // size], entry % size

    def write(self, piece: Piece, recursion: int, places: dict[int, int]) -> None:
        if recursion in self.scheduler.table_of:
            for row, entry in places.items():
                pool, page, place = self.where(piece, recursion, entry)
                assert self.scheduler.book.pools[pool].holders[page] > 0
                self.pages[pool, page, place] = (recursion, *piece.sequence.tokens[: piece.start + row + 1])

    def read(self, piece: Piece, recursion: int, row: int, last: int) -> None:
        tokens, max_depth = piece.sequence.tokens, piece.sequence.max_depth
        wanted = [
            (recursion, *tokens[: end + 1])
            for end in range(piece.start + row + 1)
            if chosen_depth(tokens[: end + 1], max_depth) > recursion
        ]
        found = [self.pages[self.where(piece, recursion, entry)] for entry in range(last + 1)]
        assert found == wanted, "a row sees other entries than those of its sequence that reached its depth"

    def check(self) -> None:
        """Holders of every page are those that know it; every slot is free or in one piece."""
        scheduler = self.scheduler
        holders: dict[tuple[str, int], int] = {}
        for sequence in scheduler.residents:
            for spec, table in zip(self.limits.tables, sequence.tables, strict=True):
                for page in table.pages:
                    holders[spec.pool, page] = holders.get((spec.pool, page), 0) + 1
        for node in scheduler.prefixes.nodes.values():
            for spec, pages in zip(self.limits.tables, node.pages, strict=True):
                for page in pages:
                    holders[spec.pool, page] = holders.get((spec.pool, page), 0) + 1
        for name, pool in scheduler.book.pools.items():
            assert pool.holders == [holders.get((name, page), 0) for page in range(len(pool.holders))]
            assert sorted(pool.free) == [page for page, count in enumerate(pool.holders) if count == 0]
        pieces = [sequence.piece for sequence in scheduler.residents if sequence.piece is not None]
        assert sorted(pieces, key=id) == sorted(scheduler.in_core + scheduler.leaving, key=id)
        slots = [slot for piece in pieces for slot in piece.slots] + scheduler.free_slots
        assert sorted(slots) == list(range(self.limits.max_rows))
        assert len(scheduler.residents) <= self.limits.max_resident
        if scheduler.residents and scheduler.waiting:
            assert max(s.number for s in scheduler.residents) < min(s.number for s in scheduler.waiting)

    def finish(self) -> None:
        """Everything that was admitted ends, and then nothing is held."""
        for _ in range(20_000):
            if not self.step():
                break
        assert not self.scheduler.has_work
        assert all(sequence.state == "gone" for sequence in self.everyone)
        self.scheduler.prefixes.clear()
        self.check()
        assert all(len(pool.free) == self.limits.num_pages[name] for name, pool in self.scheduler.book.pools.items())


@st.composite
def all_limits(draw: st.DrawFn) -> Limits:
    tables = TABLES[draw(st.sampled_from(sorted(TABLES)))]
    page_size = draw(st.integers(1, 5))
    counts = {spec.pool: draw(st.integers(4, 60)) for spec in tables}
    return Limits(
        NUM_RECURSIONS,
        page_size,
        tables,
        counts,
        policy=draw(st.sampled_from(POLICIES)),
        hold=draw(st.integers(1, 4)),
        max_resident=draw(st.integers(1, 6)),
        max_rows=draw(st.integers(1, 12)),
        chunk_size=draw(st.integers(1, 7)),
        prefix_caching=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(limits=all_limits(), seed=st.integers(0, 2**32), num_sequences=st.integers(1, 12))
def test_any_traffic(limits: Limits, seed: int, num_sequences: int) -> None:
    """Prompts that begin alike, arriving, finishing and given up at any time, in memory that is too small for all."""
    rng = random.Random(seed)
    memory = Memory(limits)
    text = [rng.randrange(3) for _ in range(20)]
    for _ in range(num_sequences):
        prompt = text[: rng.randrange(1, 14)] + [rng.randrange(3) for _ in range(rng.randrange(3))]
        leader = rng.choice(memory.everyone) if memory.everyone and rng.random() < 0.2 else None
        memory.submit(prompt, rng.randrange(1, 9), rng.randrange(1, NUM_RECURSIONS + 1), leader)
        for _ in range(rng.randrange(6)):
            alive = [sequence for sequence in memory.everyone if sequence.state != "gone"]
            given_up = rng.choice(alive) if alive and rng.random() < 0.1 else None
            memory.step(abort_inside=given_up if rng.random() < 0.5 else None)
            if given_up is not None and given_up.state != "gone":
                memory.scheduler.remove(given_up)
                memory.check()
    memory.finish()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_oldest_is_never_interrupted_and_the_others_take_turns(policy: str) -> None:
    memory = Memory(Limits(3, 2, TABLES["recursion_wise"], {"edge": 14, "core": 30}, policy=policy, max_rows=8))  # type: ignore[arg-type]
    for number in range(6):
        memory.submit([number % 3] * 5, 12, 3)
    oldest = memory.everyone[0]
    ended = []
    while memory.step():
        assert oldest.state in ("resident", "gone")
        ended += [s.number for s in memory.everyone if s.state == "gone" and s.number not in ended]
    assert memory.scheduler.num_preempted > 0
    assert ended[0] == 0
    assert len(ended) == 6


def test_shared_prompts_are_read_once() -> None:
    limits = Limits(3, 4, TABLES["recursion_wise"], {"edge": 99, "core": 299})
    memory = Memory(limits)
    prompt = [0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 2]
    memory.submit(prompt, 3, 3)
    for _ in range(3):
        memory.submit(prompt, 3, 3, leader=memory.everyone[0])
    memory.submit(prompt, 3, 2)
    memory.finish()
    assert [sequence.cached_tokens for sequence in memory.everyone] == [0, 8, 8, 8, 0]


def test_depths_share_launches_only_where_they_should() -> None:
    mixed = {}
    for policy in POLICIES:
        memory = Memory(Limits(3, 4, TABLES["recursion_wise"], {"edge": 99, "core": 299}, policy=policy))
        for number in range(8):
            memory.submit([number % 3, number // 3, 1], 6, 3)
        mixed[policy] = 1
        while memory.scheduler.has_work:
            if not memory.scheduler.at_boundary() and memory.scheduler.in_core:
                mixed[policy] = max(mixed[policy], len({piece.recursion for piece in memory.scheduler.in_core}))
            memory.step()
    assert mixed == {"full": 1, "shrink": 1, "depthwise": 3}


def test_exits_are_held() -> None:
    """With hold k a boundary comes after k core launches, as long as there is anything in the core."""
    memory = Memory(Limits(3, 4, TABLES["recursion_wise"], {"edge": 99, "core": 299}, hold=2))
    for number in range(8):
        memory.submit([number % 3, number // 3, 1], 9, 3)
    memory.finish()
    runs, cores = [], 0
    for kind, busy in memory.history:
        if kind == "core":
            cores += 1
        elif kind == "exit" and busy:
            runs.append(cores)
        cores = 0 if kind == "entry" else cores
    assert runs
    assert min(runs) >= 2


def test_the_scheduler_knows_no_torch() -> None:
    code = "import sys, megamor.serve.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
