"""How long a run is, and the learning rate that follows from how much of that it has used."""

from __future__ import annotations

from megamor.config import Config
from megamor.config.depth import recursions_at
from megamor.config.derive import Consumed, is_estimate, total_steps
from megamor.model.flops import expected_steps
from megamor.optim import lr_multiplier, lr_multiplier_of_budget


class Budget:
    """`train.max_steps`, `max_tokens` or `max_flops` of a configuration.

    Everything is a function of what the run has consumed, which is in the checkpoint. So a restart changes nothing, and
    a changed batch changes the number of steps but not the number of tokens.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def needs_flops(self) -> bool:
        """Whether the FLOPs of a step must be known before the next one begins."""
        return self.config.train.max_flops is not None

    @property
    def open_ended(self) -> bool:
        """Whether only the run itself shows which step is the last: padding isn't known beforehand either."""
        return is_estimate(self.config)

    def is_spent(self, done: Consumed) -> bool:
        """Whether the run is complete."""
        train = self.config.train
        if train.max_flops is not None:
            return done.flops >= train.max_flops
        if train.max_tokens is not None:
            return done.tokens_seen >= train.max_tokens
        assert train.max_steps is not None, "validate() accepts exactly one limit"
        return done.step >= train.max_steps

    def total_steps(self, done: Consumed) -> int:
        """The step that completes the run; an estimate if it is open-ended."""
        return expected_steps(self.config, done)

    def lr(self, done: Consumed) -> float:
        """Learning rate of the step after `done`."""
        optim, max_tokens = self.config.optim, self.config.train.max_tokens
        if self.config.train.max_flops is not None:
            return optim.lr * lr_multiplier_of_budget(done.step, done.flops / self.config.train.max_flops, optim)
        if max_tokens is not None and self.open_ended:
            return optim.lr * lr_multiplier_of_budget(done.step, done.tokens_seen / max_tokens, optim)
        steps = total_steps(self.config, done)
        assert steps is not None
        return optim.lr * lr_multiplier(done.step, optim, steps)

    def recursions(self, done: Consumed) -> int:
        """The most recursions of the step after `done`."""
        train = self.config.train
        if train.max_flops is not None:
            used = done.flops / train.max_flops
        else:
            used = done.step / train.max_steps if train.max_steps else done.tokens_seen / (train.max_tokens or 1)
        return recursions_at(self.config, used, done.step)

    def describe(self) -> str:
        """The setting, as `train.max_steps = 1000`."""
        train = self.config.train
        limits = {"max_steps": train.max_steps, "max_tokens": train.max_tokens, "max_flops": train.max_flops}
        return ", ".join(f"train.{name} = {value}" for name, value in limits.items() if value is not None)
