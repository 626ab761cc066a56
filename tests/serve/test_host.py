"""What the host does for a core launch: dispatched operations, and seconds of scheduling, building and reading."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamor.errors import ConfigError
from megamor.model import build_model
from megamor.routing.plan import Incoming
from megamor.serve.engine import attention
from megamor.serve.engine.cache import MOST_CHANGES
from megamor.serve.engine.engine import ServingEngine, can_record, kv_bytes
from megamor.serve.engine.flight import Marks, ScheduledBatch
from megamor.serve.engine.request import SamplingParams
from megamor.serve.engine.runner import IncomingMarks
from megamor.serve.options import CPU_BYTES, EngineOptions
from tests.combinations import ROUTERS, SERVED_ROUTERS, tiny_config
from tests.serve.test_equality import SERVED, call_again

MOST_OPERATIONS = 12


class Counter(TorchDispatchMode):
    """Counts the operations that are dispatched, except in `ignored` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.depth = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.depth == 0
        return op(*args, **(kwargs or {}))

    @contextmanager
    def ignored(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1


def engine_of(router: str, kv_policy: str, residents: int, read_late: bool | None = None) -> ServingEngine:
    """All residents decode long texts."""
    config = tiny_config(ROUTERS[router], kv_policy)
    config = replace(config, model=replace(config.model, max_seq_len=128), data=replace(config.data, seq_len=128))
    options = EngineOptions(
        max_resident=residents, hold=1, kv_memory=1 << 26, prefix_caching=False, read_late=read_late
    )
    engine = ServingEngine(build_model(config), options)
    for seed in range(residents):
        engine.add_request([seed % 97] * 8, SamplingParams(max_tokens=100, seed=seed, ignore_eos=True))
    return engine


def decodes(engine: ServingEngine, width: int, step: Callable[[], object]) -> bool:
    """Run `step`, which takes one step of `engine`; whether it was a core launch of `width` rows."""
    before = engine.accounting.total.width_counts[width]
    step()
    return engine.accounting.total.width_counts[width] > before


@pytest.mark.parametrize("router", SERVED_ROUTERS)
def test_a_replayed_launch_dispatches_few_operations(router: str) -> None:
    """Whatever the router does is in the graph, whose replay is one launch."""
    counter, counts = Counter(), list[int]()

    def record(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], object]]:
        kept, again = call_again(run)

        def replay() -> None:
            with counter.ignored():
                again()

        return kept, replay

    engine = engine_of(router, SERVED[SERVED_ROUTERS.index(router) % 2], 5)
    engine.record_graphs(record)

    def step() -> None:
        counter.count = 0
        with counter:
            engine.step()

    while len(counts) < 20:
        if decodes(engine, 5, step):
            counts.append(counter.count)
    assert 0 < max(counts) <= MOST_OPERATIONS


@pytest.mark.parametrize(("router", "entry_reads"), [("token_choice", []), ("skip_forward_recurse", ["read"])])
def test_the_host_queues_a_cycle_before_it_reads_its_tokens(
    router: str, entry_reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are read while the next core batch runs. Only routers that decide about the first recursion make it wait
    sooner."""
    events = list[str]()

    def noted(owner: Any, name: str, event: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (events.append(event), function(*args))[1])

    noted(Incoming, "tolist", "read")
    engine = engine_of(router, "recursion_wise", 5, read_late=True)
    engine.record_graphs(call_again)
    for kind in ("enter", "core", "exit"):
        noted(engine.runner, kind, kind)
    while engine.accounting.total.launches["core"] < 60:
        engine.step()
        if engine.accounting.total.launches["core"] < 10:
            events.clear()  # while prompts are read
    cycle = ["exit", "enter", *entry_reads, "core", "read", "read"]
    after = events[events.index("exit") :][: 8 * len(cycle)]
    assert after == 8 * cycle
    # Read at once, the tokens of an exit are known before anything else begins.
    engine = engine_of(router, "recursion_wise", 5, read_late=False)
    events.clear()
    while not engine.accounting.total.generated_tokens:
        events.append("step")
        engine.step()
    assert events[-3:] == ["step", "read", "read"]  # a prompt, and whether its rows are numbers


@pytest.mark.parametrize("in_graph", [False, True])
def test_page_tables_on_a_device_follow_the_hosts(in_graph: bool) -> None:
    """Few changes and many, again and again, also where a graph applies the last ones twice."""
    engine = engine_of("token_choice", "recursion_wise", 4)
    cache, flight = engine.runner.cache, engine.scheduler.flight
    cache.device = SimpleNamespace(type="a device")  # type: ignore[assignment]
    cache.tables = torch.zeros(flight.pages.shape, dtype=torch.int64)
    cache.tensor = lambda numbers: torch.from_numpy(numbers.copy())  # type: ignore[method-assign, union-attr]
    draw = np.random.default_rng(0)
    for count in (3, 1, MOST_CHANGES + 5, 2, MOST_CHANGES, MOST_CHANGES * 2, 0, 1):
        for _ in range(count):
            flight.set_pages(draw.integers(4), draw.integers(4), draw.integers(1, 9, 8).tolist(), draw.integers(8))
        cache.send_tables(in_graph)
        cache.apply_changes()
        assert np.array_equal(cache.tables.numpy(), flight.pages)
        cache.send_tables(in_graph)
        cache.apply_changes()
        assert np.array_equal(cache.tables.numpy(), flight.pages)


def idle_engine(read_late: bool) -> ServingEngine:
    """With room for eight sequences."""
    engine = engine_of("token_choice", "recursion_wise", 8, read_late)
    for request in [*engine.requests]:
        engine.abort(request)
    return engine


def test_tokens_that_are_read_late_cost_no_row() -> None:
    """A sequence that has its last token doesn't enter again, although nobody has read the token yet."""
    rows = []
    for late in (False, True):
        engine = idle_engine(late)
        engine.add_request([1] * 8, SamplingParams(max_tokens=5, ignore_eos=True, temperature=0))
        while engine.has_work:
            engine.step()
        rows.append(engine.stats().rows["entry"])
    assert rows == [8 + 4] * 2


@pytest.mark.parametrize("late", [False, True])
def test_what_ends_while_its_token_is_on_the_way(late: bool) -> None:
    """A continuation that is given up is not answered; one without a token (NaN) ends its request alone."""
    engine = idle_engine(late)
    failing = SamplingParams(
        max_tokens=9, ignore_eos=True, logits_processor=lambda tokens, x: x if len(tokens) < 11 else x * float("nan")
    )
    both = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0, n=2)
    failed, given_up, other = (engine.add_request([5] * 8, p) for p in (failing, both, both))
    answers = dict[tuple[int, int], int]()
    while engine.has_work:
        drawn = (
            {chunk.sequence.request: chunk.sequence.num_new for chunk in engine.drawn.chunks} if engine.drawn else {}
        )
        if drawn.get(given_up) == 4 + late:  # with the place of the token that is on the way
            engine.abort(given_up, 0)
        for output in engine.step():
            assert output.error is None or output.request == failed
            answers[output.request, output.index] = answers.get((output.request, output.index), 0) + len(output.tokens)
    assert answers[failed, 0] == 3
    assert (answers[given_up, 0], answers[given_up, 1]) == (4 if late else 9, 9)
    assert answers[other, 0] == answers[other, 1] == 9


