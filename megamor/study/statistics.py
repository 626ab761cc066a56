"""Differences between arms, with intervals: paired by seed, since seeds differ more than arms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

Verdict = Literal["a", "b", "not resolved"]


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over `n` pairs, with the bounds of its confidence interval; infinite for a single pair.

    `verdict` is the arm with the smaller values, if the interval excludes zero.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> Verdict:
        return "a" if self.high < 0 else "b" if self.low > 0 else "not resolved"


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Difference:
    """Difference of two arms' values by seed, over the seeds that both have: the paired t interval.

    Raises:
        ValueError: they have no seed in common.
    """
    from scipy.stats import t

    found = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if not found:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    mean, n = fmean(found), len(found)
    if n == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    half = float(t.ppf((1 + level) / 2, n - 1)) * stdev(found) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def sentence(a: str, b: str, difference: Difference, unit: str = "nats/token", lower_is_better: bool = True) -> str:
    """What the difference of two arms allows to say."""
    d = difference
    if d.n == 1:
        return f"{a} minus {b}: {d.mean:+.4f} {unit} in the only seed: one seed allows no interval."
    interval = f"95 % interval {d.low:+.4f} to {d.high:+.4f}, {d.n} seeds"
    if d.verdict == "not resolved":
        return f"{a} against {b}: not resolved ({d.mean:+.4f} {unit}, {interval})."
    better, worse = (a, b) if (d.verdict == "a") == lower_is_better else (b, a)
    return f"{better} is better than {worse} by {abs(d.mean):.4f} {unit} ({a} minus {b}: {interval})."
