"""The scheduler without a model: which entries a batch writes and reads, and that no row is lost or late.

The "model" is a function: a token's depth is computed from the tokens before it, and those tokens with their depths are
what is stored for it in the cache. Every page that is read can therefore be checked entry by entry, through prefix
sharing, copies and preemption. A router's near tie, which falls differently in another batch, is a sequence with other
depths from the start.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamor.serve.engine.flight import (
    ACTIVE,
    ADDRESS,
    BEGIN,
    DEPTH,
    END,
    LEAST,
    MOST,
    OWNER,
    RECURSION,
    SEAT,
    Chunk,
    Ints,
    ScheduledBatch,
    SequenceState,
)
from megamor.serve.engine.pages import EVERY_TOKEN, PageBook, PageTable, TableSpec
from megamor.serve.engine.prefix import PrefixCache
from megamor.serve.engine.scheduler import Scheduler
from megamor.serve.options import POLICIES, EngineOptions, Policy

NUM_RECURSIONS, CONTEXT = 3, 64
WINDOW = 3
EDGE = TableSpec("edge", EVERY_TOKEN)
TABLES = {
    "recursion_wise": (EDGE, *(TableSpec("core", recursion) for recursion in range(NUM_RECURSIONS))),
    "share_first": (EDGE, TableSpec("core", 0)),
    "no_edge": tuple(TableSpec("core", recursion) for recursion in range(NUM_RECURSIONS)),
}


def chosen_depth(tokens: Sequence[int], max_depth: int) -> int:
    """Number of recursions (0 to max_depth) that the last of `tokens` takes."""
    return min(max_depth, hash(tuple(tokens)) % (NUM_RECURSIONS + 1))


def add_noise(scheduler: Scheduler, rng: random.Random, deepest: int = NUM_RECURSIONS) -> None:
    """Near ties: some tokens that nobody has a record of take another depth, up to `deepest`, by chance."""
    place = scheduler.place

    def noisy(chunks: Sequence[Chunk]) -> Ints:
        slots = place(chunks)
        for chunk in chunks:
            for slot in chunk.slots[max(0, len(chunk.sequence.depths) - chunk.start) :]:
                if rng.random() < 0.4:
                    depth = rng.randint(1, min(deepest, chunk.sequence.max_depth))
                    scheduler.flight.rows[LEAST : MOST + 1, slot] = depth
        return slots

    scheduler.place = noisy  # type: ignore[method-assign]


class Memory:
    """A symbolic model: runs the batches of a scheduler and checks the entries that they read.

    With `noise`, its router decides some tokens by chance.
    """

    def __init__(
        self, options: EngineOptions, tables: str, num_pages: dict[str, int], noise: random.Random | None = None
    ) -> None:
        self.options, self.tables, self.noise = options, TABLES[tables], noise
        self.scheduler = Scheduler(options, NUM_RECURSIONS, self.tables, num_pages, CONTEXT)
        if noise is not None:
            add_noise(self.scheduler, noise)
        self.pages: dict[tuple[str, int, int], tuple[Any, ...]] = {}
        self.everyone: list[SequenceState] = []
        self.targets: dict[int, int] = {}
        self.in_slots: dict[int, Chunk] = {}
        self.history: list[tuple[str, bool]] = []
        """Kind of each batch, and whether any row was in the core at that time."""

    def submit(
        self,
        prompt: list[int],
        new_tokens: int,
        max_depth: int,
        leader: SequenceState | None = None,
        depths: Sequence[int] = (),
    ) -> None:
        """A sequence; it takes `depths` where the model would choose others."""
        sequence = SequenceState(len(self.everyone), list(prompt), len(prompt), max_depth, leader, depths=[*depths])
        length = len(prompt) + new_tokens - 1
        if self.scheduler.fits(length, max_depth):
            self.everyone.append(sequence)
            self.targets[sequence.number] = len(prompt) + new_tokens
            self.scheduler.add(sequence)

    def step(self, abort_inside: SequenceState | None = None) -> bool:
        batch = self.scheduler.next()
        if batch is None:
            return False
        self.history.append((batch.kind, bool(self.scheduler.in_core)))
        rows = self.scheduler.flight.rows
        recursions = rows[RECURSION, batch.slots].tolist()
        if batch.kind == "core":  # neighbours share the calls of blocks whose weights depend on the recursion
            assert recursions == sorted(recursions)
            assert batch.depths == sorted(set(recursions))
            seats = [seat for seat, _ in groupby(rows[SEAT, batch.slots].tolist())]
            assert len(seats) == len(set(seats)), "the rows of a chunk belong together"
        held = self.pages_of(batch)
        for copy in batch.copies:
            for offset in range(self.options.page_size):
                self.pages[copy.pool, copy.target, offset] = self.pages.get((copy.pool, copy.source, offset), ())
        if abort_inside is not None:
            self.scheduler.remove(abort_inside)
        for pool, page in held:
            assert page not in self.scheduler.book.pools[pool].free, "a page of the running batch was freed"
        kept = None
        if batch.kind == "entry":
            prompts = sum(chunk.length for chunk in batch.chunks if chunk.sequence.unread > 1)
            assert prompts <= (self.options.prefill_budget or prompts)
            for chunk in batch.chunks:
                self.enter(chunk)
            kept = [self.depth_of(slot) > 0 for slot in batch.slots.tolist()]
        elif batch.kind == "core":
            active = rows[ACTIVE, batch.slots] > 0
            self.core(batch.slots[active])
            kept = [
                bool(taking) and self.depth_of(slot) > recursion + 1
                for taking, slot, recursion in zip(active, batch.slots.tolist(), recursions, strict=True)
            ]
        else:
            for chunk in batch.chunks:
                self.leave(chunk)
        self.scheduler.complete(batch, None if kept is None else np.array(kept))
        if batch.kind == "exit":
            self.answer(batch)
        self.check()
        return True

    def pages_of(self, batch: ScheduledBatch) -> list[tuple[str, int]]:
        return [
            (spec.pool, page)
            for chunk in {self.scheduler.chunk_of[slot] for slot in batch.slots.tolist()}
            for spec, table in zip(self.tables, chunk.sequence.tables, strict=True)
            for page in table.pages
        ]

    def depth(self, chunk: Chunk, row: int) -> int:
        position = chunk.start + row
        least, most = map(int, self.scheduler.flight.rows[LEAST : MOST + 1, chunk.slots[row]])
        known = chunk.sequence.depths[position : position + 1]
        if known or self.noise is None:
            assert (least, most) == ((known[0], known[0]) if known else (0, chunk.sequence.max_depth))
        return max(least, min(most, chosen_depth(chunk.sequence.tokens[: position + 1], chunk.sequence.max_depth)))

    def depth_of(self, slot: int) -> int:
        chunk = self.scheduler.chunk_of[slot]
        return self.depth(chunk, chunk.slots.index(slot))

    def stored(self, sequence: SequenceState, recursion: int) -> Iterator[tuple[Any, ...]]:
        """What each token that takes `recursion` stores: it depends on the tokens before and their depths."""
        tokens, depths, chunk = sequence.tokens, list[int](), sequence.chunk
        for end in range(1, sequence.num_read + (chunk.length if chunk else 0) + 1):
            known = sequence.depths[end - 1 : end]
            assert known or chunk is not None
            depth = known[0] if known or chunk is None else self.depth(chunk, end - 1 - chunk.start)
            yield (recursion, *tokens[:end], *depths) if depth > recursion else ()
            depths.append(depth)

    def enter(self, chunk: Chunk) -> None:
        for slot in chunk.slots:
            assert slot not in self.in_slots or self.in_slots[slot].sequence.chunk is not self.in_slots[slot]
            self.in_slots[slot] = chunk
        for row in range(chunk.length):
            self.write(chunk, EVERY_TOKEN, row)

    def core(self, slots: Ints) -> None:
        flight = self.scheduler.flight
        chunks = [
            (chunk, chunk.slots.index(slot)) for slot in slots.tolist() for chunk in [self.scheduler.chunk_of[slot]]
        ]
        recursions = flight.rows[RECURSION, slots].tolist()
        for (chunk, row), recursion in zip(chunks, recursions, strict=True):
            self.write(chunk, recursion, row)
        for (chunk, row), recursion in zip(chunks, recursions, strict=True):
            for spec in self.tables:
                if 0 <= spec.recursion <= recursion:
                    self.read(chunk, spec.recursion, row)

    def leave(self, chunk: Chunk) -> None:
        depths = self.scheduler.flight.rows[DEPTH, chunk.slots].tolist()
        assert depths == [self.depth(chunk, row) for row in range(chunk.length)], "left the core too early"
        for spec in self.tables:
            if spec.recursion == EVERY_TOKEN:
                for row in range(chunk.length):
                    self.read(chunk, EVERY_TOKEN, row)

    def answer(self, batch: ScheduledBatch) -> None:
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if sequence.state == "resident" and not sequence.unread:
                sequence.tokens.append(hash(tuple(sequence.tokens)) % 3)
                if len(sequence.tokens) == self.targets[sequence.number]:
                    self.scheduler.remove(sequence)

    def launch(self, chunk: Chunk, recursion: int, row: int) -> tuple[str, int, dict[int, int]]:
        """Pool, page table and columns of what the scheduler says about a row in the table of a recursion."""
        number = next(number for number, spec in enumerate(self.tables) if spec.recursion == recursion)
        columns = self.scheduler.flight.launch(np.array([chunk.slots[row]]), number, True, -1, WINDOW)[:, 0].tolist()
        return self.tables[number].pool, number, dict(enumerate(columns))

    def write(self, chunk: Chunk, recursion: int, row: int) -> None:
        if any(spec.recursion == recursion for spec in self.tables):
            pool, number, columns = self.launch(chunk, recursion, row)
            page, offset = divmod(columns[ADDRESS], self.options.page_size)
            assert self.scheduler.book.pools[pool].ref_counts[page] > 0
            assert page in chunk.sequence.tables[number].pages
            self.pages[pool, page, offset] = [*self.stored(chunk.sequence, recursion)][chunk.start + row]

    def read(self, chunk: Chunk, recursion: int, row: int) -> None:
        size = self.options.page_size
        pool, number, columns = self.launch(chunk, recursion, row)
        seen = chunk.start + row + 1
        stored = [*self.stored(chunk.sequence, recursion)][:seen]
        wanted, near = ([each for each in stored[first:] if each] for first in (0, max(0, seen - WINDOW)))
        pages = self.scheduler.flight.pages[columns[OWNER]].tolist()
        held = chunk.sequence.tables[number].pages
        assert pages[: len(held)] == held, "the array of page tables follows the book"
        found = [self.pages[pool, pages[entry // size], entry % size] for entry in range(columns[END])]
        assert found == wanted, "a row must see exactly the entries of its sequence that reached its depth"
        assert found[columns[BEGIN] :] == near, "and in a sliding window those of the last positions"

    def check(self) -> None:
        """Each page's reference count equals its users; every slot is free or belongs to one chunk."""
        scheduler = self.scheduler
        ref_counts: dict[tuple[str, int], int] = {}
        for sequence in scheduler.residents:
            for spec, table in zip(self.tables, sequence.tables, strict=True):
                for page in table.pages:
                    ref_counts[spec.pool, page] = ref_counts.get((spec.pool, page), 0) + 1
        for block in scheduler.prefixes.blocks.values():
            for spec, pages in zip(self.tables, block.pages, strict=True):
                for page in pages:
                    ref_counts[spec.pool, page] = ref_counts.get((spec.pool, page), 0) + 1
        for name, pool in scheduler.book.pools.items():
            assert pool.ref_counts == [ref_counts.get((name, page), 0) for page in range(len(pool.ref_counts))]
            assert sorted(pool.free) == [page for page, count in enumerate(pool.ref_counts) if count == 0]
        chunks = [sequence.chunk for sequence in scheduler.residents if sequence.chunk is not None]
        assert sorted(chunks, key=id) == sorted(scheduler.in_core + scheduler.leaving, key=id)
        slots = [slot for chunk in chunks for slot in chunk.slots] + scheduler.free_slots
        assert sorted(slots) == list(range(self.options.num_slots))
        seats = [sequence.seat for sequence in scheduler.residents] + scheduler.free_seats
        assert sorted(seats) == list(range(self.options.max_resident))
        assert all(chunk.length > 1 for chunk in scheduler.long)
        assert {*scheduler.long} == {chunk for chunk in scheduler.in_core if chunk.length > 1}
        assert len(scheduler.residents) <= self.options.max_resident
        blocks = scheduler.prefixes.blocks.values()
        assert not any(block.parent is not None and block.parent.dropped for block in blocks), "nobody can find it"
        assert {*scheduler.prefixes.leaves} == {block.number for block in blocks if not block.num_children}
        # Only those that wait for their leader are overtaken.
        waiting = [sequence.number for sequence in scheduler.waiting if sequence.leader is None]
        if scheduler.residents and waiting:
            assert max(sequence.number for sequence in scheduler.residents) < min(waiting)

    def finish_all(self) -> None:
        """Run until there is nothing to do, and keep the prefix cache."""
        while self.step():
            pass

    def finish(self) -> None:
        """Run until every admitted request has finished; then no page or slot may be held."""
        for _ in range(20_000):
            if not self.step():
                break
        assert not self.scheduler.has_work
        assert all(sequence.state == "gone" for sequence in self.everyone)
        while self.scheduler.prefixes.drop_oldest():
            pass
        self.check()
        assert all(len(pool.free) == len(pool.ref_counts) for pool in self.scheduler.book.pools.values())


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    tables = draw(st.sampled_from(sorted(TABLES)))
    options = EngineOptions(
        page_size=draw(st.integers(1, 5)),
        policy=draw(st.sampled_from(POLICIES)),
        hold=draw(st.integers(1, 4)),
        max_resident=draw(st.integers(1, 6)),
        max_rows=draw(st.integers(1, 12)),
        chunk_size=draw(st.integers(1, 7)),
        prefill_budget=draw(st.integers(0, 9)),
        prefix_caching=draw(st.booleans()),
    )
    noise = draw(st.none() | st.builds(random.Random, st.integers(0, 99)))
    return Memory(options, tables, {spec.pool: draw(st.integers(4, 60)) for spec in TABLES[tables]}, noise)


