"""Metrics for Weights & Biases. The only module that imports wandb, and only if `metrics.wandb` is set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megamor.config import Config, config_to_dict
from megamor.errors import ConfigError
from megamor.metrics.trackers import TrackerSink

INIT_SECONDS, UPLOAD_SECONDS = 30, 10


class WandbSink(TrackerSink):
    """One wandb run, continued over restarts. What the configuration leaves open is wandb's own choice (WANDB_MODE, …).

    Offline, every launch writes its own directory under `directory/wandb` with the same run id; `wandb sync` merges
    them. A run that can't go online, for lack of a login or of a network, is recorded offline.

    Args:
        config: the resolved configuration, which is shown with the run.
        directory: the run's; it exists.
        run_id: as for `TrackerSink`.

    Raises:
        ConfigError: wandb is not installed.
    """

    name = "wandb"

    def __init__(self, config: Config, directory: Path, run_id: str | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("metrics.wandb is on, but wandb is not installed: pip install wandb") from error
        self._wandb: Any = wandb
        self._config, self._directory, self._resumes = config, directory, run_id is not None
        super().__init__(run_id or os.environ.get("WANDB_RUN_ID"))

    def open(self) -> Any:
        """Start online, or offline if that fails."""
        mode = self._config.metrics.wandb_mode
        if (mode or self._wandb.setup().settings.mode) == "online":
            try:
                if not self._wandb.login(prompt=False, verify=False):
                    raise ConfigError("not logged in")
                return self._init("online")
            except Exception as error:  # wandb's own classes, and those of the libraries below it
                self.warn(
                    f"wandb can't go online: {error}. It records to {self._directory}/wandb instead: log in with "
                    "`wandb login`, upload with `wandb sync`. To choose this, set metrics.wandb_mode=offline"
                )
                mode = "offline"
        return self._init(mode)

    def _init(self, mode: str | None) -> Any:
        own, metrics, env = self._wandb.setup().settings, self._config.metrics, os.environ
        run = self._wandb.init(
            project=metrics.wandb_project or own.project or "megamor",
            entity=metrics.wandb_entity,
            group=metrics.wandb_group,
            job_type=metrics.wandb_job_type,
            tags=metrics.wandb_tags or None,
            notes=metrics.wandb_notes,
            name=None if "WANDB_NAME" in env else self._config.run.name,
            dir=None if "WANDB_DIR" in env else str(self._directory),
            mode=mode,
            id=self.run_id,
            resume="allow" if self._resumes else None,
            config=config_to_dict(self._config),
            # Its capture of stdout breaks the progress display.
            settings=self._wandb.Settings(console="off", init_timeout=INIT_SECONDS, finish_timeout=UPLOAD_SECONDS),
        )
        run.define_metric("*", step_metric="step")
        return run

    def histogram(self, counts: list[float], edges: list[float]) -> Any:
        """A `wandb.Histogram`."""
        return self._wandb.Histogram(np_histogram=(counts, edges))
