"""Experiment trackers: what they have in common. `wandb_sink` and `trackio_sink` are the only modules that import one.

A tracker may lack a login or a network, raise, or hang. Training must not wait for it, and must not end with it.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from typing import Any

from megamor.metrics.sinks import Metrics, depth_histogram

log = logging.getLogger("megamor.metrics")

FINISH_SECONDS = 15.0
"""How long the end of training waits for a tracker to send the rest."""
QUEUE_RECORDS = 100_000
"""Records that may wait for a tracker that is slow or still starting."""


class TrackerSink:
    """Hands metrics to a tracker in a thread of its own. What fails there is a warning, and `metrics.jsonl` continues.

    The x axis is the metric `step`, because a tracker's own step can't go back after a restart. Steps that ran twice
    appear twice (unlike in `metrics.jsonl`).

    Args:
        run_id: the tracker's run to continue, from the checkpoint; None starts a new one. As an attribute, the id goes
            into checkpoints. It is chosen here, so that it is known before the tracker has answered.
    """

    name: str
    """The tracker's, for messages."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_RECORDS)
        self._has_warned = False
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    def open(self) -> Any:
        """Start or continue the run, in the thread; the result has `log(record)` and `finish()`. Raises anything."""
        raise NotImplementedError

    def histogram(self, counts: list[float], edges: list[float]) -> Any:
        """The tracker's own histogram."""
        raise NotImplementedError

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue every metric that has a value, and the histogram of depths."""
        record: dict[str, Any] = {"step": step, **{name: value for name, value in metrics.items() if value is not None}}
        if self._thread.is_alive():
            self._put(record)

    def rewind(self, step: int) -> None:
        """Does nothing: trackers can't remove points, and show both the old and the new ones of a step."""

    def close(self) -> None:
        """Finish the run, if the tracker can within `FINISH_SECONDS`."""
        self._put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self.warn(f"{self.name} doesn't finish; training doesn't wait for it", always=True)

    def warn(self, message: str, *, always: bool = False) -> None:
        """Log a warning, only the first one unless it is to be seen `always`."""
        if always or not self._has_warned:
            log.warning("%s. Training continues, and metrics.jsonl has all figures", message)
        self._has_warned = True

    def _put(self, record: dict[str, Any] | None) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.warn(f"{self.name} is too slow: figures are left out there")

    def _work(self) -> None:
        try:
            run = self.open()
            while (record := self._records.get()) is not None:
                self._write(run, record)
            run.finish()
        except Exception as error:  # whatever a tracker raises
            self.warn(f"{self.name} fails: {type(error).__name__}: {error}")

    def _write(self, run: Any, record: dict[str, Any]) -> None:
        try:
            depths = depth_histogram(record)
            run.log({**record, "depth/histogram": self.histogram(*depths)} if depths else record)
        except Exception as error:  # the next record may be accepted
            self.warn(f"{self.name} refuses the figures of step {record['step']}: {type(error).__name__}: {error}")
