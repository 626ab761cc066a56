"""Which source each sample comes from: a periodic schedule that is never a whole sample off the requested weights.

The schedule solves the chairman assignment problem (Tijdeman 1980): with weights w_i of k sources that add up to 1,
after any n samples source i has given between w_i n - d and w_i n + d of them, d = 1 - 1 / (2k - 2) < 1. His rule is an
earliest-deadline schedule: a sample of source i may be taken once that doesn't put the source ahead by more than d, and
must be taken before the source falls behind by more than d. Among those that may be taken, the most urgent goes first.

Weights with a common denominator up to `MAX_PERIOD` (0.3 and 0.7; 1, 2 and 5) repeat exactly. For other weights the
first `MAX_PERIOD` samples follow the exact weights and then repeat, an error of less than a sample per `MAX_PERIOD`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megamor.errors import ConfigError

MAX_PERIOD = 2**20
# Weights without a small common denominator are rounded to integers out of this.
_DENOMINATOR = 2**48
_ROUNDING = 1e-9


class Blend:
    """A schedule of `len(weights)` sources; any position is found in constant time.

    The first `period` samples repeat indefinitely; `per_period` [k] counts the samples of each source in a period.
    Raises ConfigError for weights that are too small to be scheduled.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fractions = np.asarray(weights, np.float64)
        assert (fractions > 0).all(), "the schema accepts positive weights only"
        fractions = fractions / fractions.sum()
        if fractions.min() * MAX_PERIOD < 1:
            raise ConfigError(
                f"data weights {list(weights)}: one is under a millionth of their sum; raise or remove it"
            )
        exact = _exact_period(fractions)
        self.period = exact or MAX_PERIOD
        denominator = exact or _DENOMINATOR
        self._sources = _tijdeman([round(fraction * denominator) for fraction in fractions.tolist()], self.period)
        self._ranks = _occurrence_numbers(self._sources, len(fractions))
        self.per_period = np.bincount(self._sources, minlength=len(fractions))

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For `positions` [n] of the schedule: the source of each [n], and how many samples it gave before that [n]."""
        blocks, within = np.divmod(np.asarray(positions, np.int64), self.period)
        sources = self._sources[within].astype(np.int64)
        return sources, blocks * self.per_period[sources] + self._ranks[within]

    def counts(self, length: int) -> NDArray[np.int64]:
        """How many of the first `length` samples come from each source [k]."""
        blocks, within = divmod(length, self.period)
        return blocks * self.per_period + np.bincount(self._sources[:within], minlength=len(self.per_period))


def _exact_period(fractions: NDArray[np.float64]) -> int | None:
    """The least number of samples, up to MAX_PERIOD, of which every source has a whole number."""
    for limit in (2**10, MAX_PERIOD):
        periods = np.arange(1, limit + 1)
        for fraction in fractions:
            ideal = periods * fraction
            periods = periods[np.abs(ideal - np.rint(ideal)) < _ROUNDING]
        if len(periods):
            return int(periods[0])
    return None


def _tijdeman(weights: list[int], length: int) -> NDArray[np.uint32]:
    """Source of each of the first `length` positions. Integer `weights` keep the arithmetic exact."""
    total, count = sum(weights), len(weights)
    if count == 1:
        return np.zeros(length, np.uint32)
    slack = 2 * count - 2
    # Source i may give its sample c at position n (from 1) once weight * n / total - c >= 1 / slack (its release), and
    # must have given it before weight * n / total - c exceeds 1 - 1 / slack (its deadline). -(-a // b) rounds up.
    waiting = [(-(-total // (slack * weight)), source, 0) for source, weight in enumerate(weights)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    schedule = np.empty(length, np.uint32)
    for position in range(1, length + 1):
        while waiting and waiting[0][0] <= position:
            _, source, given = heapq.heappop(waiting)
            deadline = ((given + 1) * slack - 1) * total // (slack * weights[source]) + 1
            heapq.heappush(ready, (deadline, source, given))
        _, source, given = heapq.heappop(ready)
        schedule[position - 1] = source
        release = -(-(slack * (given + 1) + 1) * total // (slack * weights[source]))
        heapq.heappush(waiting, (release, source, given + 1))
    return schedule


def _occurrence_numbers(schedule: NDArray[np.uint32], num_sources: int) -> NDArray[np.int64]:
    """For each position, how many earlier ones have the same source [period]."""
    order = np.argsort(schedule, kind="stable")
    starts = np.zeros(num_sources + 1, np.int64)
    np.cumsum(np.bincount(schedule, minlength=num_sources), out=starts[1:])
    ranks = np.empty(len(schedule), np.int64)
    ranks[order] = np.arange(len(schedule)) - starts[schedule[order]]
    return ranks
