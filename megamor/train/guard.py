"""What happens when a step goes wrong: it isn't finite, or the loss jumps.

The backends leave weights and moments alone when the gradient norm isn't finite, on every rank and without asking
anybody; the policy is here. All figures that the guard sees are reduced over ranks already, so every rank comes to the
same conclusion by itself.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Any

from megamor.config import GuardConfig
from megamor.errors import TrainingError


class Verdict(Enum):
    """On a step that was done."""

    GOOD = "good"
    SKIPPED = "skipped"
    """Weights and moments are as they were before it."""
    SPIKE = "spike"
    """The last of so many steps with too high a loss that the run should go back."""


class Guard:
    """Judges steps by their loss and gradient norm, and remembers the recent ones."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.grad_norms: deque[float] = deque(maxlen=config.window)
        self.skipped = self.skipped_in_a_row = 0
        self.spiking = 0
        self.left_out: list[tuple[int, int]] = []
        """For each rollback, the samples that the run won't see: the first, and the one after the last."""

    @property
    def rollbacks(self) -> int:
        """How often the run went back."""
        return len(self.left_out)

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """What to do about the step that followed `step` others.

        Raises:
            TrainingError: it isn't finite and mustn't be skipped, or too many in a row were.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip(step, loss, grad_norm)
            return Verdict.SKIPPED
        self.skipped_in_a_row = 0
        if self._is_spike(loss):
            self.spiking += 1
            return Verdict.SPIKE if self.spiking >= self.config.spike_steps else Verdict.GOOD
        self.spiking = 0
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        return Verdict.GOOD

    def roll_back(self, step: int, samples: tuple[int, int]) -> None:
        """Note that the run went back because of the loss after `step` steps and leaves `samples` out.

        Raises:
            TrainingError: there have been `guard.max_rollbacks`.
        """
        if self.rollbacks >= self.config.max_rollbacks:
            raise TrainingError(
                f"the loss spikes at step {step} after {self.rollbacks} rollbacks (guard.max_rollbacks): "
                "lower optim.lr, or look at the data of these steps"
            )
        self.left_out.append(samples)
        self.spiking = 0

    def metrics(self) -> dict[str, float | int | None]:
        """Counts, of what is switched on."""
        counts: dict[str, float | int | None] = {}
        if self.config.skip_non_finite:
            counts["guard/skipped_steps"] = self.skipped
        if self.config.spike_threshold is not None:
            counts["guard/rollbacks"] = self.rollbacks
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Plain data (JSON)."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spiking": self.spiking,
            "left_out": [list(samples) for samples in self.left_out],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved; the window may have another length now."""
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.grad_norms = deque(state["grad_norms"], maxlen=self.config.window)
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.spiking = state["spiking"]
        self.left_out = [(first, end) for first, end in state["left_out"]]

    def _skip(self, step: int, loss: float, grad_norm: float) -> None:
        name, value = ("loss", loss) if math.isfinite(grad_norm) else ("gradient norm", grad_norm)
        trouble = f"the {name} of step {step} is {value}"
        remedy = (
            "resume from the last checkpoint with a lower optim.lr, a longer optim.warmup_steps or train.precision=fp32"
        )
        if not self.config.skip_non_finite or math.isfinite(grad_norm):  # with a finite norm the step was taken
            raise TrainingError(f"{trouble}: {remedy}")
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.config.max_skips_in_a_row:
            raise TrainingError(
                f"{trouble}, and so were those of the {self.config.max_skips_in_a_row} steps before, which were "
                f"skipped (guard.max_skips_in_a_row): {remedy}"
            )

    def _is_spike(self, loss: float) -> bool:
        threshold = self.config.spike_threshold
        if threshold is None or 2 * len(self.losses) < self.config.window:
            return False
        return loss > statistics.fmean(self.losses) + threshold * statistics.pstdev(self.losses)