@settings(max_examples=150, deadline=None)
@given(memory=memories(), seed=st.integers(0, 2**32), num_sequences=st.integers(1, 12))
def test_any_traffic(memory: Memory, seed: int, num_sequences: int) -> None:
    """Prompts with shared prefixes that arrive, finish and abort at random times, in memory too small for all."""
    rng = random.Random(seed)
    text = [rng.randrange(3) for _ in range(20)]
    for _ in range(num_sequences):
        prompt = text[: rng.randrange(1, 14)] + [rng.randrange(3) for _ in range(rng.randrange(3))]
        leader = rng.choice(memory.everyone) if memory.everyone and rng.random() < 0.2 else None
        max_depth = rng.randrange(1, NUM_RECURSIONS + 1)
        depths = [rng.randrange(max_depth + 1) for _ in range(rng.choice([0, 0, len(prompt)]))]
        memory.submit(prompt, rng.randrange(1, 9), max_depth, leader, depths)
        for _ in range(rng.randrange(6)):
            alive = [sequence for sequence in memory.everyone if sequence.state != "gone"]
            given_up = rng.choice(alive) if alive and rng.random() < 0.1 else None
            memory.step(abort_inside=given_up if rng.random() < 0.5 else None)
            if given_up is not None and given_up.state != "gone":
                memory.scheduler.remove(given_up)
                memory.check()
    memory.finish()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_oldest_is_never_interrupted_and_the_others_take_turns(policy: Policy) -> None:
    memory = Memory(EngineOptions(policy, page_size=2, max_rows=8), "recursion_wise", {"edge": 14, "core": 30})
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
    memory = Memory(EngineOptions(page_size=4), "recursion_wise", {"edge": 99, "core": 299})
    prompt = [0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 2]
    memory.submit(prompt, 3, 3)
    for _ in range(3):
        memory.submit(prompt, 3, 3, leader=memory.everyone[0])
    memory.submit(prompt, 3, 2)
    memory.finish()
    assert [sequence.cached_tokens for sequence in memory.everyone] == [0, 8, 8, 8, 0]


