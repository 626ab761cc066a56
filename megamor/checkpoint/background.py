"""A save that goes on in a thread while training does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


class BackgroundSave:
    """At most one save at a time. What it raises, it raises in the thread that waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a save was started and `wait` not called since."""
        return self._pending is not None

    @property
    def is_done(self) -> bool:
        """Whether the pending save has ended here, well or badly."""
        return self._pending is not None and self._pending.done()

    def start(self, save: Callable[[], Path]) -> None:
        """Run `save` in the thread; `wait` must have been called for the one before."""
        assert self._pending is None, "a save is in flight"
        self._pending = self._thread.submit(save)

    def wait(self) -> Path | None:
        """The published checkpoint when the pending save has ended; None if there is none. Raises what it raised."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None
