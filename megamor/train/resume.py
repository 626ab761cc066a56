"""What a launch changes in the run that it resumes: what is refused, and what is told before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megamor.checkpoint import TrainerState
from megamor.checkpoint.layout import CONFIG_FILE, TOKENIZER_FILE, published_steps, step_name
from megamor.config import Config, config_from_yaml
from megamor.config.changes import Change, Effect, changes
from megamor.config.derive import Consumed
from megamor.errors import CheckpointError, ConfigError
from megamor.train.budget import Budget

HARMLESS = (Effect.NONE, Effect.ARITHMETIC)
"""Changes after which a finished run is still what the launch asks for."""


@dataclass(frozen=True)
class Resumption:
    """The configurations before and after, and what a run in the directory `checkpoints` has consumed."""

    old: Config
    new: Config
    changes: list[Change]
    checkpoints: Path
    returns: bool
    """Whether the run goes back to an earlier step, because `checkpoint.resume_step` asks for it."""
    branch: str | None = None
    """The value of `init.branch_from`, if the checkpoint is another run's."""

    @classmethod
    def of(
        cls,
        checkpoint: Path,
        config: Config,
        files: Mapping[str, str | bytes],
        returns: bool,
        branch: str | None = None,
    ) -> Resumption:
        """Compare the configuration and the tokenizer of `checkpoint` with those of this launch.

        Raises:
            CheckpointError: the configuration of `checkpoint` can't be read.
            ConfigError: a setting differs that changes the model's function, and isn't in `checkpoint.allow_changes`;
                or the optimizer is of another kind.
        """
        path = checkpoint / CONFIG_FILE
        try:
            old = config_from_yaml(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"can't read {path}: {error}") from error
        found = [change for change in changes(old, config) if change.name != "data.tokenizer"]
        found += _tokenizer(checkpoint, old, config, files)
        another = "start a new run with another run.name"
        if branch is not None:  # names and directories always differ
            found = [change for change in found if change.effect not in (Effect.NONE, Effect.START)]
            another = "take only the weights by init.from in place of init.branch_from"
        for change in found:
            if change.effect is Effect.STATE:
                raise ConfigError(
                    f"{change}: {change.effect.value} ({checkpoint}). Restore the old value, or {another}"
                )
        allowed = config.checkpoint.allow_changes
        refused = [change for change in found if change.effect is Effect.FUNCTION and change.name not in allowed]
        if refused:
            names = ",".join(dict.fromkeys([*allowed, *(change.name for change in refused)]))
            raise ConfigError(
                "\n  ".join([f"the weights in {checkpoint} belong to another model:", *map(str, refused)])
                + f"\nRestore the old values, or {another}. To continue all the same, allow "
                f"the changes by name: checkpoint.allow_changes=[{names}]"
            )
        return cls(old, config, found, checkpoint.parent, returns, branch)

    def check_not_finished(self, done: Consumed) -> None:
        """Refuse to end at once, with the results of another configuration.

        Raises:
            ConfigError: the run is finished, and this launch asks for a different one or is to branch off it.
        """
        if self.branch is not None:
            raise ConfigError(
                f"init.branch_from = {self.branch} is at step {done.step}, where this run ends "
                f"({Budget(self.new).describe()}): raise its limit, which counts from the other run's beginning"
            )
        found = [change for change in self.changes if change.effect not in HARMLESS]
        if found:
            finished = f"{self.checkpoints.parent} is finished at step {done.step}, with other settings:"
            raise ConfigError(
                "\n  ".join([finished, *map(str, found)])
                + "\nThis launch would train nothing. For a new experiment give another run.name; to train this run "
                "further raise its limit (train.max_steps, max_tokens or max_flops); to return to an earlier step set "
                "checkpoint.resume_step"
            )

    def describe(self, done: Consumed, last_lr: float | None) -> list[str]:
        """Every change with its consequence, and what all of them do to the learning rate and the length of the run."""
        if not self.changes:
            return []
        lines = ["settings that differ from those of the checkpoint:"]
        lines += [f"  {change} ({change.effect.value})" for change in self.changes]
        if all(change.effect is Effect.NONE for change in self.changes):
            return lines
        before, after = Budget(self.old), Budget(self.new)
        lr, steps = (before.lr(done), after.lr(done)), (before.total_steps(done), after.total_steps(done))
        about = "about " if before.open_ended or after.open_ended else ""
        left = [max(0, total - done.step) for total in steps]
        last = "" if last_lr is None else f"; step {done.step} had {last_lr:.4g}"
        lines.append(f"  learning rate of step {done.step + 1}: {lr[0]:.4g} -> {lr[1]:.4g}{last}")
        lines.append(f"  steps left: {about}{left[0]:,} -> {left[1]:,}")
        if before.is_spent(done) and not after.is_spent(done):
            lines.append(f"  the run was finished ({before.describe()}) and is extended ({after.describe()})")
        last_lr = before.lr(done) if last_lr is None else last_lr
        rises = lr[1] > last_lr * 1.001 and done.step > max(self.old.optim.warmup_steps, self.new.optim.warmup_steps)
        if rises and left[1]:
            lines.append(self._warning(done, last_lr, lr[1]))
        return lines

    def _warning(self, done: Consumed, old_lr: float, new_lr: float) -> str:
        rise = f"warning: the learning rate rises from {old_lr:.4g} (step {done.step}) to {new_lr:.4g}"
        # Where both schedules still give the same rate, the run continues as if it had been planned like this.
        for step in reversed(published_steps(self.checkpoints)):
            with suppress(CheckpointError):
                state = TrainerState.read(self.checkpoints / step_name(step))
                earlier = Consumed(state.step, state.tokens_seen, state.flops or 0.0)
                rates = Budget(self.old).lr(earlier), Budget(self.new).lr(earlier)
                if step < done.step and math.isclose(*rates, rel_tol=1e-3):
                    fix = f"checkpoint.resume_step={step}; the later checkpoints are kept"
                    if self.branch is not None:
                        fix = f"init.branch_from={self.branch.rpartition('@')[0]}@{step}"
                    return f"{rise}. To continue from before the decay, where both schedules agree, set {fix}"
        return (
            f"{rise}, and no checkpoint is left of a step at which both schedules agree (checkpoint.keep_every keeps "
            "some; checkpoint.resume_step resumes from one)"
        )


def _tokenizer(checkpoint: Path, old: Config, new: Config, files: Mapping[str, str | bytes]) -> list[Change]:
    """What has become of the tokenizer. Its contents count; where the file is doesn't."""
    path, current = checkpoint / TOKENIZER_FILE, files.get(TOKENIZER_FILE)
    saved = path.read_bytes() if path.exists() else None
    change = Change("data.tokenizer", old.data.tokenizer, new.data.tokenizer, Effect.NONE)
    if saved is None or current is None or saved == current:
        return [change] if change.old != change.new else []
    return [replace(change, new=f"{change.new} (other contents)", effect=Effect.FUNCTION)]
