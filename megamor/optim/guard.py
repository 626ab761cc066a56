"""What happens when a step isn't finite.

The backends leave weights and moments alone when the gradient norm isn't finite, without asking anybody; the policy is
here: stop, and say where.
"""

from __future__ import annotations

import math

from megamor.errors import TrainingError


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Refuse to go on from a step whose loss or gradient norm is NaN or infinite.

    Both values must already be reduced over all ranks, as `Backend.step` returns the norm and as the loss is logged;
    then either every rank raises or none does.

    Raises:
        TrainingError: names the step and the value.
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} of step {step} is {value}: resume from the last checkpoint with a lower optim.lr, "
                "a longer optim.warmup_steps or train.precision=fp32"
            )
