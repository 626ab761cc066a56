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


def lr_multiplier_of_budget(step: int, used: float, config: OptimConfig) -> float:
    """Factor of the peak learning rate where the fraction `used` of a budget stands for time (`train.max_flops`).

    The schedules have the same shapes over that fraction. The warm-up still takes `warmup_steps` steps and is a factor
    on them.
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return warmup
    if config.schedule == "cosine":
        return warmup * _blend(0.5 * (1.0 + math.cos(math.pi * min(used, 1.0))), config.min_lr_ratio)
    return warmup * _blend(1.0 - _progress(used, 1.0 - config.decay_fraction, 1.0), config.min_lr_ratio)


def _progress(step: float, start: float, end: float) -> float:
    """Fraction of [start, end] that `step` has passed, between 0 and 1."""
    if step <= start:
        return 0.0
    # A run that is resumed with a shorter schedule is past its end, which may even be before the end of the warm-up.
    return 1.0 if step >= end else (step - start) / (end - start)


def _blend(factor: float, floor: float) -> float:
    return floor + (1.0 - floor) * factor
