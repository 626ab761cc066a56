"""What batches cost, measured, and what that predicts for each policy.

A core batch of w rows takes a + b·w seconds, a boundary (exit and entry together) of w rows a' + b'·w. With R
residents, Nr recursions and mean depth d, the seconds per token are

    full        Nr (a/R + b) + a'/R + b'
    shrink      Nr a/R + b d + a'/R + b'
    depthwise   d (a/w + b) + (d/k) a'/w + b'     with w = R / (1 + (k - 1) / (2 d)) rows in the core

if a boundary comes after every k core batches. Tokens that have stopped wait for it, so the core is narrower and
boundaries are fewer. For k = 1 and a' + b' w = x (a + b w), depthwise beats shrink if x < (Nr - d) / (d - 1).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median

# Old samples are dropped, so that the fit follows a machine whose speed changes.
SAMPLES_PER_WIDTH = 64


@dataclass
class LineFit:
    """Seconds of batches by width, and the straight line through their medians, weighted by their number."""

    samples: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, width: int, seconds: float) -> None:
        """Add a batch."""
        kept = self.samples[width]
        kept.append(seconds)
        del kept[:-SAMPLES_PER_WIDTH]

    def line(self) -> tuple[float, float]:
        """Seconds of an empty batch and of each row, neither below 0."""
        # Medians: a batch that the operating system interrupted takes many times as long and would move a mean.
        points = [(width, median(seconds), len(seconds)) for width, seconds in self.samples.items()]
        total = sum(count for *_, count in points) or 1
        mean_width = sum(width * count for width, _, count in points) / total
        mean = sum(seconds * count for _, seconds, count in points) / total
        spread = sum(count * (width - mean_width) ** 2 for width, _, count in points)
        slope = sum(count * (width - mean_width) * (seconds - mean) for width, seconds, count in points)
        # Noise can tilt the line. Negative costs would make the prediction prefer absurd widths.
        per_row = max(0.0, slope / spread) if spread else 0.0
        return max(0.0, mean - per_row * mean_width), per_row


@dataclass(frozen=True)
class Costs:
    """Fixed seconds of a batch and seconds of a row, of the core and of the boundary."""

    core: tuple[float, float]
    boundary: tuple[float, float]

    def ratio(self, width: int) -> float:
        """Seconds of a boundary over those of a core batch of equal width: x."""
        (a, b), (c, e) = self.core, self.boundary
        return (c + e * width) / (a + b * width)

    def token_seconds(self, policy: str, residents: int, num_recursions: int, depth: float, hold: int = 1) -> float:
        """Predicted seconds per token; see the module docstring. Holding for all recursions is lock-step."""
        (a, b), (c, e) = self.core, self.boundary
        if policy == "depthwise" and hold == num_recursions > 1:
            policy = "shrink"
        if policy == "full":
            return num_recursions * (a / residents + b) + c / residents + e
        if policy == "shrink":
            return num_recursions * a / residents + b * depth + c / residents + e
        width = residents / (1 + (hold - 1) / (2 * depth))
        return depth * (a / width + b) + depth / hold * c / width + e

    def best_hold(self, residents: int, num_recursions: int, depth: float) -> int:
        """Core batches between boundaries with the least predicted time."""
        holds = range(1, max(1, num_recursions) + 1)
        return min(holds, key=lambda hold: self.token_seconds("depthwise", residents, num_recursions, depth, hold))