def test_a_router_that_hashes_the_text_needs_the_tokens_at_once() -> None:
    assert engine_of("token_choice", "recursion_wise", 1, read_late=True).reads_late
    assert not engine_of("random", "recursion_wise", 1, read_late=True).reads_late


def fastest(function: Callable[[], object], times: int = 300) -> float:
    """Seconds of the fastest of several calls."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@pytest.mark.slow
def test_microseconds_of_a_launch_on_the_host() -> None:
    """64 rows that decode: what isn't a block or the router, each part at its fastest.

    On a quiet x86 core this takes 110 to 150 µs; the bound leaves room for neighbours. Between the blocks of a real
    launch the caches are cold, and the same work takes two to three times as long.
    """
    engine, completed, threads = (
        engine_of("expert_choice", "recursion_wise", 64),
        list[float](),
        torch.get_num_threads(),
    )
    scheduler, cache, complete = engine.scheduler, engine.runner.cache, engine.scheduler.complete

    def timed(batch: ScheduledBatch, kept: Marks | None = None, checked: bool = True) -> None:
        begin = time.perf_counter()
        complete(batch, kept, checked)
        if batch.kind == "core" and len(batch.slots) == 64:
            completed.append(time.perf_counter() - begin)

    scheduler.complete = timed  # type: ignore[method-assign]
    torch.set_num_threads(1)
    try:
        while len(completed) < 60 or scheduler.at_boundary() or len(scheduler.core) < 64:
            engine.step()
        batch = scheduler.next()
        assert batch is not None

        def build() -> None:
            numbers = engine.runner.core_numbers(batch.slots, 0)
            rows = cache.rows(numbers)
            engine.runner.group_by_depth(batch, rows, numbers)
            cache.block_call(rows, numbers, cache.nowhere["core"])

        def schedule() -> None:
            scheduler.running = None
            scheduler.next()
            engine.accounting.count(batch, 1.0)

        with torch.inference_mode():
            parts = [fastest(build), fastest(schedule), min(completed)]
            outcomes = [(40, torch.ones(40) > 0), (20, torch.ones(20) > 0)]
            parts.append(fastest(lambda: IncomingMarks(64, outcomes).read()))
    finally:
        torch.set_num_threads(threads)
    assert len(batch.depths) == 3
    assert sum(parts) <= 250e-6, parts


def test_graphs_need_the_kernel_that_reads_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in (True, False):
        monkeypatch.setattr(attention, "TRITON", installed)
        assert can_record(torch.device("cuda")) == installed
        assert not can_record(torch.device("cpu"))


def test_memory_for_keys_and_values() -> None:
    cpu = torch.device("cpu")
    assert kv_bytes(0.0, cpu) == CPU_BYTES
    assert kv_bytes(12345, cpu) == 12345
    with pytest.raises(ConfigError, match=r"kv_memory = 80% .* give bytes"):
        kv_bytes(0.8, cpu)


def test_a_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gpu = torch.device("cuda")
    assert (kv_bytes(0.0, gpu), kv_bytes(0.5, gpu), kv_bytes(300, gpu)) == (800, 500, 300)
