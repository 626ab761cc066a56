"""Metrics for Weights & Biases."""

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
    them. A run that can't go online, for lack of a login or a network, is recorded offline. `directory` is the run's.
    """

    name = "wandb"

    def __init__(self, config: Config, directory: Path, run_id: str | None = None) -> None:
        self._directory, self._resumes = directory, run_id is not None
        super().__init__(config, run_id or os.environ.get("WANDB_RUN_ID"))

    def open(self) -> Any:
        """Start online, or offline if that fails."""
        mode = self.config.metrics.wandb_mode
        if (mode or self.package.setup().settings.mode) == "online":
            try:
                if not self.package.login(prompt=False, verify=False):
                    raise ConfigError("not logged in")
                return self._init("online")
            except Exception as error:  # wandb's own classes, and those of the libraries below it
                self.warn(
                    f"wandb can't go online: {error}. It records to {self._directory}/wandb instead: log in with "
                    "`wandb login`, upload with `wandb sync`. To choose this, set metrics.wandb_mode=offline"
                )
                mode = "offline"
        return self._init(mode)

    def send(self, run: Any, step: int, metrics: dict[str, Any]) -> None:
        """Log `metrics` with `step` as one of them, the x axis: wandb's own step can't go back after a restart."""
        run.log({"step": step, **metrics})

    def _init(self, mode: str | None) -> Any:
        metrics, env = self.config.metrics, os.environ
        run = self.package.init(
            project=metrics.wandb_project or self.package.setup().settings.project or "megamor",
            entity=metrics.wandb_entity,
            group=metrics.wandb_group,
            job_type=metrics.wandb_job_type,
            tags=metrics.wandb_tags or None,
            notes=metrics.wandb_notes,
            name=None if "WANDB_NAME" in env else self.config.run.name,
            dir=None if "WANDB_DIR" in env else str(self._directory),
            mode=mode,
            id=self.run_id,
            resume="allow" if self._resumes else None,
            config=config_to_dict(self.config),
            # Its capture of stdout breaks the progress display.
            settings=self.package.Settings(console="off", init_timeout=INIT_SECONDS, finish_timeout=UPLOAD_SECONDS),
        )
        run.define_metric("*", step_metric="step")
        return run