def test_a_leader_is_waited_for_by_its_followers_alone() -> None:
    """While it reads a long prompt, requests that came after them start; then they are the first to start."""
    options = EngineOptions(page_size=4, chunk_size=4, max_resident=3)
    memory = Memory(options, "recursion_wise", {"edge": 99, "core": 299})
    memory.submit([0, 1, 2] * 9, 6, 3)
    leader = memory.everyone[0]
    for _ in range(2):
        memory.submit([0, 1, 2] * 9, 2, 3, leader=leader)
    for number in range(5):
        memory.submit([number % 3, 2], 1 if number < 4 else 9, 3)
    started: dict[int, int] = {}
    while memory.step():
        for sequence in memory.everyone:
            if sequence.state != "waiting":
                started.setdefault(sequence.number, leader.num_read)
    assert started[3] == started[4] == 0
    assert max(started[5], started[6]) < 27 <= min(started[1], started[2])
    order = list(started)
    assert order.index(1) < order.index(2)
    assert [sequence.cached_tokens for sequence in memory.everyone[:3]] == [0, 24, 24]
    memory.finish()


def test_what_is_read_again_was_not_cached() -> None:
    memory = Memory(EngineOptions(page_size=4), "recursion_wise", {"edge": 99, "core": 299})
    memory.submit([0, 1, 2, 2, 1, 0, 0, 2, 1], 5, 3)
    while memory.everyone[0].num_new < 2:
        assert memory.step()
    memory.scheduler.preempt(memory.everyone[0])
    memory.step()
    assert memory.everyone[0].num_read == 8, "it found its own blocks"
    memory.finish()
    assert memory.everyone[0].cached_tokens == 0, "as the client was told at first"


