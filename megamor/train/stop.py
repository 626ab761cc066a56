"""Stopping on request: after Ctrl-C, SIGTERM or SIGUSR1 to any rank, all ranks stop between the same two steps."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from megamor.ranks import sum_over_ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE_SECONDS = 3.0
"""Launchers forward a terminal's Ctrl-C to processes that have already received it; such echoes are ignored."""


def ignore_signals() -> None:
    """Ignore stop signals from now on, in a process that has saved and is about to exit with its own status.

    Launchers send SIGTERM to the other ranks as soon as the first one has exited.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stopped(Exception):
    """Raised on every rank to abandon what it is doing because the ranks agreed to stop."""


class StopRequest:
    """While this context is active, a signal is only recorded, until the ranks agree to stop.

    A second Ctrl-C some seconds after the first signal acts as usual: someone at the keyboard doesn't want to wait.
    Repeated SIGTERM and SIGUSR1 change nothing: schedulers and launchers repeat themselves.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective: every rank gets the same answer."""
        return any(sum_over_ranks([self.received is not None]))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # A handler may run at any moment, so it only records the signal; the next vote tells the other ranks.
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._received_at > PATIENCE_SECONDS:
            signal.signal(number, self._previous[signal.SIGINT])
            signal.raise_signal(number)
