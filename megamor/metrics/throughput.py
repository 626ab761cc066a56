"""Tokens per second, executed FLOPs, MFU and HFU.

The clock stops inside `excluded()`, which wraps evaluation and saving. Rates are over the last few steps; names that
end in `_mean` are over this launch so far.

MFU counts the FLOPs of what the model really computed (forward and backward, executed routing); HFU adds recomputation
by activation checkpointing. Both are relative to the peak of all devices (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

Clock = Callable[[], float]


class _Step(NamedTuple):
    """Sums over all ranks in one optimizer step, or in several."""

    seconds: float = 0.0
    tokens: int = 0
    model_flops: float = 0.0
    hardware_flops: float = 0.0


class Throughput:
    """Rates of a training run.

    Args:
        peak_flops: FLOP/s of one device (`peak_flops`), None if unknown.
        world_size: number of devices.
        window: number of steps in the windowed rates.
        clock: seconds, monotonic.
    """

    def __init__(
        self, *, peak_flops: float | None, world_size: int, window: int = 20, clock: Clock = time.perf_counter
    ) -> None:
        self._total_peak = None if peak_flops is None else peak_flops * world_size
        self._clock = clock
        self._recent: deque[_Step] = deque(maxlen=window)
        self.total = _Step()  # of this launch
        self._mark = clock()

    def start(self) -> None:
        """Start the clock. Call it right before the loop."""
        self._mark = self._clock()

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside doesn't count."""
        entered = self._clock()
        try:
            yield
        finally:
            # Moving the mark forward takes the time out of the step that is under way.
            self._mark += self._clock() - entered

    def lap(self) -> float:
        """Seconds since the previous call, or since `start`, without the excluded ones."""
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        return seconds

    def add(self, *, seconds: float, tokens: int, model_flops: float, hardware_flops: float) -> None:
        """Count one optimizer step.

        Args:
            seconds: it took, from `lap`.
            tokens: of all ranks.
            model_flops: executed by all ranks, forward and backward, without recomputation.
            hardware_flops: the same with recomputation.
        """
        step = _Step(seconds, tokens, model_flops, hardware_flops)
        self._recent.append(step)
        self.total = _sum([self.total, step])

    def metrics(self) -> dict[str, float | None]:
        """Flat metrics; None where the device's peak is unknown or no time has passed.

        Units: tokens/s of all devices together, seconds, FLOP/s, fractions of peak.
        """
        recent = _sum(self._recent)
        return {
            "throughput/tokens_per_second": _ratio(recent.tokens, recent.seconds),
            "throughput/tokens_per_second_mean": _ratio(self.total.tokens, self.total.seconds),
            "throughput/step_seconds": _ratio(recent.seconds, len(self._recent)),
            "throughput/flops_per_second": _ratio(recent.model_flops, recent.seconds),
            "throughput/mfu": self._utilisation(recent.model_flops, recent.seconds),
            "throughput/hfu": self._utilisation(recent.hardware_flops, recent.seconds),
        }

    def _utilisation(self, flops: float, seconds: float) -> float | None:
        return None if self._total_peak is None else _ratio(flops, seconds * self._total_peak)


def _sum(steps: Iterable[_Step]) -> _Step:
    return _Step(*(sum(column) for column in zip(*steps, strict=True)))


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
