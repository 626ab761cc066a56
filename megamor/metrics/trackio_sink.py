"""Metrics for Trackio, a local dashboard. Only this module imports trackio, and only if `metrics.trackio` is set."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megamor.config import Config, config_to_dict
from megamor.errors import ConfigError
from megamor.metrics.trackers import TrackerSink


class TrackioSink(TrackerSink):
    """One run of Trackio, continued over restarts under its name: the run's, and a random number.

    Raises:
        ConfigError: trackio is not installed.
    """

    name = "trackio"

    def __init__(self, config: Config, run_id: str | None = None) -> None:
        try:
            self._trackio = import_module("trackio")
        except ImportError as error:
            raise ConfigError("metrics.trackio is on, but trackio is not installed: pip install trackio") from error
        self._config = config
        super().__init__(run_id)

    def open(self) -> Any:
        """Start or continue the run."""
        metrics = self._config.metrics
        return self._trackio.init(
            project=metrics.trackio_project,
            name=f"{self._config.run.name}-{self.run_id}",
            resume="allow",
            config=config_to_dict(self._config),
            embed=False,
        )

    def histogram(self, counts: list[float], edges: list[float]) -> Any:
        """A `trackio.Histogram`."""
        return self._trackio.Histogram(np_histogram=(counts, edges))