@pytest.mark.parametrize("place", range(8))
def test_a_prefix_belongs_to_its_depths(place: int) -> None:
    """Two sequences read one prefix at the same time and differ in the depth of one token: both are kept.

    A third sequence continues from one of them, and the second, preempted, from its own. `read` checks what they see.
    """
    depths = [1, 2, 1, 1, 2, 2, 1, 1]
    other = [depth if index != place else 3 - depth for index, depth in enumerate(depths)]
    memory = Memory(EngineOptions(page_size=4, chunk_size=4), "recursion_wise", {"edge": 99, "core": 299})
    prompt = [0, 1, 2, 2, 1, 0, 0, 2, 1]
    for chosen in (depths, other):
        memory.submit(prompt, 9, 3, depths=chosen)
    while any(sequence.num_read < 10 for sequence in memory.everyone):
        assert memory.step()
    # A difference in the first block makes two chains, one in the second a fork.
    assert len(memory.scheduler.prefixes.blocks) == (4 if place < 4 else 3)
    memory.scheduler.preempt(memory.everyone[1])
    memory.submit(prompt, 9, 3)
    memory.finish_all()
    assert memory.everyone[1].depths[:8] == other
    assert memory.everyone[2].depths[:8] in (depths, other)
    assert memory.everyone[2].cached_tokens == 8
    memory.finish()


