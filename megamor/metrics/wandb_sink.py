"""Metrics to Weights & Biases. The only module that imports wandb, and only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megamor.errors import ConfigError
from megamor.metrics.sinks import Metrics


class WandbSink:
    """One wandb run, the same over restarts.

    Offline, every launch writes a directory of its own under `directory/wandb` with the same run id, which
    `wandb sync` puts together. The x axis is the metric `step`: after a restart wandb itself would refuse points whose
    internal step is behind, and steps that were done twice appear twice there (in `metrics.jsonl` they do not).

    Args:
        run_id: of the run to continue, from the checkpoint; None starts a new one.
        config: the resolved configuration, shown with the run.

    Raises:
        ConfigError: wandb is not installed, or refuses (not logged in, no network).
    """

    def __init__(
        self,
        *,
        project: str,
        name: str,
        directory: Path,
        mode: Literal["online", "offline"] = "online",
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("metrics.wandb is on, but wandb is not installed: pip install wandb") from error
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=name,
                dir=str(directory),
                mode=mode,
                id=run_id,
                resume="allow" if run_id else None,
                config=dict(config or {}),
                settings=wandb.Settings(console="off"),  # its capture of stdout breaks the progress display
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"wandb does not start: {error}. Log in with `wandb login`, or set metrics.wandb_mode=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """To be kept in checkpoints and given back after a restart."""
        return str(self._run.id)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log every metric that has a value."""
        self._run.log({"step": step, **{name: value for name, value in metrics.items() if value is not None}})

    def rewind(self, step: int) -> None:
        """Nothing: wandb keeps what it has, and shows both the abandoned and the new points of a step."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
