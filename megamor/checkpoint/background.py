"""Saving in a thread while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


class BackgroundSave:
    """Runs at most one save at a time. An error in the thread is raised in the thread that calls `wait`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    @property
    def is_running(self) -> bool:
        """Whether this rank is still saving."""
        return self._pending is not None and not self._pending.done()

    def start(self, save: Callable[[], Path]) -> None:
        """Run `save` in the thread. The save before must have been waited for."""
        assert self._pending is None, "a save is in flight"
        self._pending = self._thread.submit(save)

    def wait(self) -> Path | None:
        """Wait for the pending save; returns its checkpoint, or None if there was none. Raises what it raised."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None
