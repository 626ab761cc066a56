"""Figures of the server for Prometheus. Names end like vLLM's: dashboards made for it need a new prefix only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from megamor.serve.engine.request import EngineStats
from megamor.serve.http.completions import CompletionRun

PREFIX = "megamor"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = tuple(2**power for power in range(16))


class Monitoring:
    """Counts requests as they end, and shows the engine's figures as they are at each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = _EngineCollector()
        self.registry.register(self.engine)
        histogram = self._histogram
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between the tokens of a request.", _SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        self._success = Counter(
            f"{PREFIX}_request_success",
            "Choices answered, by reason of their end.",
            ["finished_reason"],
            registry=self.registry,
        )
        self._failed = Counter(
            f"{PREFIX}_request_failure", "Requests not answered, by HTTP status.", ["status"], registry=self.registry
        )

    def finished(self, run: CompletionRun, ended: float) -> None:
        """Count an answered request that ended at `ended` (monotonic seconds)."""
        for choice in run.choices:
            if choice.times:
                self._first.observe(choice.times[0] - run.arrived)
            for before, after in pairwise(choice.times):
                self._between.observe(after - before)
        self._whole.observe(ended - run.arrived)
        self._prompt.observe(run.usage.prompt_tokens)
        self._generated.observe(run.usage.completion_tokens)
        for choice in run.choices:
            self._success.labels(choice.finish_reason or "abort").inc()

    def failed(self, status: int) -> None:
        """Count a request that was refused, failed or abandoned (499)."""
        self._failed.labels(str(status)).inc()

    def exposition(self, stats: EngineStats, queued: int, running: int) -> bytes:
        """Everything in Prometheus' text format."""
        self.engine.stats, self.engine.queued, self.engine.running = stats, queued, running
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)


class _EngineCollector(Collector):
    """The engine's snapshot in Prometheus' terms."""

    def __init__(self) -> None:
        self.stats, self.queued, self.running = EngineStats(), 0, 0

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        stats = self.stats
        yield _gauge("num_requests_running", "Requests that are being answered.", self.running - self.queued)
        yield _gauge("num_requests_waiting", "Requests without any output yet.", self.queued)
        yield _gauge("num_sequences_resident", "Sequences that hold pages.", stats.resident)
        yield _gauge("num_sequences_waiting", "Sequences that wait for pages, preempted ones included.", stats.waiting)
        yield _gauge("num_held_exits", "Tokens that wait for the exit layers.", stats.held_exits)
        yield _labelled_gauge("num_tokens_in_core", "Tokens before a recursion.", "recursion", _by_depth(stats.in_core))
        used = {pool: stats.pages_used[pool] / max(total, 1) for pool, total in stats.pages_total.items()}
        yield _labelled_gauge("kv_cache_usage_perc", "Share of the pages in use, 1 is all.", "pool", used)
        yield _labelled_gauge("kv_pages", "Pages there are.", "pool", stats.pages_total)
        yield _labelled_gauge("kv_pages_used", "Pages that sequences hold.", "pool", stats.pages_used)
        yield _labelled_gauge("kv_pages_cached", "Pages that the prefix cache alone holds.", "pool", stats.pages_cached)
        depth = _by_depth(stats.pages_by_depth)
        yield _labelled_gauge("kv_pages_by_depth", "Pages of the core held at a depth.", "depth", depth)
        yield _counter("prompt_tokens", "Prompt tokens read.", stats.prompt_tokens)
        yield _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cached_prompt_tokens)
        yield _counter("prefix_cache_queries", "Prompt tokens that might have been there.", stats.prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated.", stats.generated_tokens)
        yield _counter("num_preemptions", "Sequences that had to give up their pages.", stats.preemptions)
        yield _counter("rows_saved", "Rows of the core that full depth would have taken more.", stats.rows_saved)
        yield _labelled_counter("launches", "Launches.", "kind", stats.launches)
        yield _labelled_counter("launch_rows", "Rows of all launches.", "kind", stats.rows)
        yield _labelled_counter("engine_seconds", "Time spent.", "kind", stats.seconds)
        depths = dict(enumerate(stats.depth_counts))
        yield _distribution("exit_depth", "Recursions that a token took.", depths)
        yield _distribution("core_launch_width", "Rows of a launch of the core.", stats.width_counts)
        yield _distribution("core_launch_depths", "Different depths in a launch of the core.", stats.mixed_depths)


def _by_depth(values: list[int]) -> dict[str, int]:
    return {str(number): value for number, value in enumerate(values, start=1)}


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _labelled_gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _labelled_counter(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _distribution(name: str, text: str, counts: Mapping[int, int]) -> HistogramMetricFamily:
    """A histogram of whole numbers, bounds at the powers of two and at small numbers."""
    bounds = sorted({0, 1, 2, 3, 4, 6, *(2**power for power in range(3, 13))})
    buckets: list[tuple[str, float]] = [
        (str(float(bound)), sum(count for value, count in counts.items() if value <= bound)) for bound in bounds
    ]
    buckets.append(("+Inf", sum(counts.values())))
    total = sum(value * count for value, count in counts.items())
    return HistogramMetricFamily(f"{PREFIX}_{name}", text, buckets=buckets, sum_value=total)
