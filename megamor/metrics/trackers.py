"""Experiment trackers: what they have in common, and Trackio, a local dashboard. wandb is in `wandb_sink`.

A tracker may lack a login or a network, raise, or hang. Training must not wait for it, and must not end with it.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from importlib import import_module
from typing import Any

from megamor.config import Config, config_to_dict
from megamor.errors import ConfigError
from megamor.metrics.sinks import Metrics, depth_histogram

log = logging.getLogger("megamor.metrics")

FINISH_SECONDS = 15.0
"""How long the end of training waits for a tracker to send the rest."""
QUEUE_RECORDS = 100_000
"""Records that may wait for a tracker that is slow or still starting."""


class TrackerSink:
    """Hands metrics to a tracker in a thread of its own. What fails there is a warning, and `metrics.jsonl` continues.

    Steps that ran twice appear twice (unlike in `metrics.jsonl`).

    Args:
        config: the resolved configuration, which is shown with the run.
        run_id: the tracker's run to continue, from the checkpoint; None starts a new one. As an attribute, the id goes
            into checkpoints. It is chosen here, so that it is known before the tracker has answered.

    Raises:
        ConfigError: the tracker is not installed, or its installation is broken.
    """

    name: str
    """The tracker's: that of its package and of the setting that switches it on."""

    def __init__(self, config: Config, run_id: str | None = None) -> None:
        try:
            self.package: Any = import_module(self.name)
        except Exception as error:  # a broken installation raises anything
            missing = isinstance(error, ModuleNotFoundError) and error.name == self.name
            problem = "is not installed" if missing else f"can't be imported ({type(error).__name__}: {error})"
            fix = f"pip install {self.name}, or set metrics.{self.name}=false"
            raise ConfigError(f"metrics.{self.name} is on, but {self.name} {problem}: {fix}") from error
        self.config, self.run_id = config, run_id or secrets.token_hex(4)
        self._records: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUE_RECORDS)
        self._has_warned = False
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    def open(self) -> Any:
        """Start or continue the run, in the thread; the result has `log` and `finish`. Raises anything."""
        raise NotImplementedError

    def send(self, run: Any, step: int, metrics: dict[str, Any]) -> None:
        """Log `metrics` in `run`, in the thread. Raises anything."""
        run.log(metrics, step=step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue every metric that has a value."""
        if self._thread.is_alive():
            self._put((step, {name: value for name, value in metrics.items() if value is not None}))

    def rewind(self, step: int) -> None:
        """Does nothing: trackers can't remove points, and show both the old and the new ones of a step."""

    def close(self) -> None:
        """Finish the run, if the tracker can within `FINISH_SECONDS`."""
        self._put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self.warn(f"{self.name} doesn't finish; training doesn't wait for it")

    def warn(self, message: str) -> None:
        """Log a warning, the first time."""
        if not self._has_warned:
            log.warning("%s. Training continues, and metrics.jsonl has all figures", message)
        self._has_warned = True

    def _put(self, record: tuple[int, dict[str, Any]] | None) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.warn(f"{self.name} is too slow: figures are left out there")

    def _work(self) -> None:
        try:
            run = self.open()
            while (record := self._records.get()) is not None:
                self._write(run, *record)
            run.finish()
        except Exception as error:  # whatever a tracker raises
            self.warn(f"{self.name} fails: {type(error).__name__}: {error}")

    def _write(self, run: Any, step: int, metrics: dict[str, Any]) -> None:
        try:
            if depths := depth_histogram(metrics):
                metrics["depth/histogram"] = self.package.Histogram(np_histogram=depths)
            self.send(run, step, metrics)
        except Exception as error:  # the next record may be accepted
            self.warn(f"{self.name} refuses the figures of step {step}: {type(error).__name__}: {error}")


class TrackioSink(TrackerSink):
    """One run of Trackio, continued over restarts under its name: that of the run, and `run_id`."""

    name = "trackio"

    def open(self) -> Any:
        """Start or continue the run."""
        return self.package.init(
            project=self.config.metrics.trackio_project,
            name=f"{self.config.run.name}-{self.run_id}",
            resume="allow",
            config=config_to_dict(self.config),
            embed=False,
        )