SHARED = [0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 2, 0, 1]


class Traffic:
    """Sequences that begin alike."""

    def __init__(self, memory: Memory, rng: random.Random) -> None:
        self.memory, self.rng, self.scheduler = memory, rng, memory.scheduler

    def submit(
        self, count: int = 1, length: int = 13, new: int = 4, max_depth: int = 3, leader: SequenceState | None = None
    ) -> None:
        for _ in range(count):
            self.memory.submit(SHARED[:length], new, max_depth, leader)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.memory.step()

    def preempt(self) -> None:
        """The youngest, as the scheduler does it."""
        if self.scheduler.residents:
            self.scheduler.preempt(max(self.scheduler.residents, key=lambda sequence: sequence.number))

    def read(self, number: int, count: int) -> SequenceState:
        """Run until a sequence has read so many tokens."""
        sequence = self.memory.everyone[number]
        while sequence.num_read < count and sequence.state != "gone":
            assert self.memory.step()
        return sequence


class Scenarios(Traffic):
    """What happens to them while a noisy router fills the prefix cache."""

    def followers_of_an_aborted_leader(self) -> None:
        self.submit()
        self.submit(3, leader=self.memory.everyone[0])
        self.scheduler.remove(self.read(0, 5))
        self.submit(2)

    def preempted_again_and_again(self) -> None:
        self.submit(4)
        for _ in range(8):
            self.run(3)
            self.preempt()
        self.submit(2)

    def the_variant_in_use_is_dropped(self) -> None:
        self.submit(3, new=9)
        self.read(2, 13)
        for _ in range(self.rng.randint(1, 4)):
            self.scheduler.prefixes.drop_oldest()
        self.submit(2)

    def a_dropped_parent_is_made_again(self) -> None:
        self.submit(new=20)
        self.read(0, 13)
        while self.scheduler.prefixes.drop_oldest():
            pass
        self.submit(2)
        self.read(2, 13)
        self.preempt()

    def other_bounds(self) -> None:
        for _ in range(2):
            for max_depth in (1, 2, 3):
                self.submit(max_depth=max_depth)
            self.run(9)

    def every_length_around_a_page(self) -> None:
        for _ in range(2):
            for length in range(1, 13):
                self.submit(length=length, new=2)
            self.run(20)
            self.preempt()

    def an_answer_becomes_a_prompt(self) -> None:
        self.submit(2, length=8, new=9)
        first = self.read(0, 14)
        self.memory.submit(first.tokens[:14], 3, 3)
        self.preempt()
        self.memory.submit(first.tokens[:12], 5, 3)

    def preempted_inside_a_block(self) -> None:
        self.submit(2)
        self.read(1, 6)
        self.preempt()
        self.submit(2)
        self.read(3, 11)
        self.preempt()

    def aborts_inside_batches(self) -> None:
        self.submit(3)
        self.submit(3, leader=self.memory.everyone[1])
        for number in (0, 1, 3):
            self.run(4)
            self.memory.step(abort_inside=self.memory.everyone[number])
            self.submit()

    def a_replay_beside_newcomers(self) -> None:
        self.submit(new=9)
        self.read(0, 15)
        self.preempt()
        while self.scheduler.prefixes.drop_oldest():
            pass
        self.submit(3, length=12)


