"""Metrics for Prometheus. Names end like vLLM's, so its dashboards work with a new prefix."""

from __future__ import annotations

from collections import Counter as Counts
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from megamor.serve.engine.request import EngineStats
from megamor.serve.http.completions import CompletionRun

PREFIX = "megamor"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
WINDOW_SECONDS, SLOT_SECONDS = 120, 5
_TOKENS = tuple(2**power for power in range(16))

F = TypeVar("F", GaugeMetricFamily, CounterMetricFamily)


class Monitoring(Collector):
    """Counts requests as they end, and collects the engine's statistics at each scrape."""

    def __init__(self) -> None:
        self.stats, self.queued, self.running = EngineStats(), 0, 0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._latencies = {
            "TTFT": self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS),
            "ITL": self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", _SECONDS),
            "E2E": self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS),
        }
        # The newest slots of time, the oldest first: its number, and by measure how many were of about so many seconds.
        self._recent: deque[tuple[int, dict[str, Counts[float]]]] = deque(maxlen=WINDOW_SECONDS // SLOT_SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generated = self._histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        self._success = self._counter("request_success", "Finished choices, by finish reason.", "finished_reason")
        self._failed = self._counter("request_failure", "Requests without an answer, by HTTP status.", "status")

    def finished(self, run: CompletionRun, ended: float) -> None:
        """Count a request that was answered at `ended` (monotonic seconds)."""
        times = [choice.times for choice in run.choices]
        measured = {
            "TTFT": [each[0] - run.arrived for each in times if each],
            "ITL": [after - before for each in times for before, after in pairwise(each)],
            "E2E": [ended - run.arrived],
        }
        slot = int(ended // SLOT_SECONDS)
        if not self._recent or self._recent[-1][0] != slot:
            self._recent.append((slot, {name: Counts() for name in measured}))
        for name, values in measured.items():
            for seconds in values:
                self._latencies[name].observe(seconds)
            self._recent[-1][1][name].update(float(f"{seconds:.2g}") for seconds in values)
        self._prompt.observe(run.usage.prompt_tokens)
        self._generated.observe(run.usage.completion_tokens)
        for choice in run.choices:
            self._success.labels(choice.finish_reason or "abort").inc()

    def recent_latencies(self, now: float) -> dict[str, Counts[float]]:
        """By measure, how many took about so many seconds, to two digits, in requests that ended in the last minutes.

        Counts of several servers can be added, which percentiles can't.
        """
        oldest = (now - WINDOW_SECONDS) // SLOT_SECONDS
        slots = [counts for slot, counts in self._recent if slot > oldest]
        return {name: sum((counts[name] for counts in slots), Counts()) for name in self._latencies}

    def failed(self, status: int) -> None:
        """Count a request that was refused, failed or abandoned by its client (499)."""
        self._failed.labels(str(status)).inc()

    def exposition(self, stats: EngineStats, queued: int, running: int) -> bytes:
        """All metrics in Prometheus' text format."""
        self.stats, self.queued, self.running = stats, queued, running
        return generate_latest(self.registry)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        """The engine's statistics; called by the registry."""
        stats = self.stats
        yield _gauge("num_requests_running", "Requests that are being answered.", self.running - self.queued)
        yield _gauge("num_requests_waiting", "Requests without any output yet.", self.queued)
        yield _gauge("num_sequences_resident", "Sequences that hold pages.", stats.resident)
        yield _gauge("num_sequences_waiting", "Sequences that wait for pages, preempted ones included.", stats.waiting)
        yield _gauge("num_held_exits", "Tokens that wait for the exit layers.", stats.held_exits)
        yield _gauge("num_tokens_in_core", "Tokens about to take a recursion.", _by_depth(stats.in_core), "recursion")
        used = {pool: stats.pages_used[pool] / max(total, 1) for pool, total in stats.pages_total.items()}
        yield _gauge("kv_cache_usage_perc", "Fraction of the pages in use, 1 is all.", used, "pool")
        yield _gauge("kv_pages", "Pages in total.", stats.pages_total, "pool")
        yield _gauge("kv_pages_used", "Pages that sequences hold.", stats.pages_used, "pool")
        yield _gauge("kv_pages_cached", "Pages that only the prefix cache holds.", stats.pages_cached, "pool")
        yield _gauge("kv_pages_by_depth", "Pages of the core, by depth.", _by_depth(stats.pages_by_depth), "depth")
        yield _count("prompt_tokens", "Prompt tokens read.", stats.prompt_tokens)
        yield _count("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cached_prompt_tokens)
        yield _count("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens)
        yield _count("generation_tokens", "Tokens generated.", stats.generated_tokens)
        yield _count("num_preemptions", "Sequences that had to give up their pages.", stats.preemptions)
        yield _count("rows_saved", "Further core rows that full depth would have taken.", stats.rows_saved)
        yield _count("launches", "Batches run.", stats.launches, "kind")
        yield _count("launch_rows", "Rows of all batches.", stats.rows, "kind")
        yield _count("engine_seconds", "Time spent.", stats.seconds, "kind")
        depths = dict(enumerate(stats.depth_counts))
        yield _distribution("exit_depth", "Recursions that a token took.", depths)
        yield _distribution("core_launch_width", "Rows of a core batch.", stats.width_counts)
        yield _distribution("core_launch_depths", "Different depths in a core batch.", stats.mixed_depths)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, [label], registry=self.registry)


def _by_depth(values: list[int]) -> dict[str, int]:
    return {str(number): value for number, value in enumerate(values, start=1)}


def _gauge(name: str, text: str, value: float | Mapping[str, float], label: str = "") -> GaugeMetricFamily:
    return _filled(GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=[label] if label else ()), value)


def _count(name: str, text: str, value: float | Mapping[str, float], label: str = "") -> CounterMetricFamily:
    return _filled(CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label] if label else ()), value)


def _filled(family: F, value: float | Mapping[str, float]) -> F:
    """`family` with one sample, or with one for each value of its label."""
    for key, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
        family.add_metric([] if key is None else [key], number)
    return family


def _distribution(name: str, text: str, counts: Mapping[int, int]) -> HistogramMetricFamily:
    """A histogram of whole numbers, with bounds at the powers of two and at small numbers."""
    bounds = sorted({0, 1, 2, 3, 4, 6, *(2**power for power in range(3, 13))})
    buckets: list[tuple[str, float]] = [
        (str(float(bound)), sum(count for value, count in counts.items() if value <= bound)) for bound in bounds
    ]
    buckets.append(("+Inf", sum(counts.values())))
    total = sum(value * count for value, count in counts.items())
    return HistogramMetricFamily(f"{PREFIX}_{name}", text, buckets=buckets, sum_value=total)
