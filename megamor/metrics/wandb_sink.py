"""Metrics for Weights & Biases. The only module that imports wandb, and only if `metrics.wandb` is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamor.config import Config, config_to_dict
from megamor.errors import ConfigError
from megamor.metrics.sinks import Metrics


class WandbSink:
    """One wandb run, continued over restarts.

    Offline, every launch writes its own directory under `directory/wandb` with the same run id; `wandb sync` merges
    them. The x axis is the metric `step`, because wandb's internal step can't go back after a restart. Steps that ran
    twice appear twice (unlike in `metrics.jsonl`).

    Args:
        config: the resolved configuration, which is shown with the run.
        directory: the run's; it exists.
        run_id: the run to continue, from the checkpoint; None starts a new one.

    Raises:
        ConfigError: wandb is not installed, or can't start (not logged in, no network).
    """

    def __init__(self, config: Config, directory: Path, run_id: str | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("metrics.wandb is on, but wandb is not installed: pip install wandb") from error
        try:
            self._run: Any = wandb.init(
                project=config.metrics.wandb_project,
                name=config.run.name,
                dir=str(directory),
                mode=config.metrics.wandb_mode,
                id=run_id,
                resume="allow" if run_id else None,
                config=config_to_dict(config),
                settings=wandb.Settings(console="off"),  # its capture of stdout breaks the progress display
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"wandb does not start: {error}. Log in with `wandb login`, or set metrics.wandb_mode=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """The run's id: goes into checkpoints, and back into `__init__` after a restart."""
        return str(self._run.id)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log every metric that has a value."""
        self._run.log({"step": step, **{name: value for name, value in metrics.items() if value is not None}})

    def rewind(self, step: int) -> None:
        """Does nothing: wandb can't remove points, and shows both the old and the new ones of a step."""

    def close(self) -> None:
        self._run.finish()
