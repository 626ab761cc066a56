"""What happens when a step goes wrong: its gradient isn't finite, or the loss jumps.

The backends leave weights and moments as they were when the gradient norm isn't finite; this module decides what
follows from that. All figures that the guard sees are already reduced over ranks, so every rank reaches the same
verdict without asking the others.
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
    """What the guard thinks of a finished step."""

    GOOD = "good"
    SKIPPED = "skipped"
    """Weights and moments are as they were before it."""
    SPIKE = "spike"
    """The loss has been too high for `guard.spike_steps` steps: go back to an earlier checkpoint."""


class Guard:
    """Judges steps by their loss and gradient norm, and remembers the recent ones."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.grad_norms: deque[float] = deque(maxlen=config.window)
        self.skipped = self.skipped_in_a_row = 0
        self.spiking = 0
        self.left_out: list[tuple[int, int]] = []
        """For each rollback, the samples that the run won't see: first, and last + 1."""

    @property
    def decides(self) -> bool:
        """Whether a step's figures may change what happens next, other than by ending the run with an error.

        If so, the trainer reads them at once. If not, it reads them one step late and doesn't wait for the device.
        """
        return self.config.skip_non_finite or self.config.spike_threshold is not None

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """What to do about step number `step`.

        Raises:
            TrainingError: a figure isn't finite and the step mustn't be skipped, or too many in a row were.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip(step, loss, grad_norm)
            return Verdict.SKIPPED
        self.skipped_in_a_row = 0
        if self._is_spike(loss):
            # Kept out of the window, which would otherwise get used to the high losses.
            self.spiking += 1
            return Verdict.SPIKE if self.spiking >= self.config.spike_steps else Verdict.GOOD
        self.spiking = 0
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        return Verdict.GOOD

    def roll_back(self, step: int, samples: tuple[int, int]) -> None:
        """Record that the run went back because of the loss of step `step`, and leaves `samples` out.

        Raises:
            TrainingError: there have been `guard.max_rollbacks` already.
        """
        if len(self.left_out) >= self.config.max_rollbacks:
            raise TrainingError(
                f"the loss spikes at step {step} after {len(self.left_out)} rollbacks (guard.max_rollbacks): "
                "lower optim.lr, or look at the data of these steps"
            )
        self.left_out.append(samples)
        self.spiking = 0

    def metrics(self) -> dict[str, float | int | None]:
        """Counts of skips and rollbacks, for what is switched on."""
        counts: dict[str, float | int | None] = {}
        if self.config.skip_non_finite:
            counts["guard/skipped_steps"] = self.skipped
        if self.config.spike_threshold is not None:
            counts["guard/rollbacks"] = len(self.left_out)
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
        """Restore what `state_dict` returned; the window may have another length now."""
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
        # With a finite norm the backend has updated the weights already: there is nothing left to skip.
        if not self.config.skip_non_finite or math.isfinite(grad_norm):
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
        # With few losses in the window their deviation says little.
        if threshold is None or 2 * len(self.losses) < self.config.window:
            return False
        return loss > statistics.fmean(self.losses) + threshold * statistics.pstdev(self.losses)
