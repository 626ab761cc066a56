"""Learning-rate schedules as pure functions of the step, so that there is no state to save."""

from __future__ import annotations

import math

from megamor.config import OptimConfig
from megamor.config.derive import decay_steps


def lr_multiplier(step: int, config: OptimConfig, total_steps: int) -> float:
    """Factor of the peak learning rate at optimizer step `step` (counted from 0) of a run of `total_steps`.

    All schedules start with a linear warm-up `step / warmup_steps`. So the first step has learning rate 0 and updates
    only the moments, as in the published recipe. Then:

    - `wsd` (arXiv 2507.10524, appendix B): constant, and linear to `min_lr_ratio` over the decay steps;
    - `cosine`: half a cosine from 1 to `min_lr_ratio` at `total_steps`;
    - `constant`: 1.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = _progress(step, config.warmup_steps, total_steps)
        return _blend(0.5 * (1.0 + math.cos(math.pi * progress)), config.min_lr_ratio)
    decay_start = total_steps - decay_steps(config, total_steps)
    return _blend(1.0 - _progress(step, decay_start, total_steps), config.min_lr_ratio)


def _progress(step: int, start: int, end: int) -> float:
    """Fraction of [start, end] that `step` has passed, between 0 and 1."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (end - start))


def _blend(factor: float, floor: float) -> float:
    return floor + (1.0 - floor) * factor