SCENARIOS = [name for name in vars(Scenarios) if not name.startswith("_")]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_noise_poisons_no_prefix(scenario: str) -> None:
    """Whatever a router decides by chance, a sequence reads what was stored for its own tokens and their depths."""
    cached, variants = 0, 0
    for number in range(15):
        rng = random.Random(number)
        size = 1 + number % 5
        options = EngineOptions(
            POLICIES[number % 3],
            hold=1 + number % 2,
            page_size=size,
            chunk_size=(1, size, size + 1, 7)[number % 4],
            max_resident=2 + number % 5,
            max_rows=14,
        )
        few = {"edge": 40 // size + 6, "core": 120 // size + 9}
        memory = Memory(options, sorted(TABLES)[number // 3 % 3], few if number % 2 else {"edge": 99, "core": 299}, rng)
        getattr(Scenarios(memory, rng), scenario)()
        memory.finish_all()
        variants = max([variants, *map(len, memory.scheduler.prefixes.variants.values())])
        cached += sum(sequence.cached_tokens or 0 for sequence in memory.everyone)
        memory.finish()
    assert cached > 0
    assert variants > 1


def test_depths_share_launches_only_where_they_should() -> None:
    mixed = {}
    for policy in POLICIES:
        memory = Memory(EngineOptions(policy, page_size=4), "recursion_wise", {"edge": 99, "core": 299})
        for number in range(8):
            memory.submit([number % 3, number // 3, 1], 6, 3)
        mixed[policy] = 1
        while memory.scheduler.has_work:
            if not memory.scheduler.at_boundary() and memory.scheduler.in_core:
                recursions = memory.scheduler.flight.rows[RECURSION, memory.scheduler.core]
                mixed[policy] = max(mixed[policy], len({*recursions.tolist()}))
            memory.step()
    assert mixed == {"full": 1, "shrink": 1, "depthwise": 3}


def test_exits_are_held() -> None:
    """With hold k, k core batches run between boundaries while there are rows in the core."""
    memory = Memory(EngineOptions(page_size=4, hold=2), "recursion_wise", {"edge": 99, "core": 299})
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


def test_the_least_recently_used_prefix_is_dropped_first() -> None:
    """Finding a prefix counts as use; a block goes before its parent."""
    memory = Memory(EngineOptions(page_size=2), "recursion_wise", {"edge": 99, "core": 299})
    first, second, third = ([token] * 5 for token in range(3))
    for prompt in (first, second, third, first):
        memory.submit(prompt, 1, 3)
        memory.finish_all()
    prefixes = memory.scheduler.prefixes
    assert [len(prefixes.find(prompt, 3)) for prompt in (second, third, first)] == [2, 2, 2]
    assert len(prefixes.find(first[:4], 3)) == 1  # the last token must be read: it predicts the first new one
    cached = []
    for _ in range(3):
        assert prefixes.drop_oldest()
        # Looked up in a copy of the order, as looking up is a use.
        cached.append([sum(block.key[1] == (token,) * 2 for block in prefixes.blocks.values()) for token in range(3)])
    assert cached == [[2, 1, 2], [2, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("entries", [1, 2, 3, 4])
def test_a_page_that_isn_t_full_is_copied(entries: int) -> None:
    """Two sequences that go on from the same prefix write to it."""
    book = PageBook(4, [TableSpec("core", 0)], {"core": 9})
    cache, table, adopted = PrefixCache(book), PageTable(), PageTable()
    book.reserve([table], 4, 3)
    table.length = entries
    page = table.pages[0]
    block = cache.insert(None, [5, 6, 7, 8], [1] * entries + [0] * (4 - entries), 3, [table])
    partial = cache.adopt([block], [adopted])
    assert adopted.length == entries
    assert (adopted.pages, partial) == (([page], []) if entries == 4 else ([], [("core", page, adopted)]))


def test_decoding_comes_before_prompts() -> None:
    """With room for four tokens, a long prompt beside it delays no token of an answer that is being decoded."""

    def entries(prompts: list[list[int]]) -> list[int]:
        memory = Memory(
            EngineOptions(page_size=4, max_rows=4, chunk_size=4), "recursion_wise", {"edge": 99, "core": 299}
        )
        memory.submit([1], 9, 3)
        memory.step()
        for prompt in prompts:
            memory.submit(prompt, 1, 3)
        entered = []
        while memory.everyone[0].state != "gone":
            assert memory.step()
            entered.append(len(memory.everyone[0].tokens))
        return sorted({entered.count(length) for length in range(2, 9)})

    alone, beside = entries([]), entries([[0] * 40])
    assert max(beside) <= max(alone) + 4  # the batches of one prompt chunk at most


def test_prompts_enter_a_budget_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions("shrink", prefill_budget=6, chunk_size=5)
    memory, chunks = Memory(options, "recursion_wise", {"edge": 99, "core": 299}), list[tuple[int, int, int]]()
    enter = memory.enter

    def noted(chunk: Chunk) -> None:
        chunks.append((chunk.sequence.number, chunk.start, chunk.length))
        enter(chunk)

    monkeypatch.setattr(memory, "enter", noted)
    for number in range(3):
        memory.submit([number] * 8, 1, 3)
    memory.finish()
    # The oldest first: a row for each batch.
    assert chunks == [
        *((0, 0, 5), (1, 0, 1)),
        *((0, 5, 3), (1, 1, 3)),
        *((1, 4, 4), (2, 0, 2)),
        (2, 2, 5),
        (2, 7, 1),
    ]


def test_answers_are_not_on_the_budget_of_prompts() -> None:
    """A prompt enters as many tokens at a time, whatever is decoded beside it."""
    options = EngineOptions("shrink", prefill_budget=2, chunk_size=5)
    memory = Memory(options, "recursion_wise", {"edge": 99, "core": 299})
    for number in range(3):
        memory.submit([number], 20, 3)
    while any(sequence.num_new < 2 for sequence in memory.everyone):
        assert memory.step()
    memory.submit([2] * 7, 3, 3)
    read = [0]
    while read[-1] < 7:
        assert memory.step()
        read += [memory.everyone[3].num_read] if memory.everyone[3].num_read > read[-1] else []
    assert read == [0, 2, 4, 6, 7]
    memory.finish()


def test_newcomers_leave_the_residents_their_next_page() -> None:
    """Without spare pages newcomers and residents would preempt each other in turns: nine times and more, here."""
    for pages in (8, 10, 12):
        options = EngineOptions(page_size=2, max_rows=16, prefix_caching=False)
        memory = Memory(options, "recursion_wise", {"edge": pages, "core": 3 * pages})
        for number in range(6):
            memory.submit([number % 3, number // 3, 1, 0], 12, 3)
        memory.finish()
        assert memory.scheduler.num_preempted <= 7


def test_the_scheduler_imports_no_torch() -> None:
    code = "import sys, megamor.serve.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
