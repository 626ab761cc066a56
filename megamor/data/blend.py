"""Which source each sample comes from: a periodic schedule in which no source is ever a whole sample off its share.

The schedule solves the chairman assignment problem (Tijdeman 1980): with shares w_i of k sources, after any n samples
source i has given between w_i n - d and w_i n + d of them, d = 1 - 1 / (2k - 2) < 1. His rule is an earliest-deadline
schedule: a sample of source i may be taken once taking it doesn't run ahead by more than d, must be taken before the
source falls behind by more than d, and of those that may, the most urgent goes first.

Shares with a common denominator up to `MAX_PERIOD` (0.3 and 0.7; 1, 2 and 5) repeat exactly. For others the first
`MAX_PERIOD` samples follow the exact shares and then repeat, which is off by less than a sample per `MAX_PERIOD`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megamor.errors import ConfigError

MAX_PERIOD = 2**20
# Shares without a small common denominator are scheduled as whole numbers out of this.
_DENOMINATOR = 2**48
_ROUNDING = 1e-9


class Blend:
    """A schedule of `len(weights)` sources; any position is found in constant time.

    `period` samples repeat for ever; `per_period` [k] counts the samples of each source in one period. Raises
    ConfigError for weights that are too small to be scheduled.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, np.float64)
        assert (shares > 0).all(), "the schema accepts positive weights only"
        shares = shares / shares.sum()
        if shares.min() * MAX_PERIOD < 1:
            raise ConfigError(
                f"data weights {list(weights)}: one is under a millionth of their sum; raise or remove it"
            )
        exact = _exact_period(shares)
        self.period = exact or MAX_PERIOD
        denominator = exact or _DENOMINATOR
        self._sources = _tijdeman([round(share * denominator) for share in shares.tolist()], self.period)
        self._ranks = _occurrence_numbers(self._sources, len(shares))
        self.per_period = np.bincount(self._sources, minlength=len(shares))

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For `positions` [n] of the schedule: the source of each [n], and how many samples it gave before [n]."""
        blocks, within = np.divmod(np.asarray(positions, np.int64), self.period)
        sources = self._sources[within].astype(np.int64)
        return sources, blocks * self.per_period[sources] + self._ranks[within]

    def counts(self, length: int) -> NDArray[np.int64]:
        """How many of the first `length` samples come from each source [k]."""
        blocks, within = divmod(length, self.period)
        return blocks * self.per_period + np.bincount(self._sources[:within], minlength=len(self.per_period))


def _exact_period(shares: NDArray[np.float64]) -> int | None:
    """The least number of samples, up to MAX_PERIOD, of which every source has a whole number."""
    for limit in (2**10, MAX_PERIOD):
        periods = np.arange(1, limit + 1)
        for share in shares:
            ideal = periods * share
            periods = periods[np.abs(ideal - np.rint(ideal)) < _ROUNDING]
        if len(periods):
            return int(periods[0])
    return None


def _tijdeman(shares: list[int], length: int) -> NDArray[np.uint32]:
    """Source of each of the first `length` positions, in exact integer arithmetic; the shares are out of their sum."""
    total, count = sum(shares), len(shares)
    if count == 1:
        return np.zeros(length, np.uint32)
    slack = 2 * count - 2
    # Source i may give its sample c at position n (from 1) once share * n / total - c >= 1 / slack, and must have
    # given it when share * n / total - c would exceed 1 - 1 / slack.
    waiting = [(-(-total // (slack * share)), source, 0) for source, share in enumerate(shares)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    schedule = np.empty(length, np.uint32)
    for position in range(1, length + 1):
        while waiting and waiting[0][0] <= position:
            _, source, given = heapq.heappop(waiting)
            deadline = ((given + 1) * slack - 1) * total // (slack * shares[source]) + 1
            heapq.heappush(ready, (deadline, source, given))
        _, source, given = heapq.heappop(ready)
        schedule[position - 1] = source
        release = -(-(slack * (given + 1) + 1) * total // (slack * shares[source]))
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
