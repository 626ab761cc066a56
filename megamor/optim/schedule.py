"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megamor.config import OptimConfig
from megamor.errors import ConfigError


def lr_multiplier(step: int, config: OptimConfig, total_steps: int) -> float:
    """Factor of the peak learning rate at optimizer step `step` (counted from 0) of a run of `total_steps`.

    All schedules start with a linear warm-up `step / warmup_steps`. Index 0 is therefore 0: the first step moves the
    moments and not the weights, as in the published recipe. Then:

    - `wsd` (arXiv 2507.10524, appendix B): constant, and linear to `min_lr_ratio` over the last
      `int(decay_fraction * total_steps)` steps;
    - `cosine`: half a cosine from 1 to `min_lr_ratio` at `total_steps`;
    - `constant`: 1.

    Raises:
        ConfigError: warm-up and decay together are longer than the run.
    """
    decay_steps = int(config.decay_fraction * total_steps) if config.schedule == "wsd" else 0
    if config.warmup_steps + decay_steps > total_steps:
        raise ConfigError(
            f"optim.warmup_steps ({config.warmup_steps}) and the decay ({decay_steps} steps) are longer than the run "
            f"({total_steps} steps): lower optim.warmup_steps or optim.decay_fraction, or train for more steps"
        )
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = _progress(step, config.warmup_steps, total_steps)
        return _blend(0.5 * (1.0 + math.cos(math.pi * progress)), config.min_lr_ratio)
    return _blend(1.0 - _progress(step, total_steps - decay_steps, total_steps), config.min_lr_ratio)


def _progress(step: int, start: int, end: int) -> float:
    """Share of [start, end] that lies behind `step`, within 0 and 1."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (end - start))


def _blend(factor: float, floor: float) -> float:
    return floor + (1.0 - floor) * factor
