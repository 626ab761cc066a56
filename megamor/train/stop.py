"""Stopping on request: Ctrl-C, SIGTERM or SIGUSR1 to any rank, agreed on by all of them between steps."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_INTERRUPTED = 75
"""Exit status of a run that saved and stopped on request (EX_TEMPFAIL of sysexits.h: start it again to go on)."""

PATIENCE_SECONDS = 3.0
"""Launchers pass a terminal's Ctrl-C on to processes that have received it already; those echoes are ignored."""


def ignore_signals() -> None:
    """Let nothing disturb a process that has saved and is about to leave with its own status.

    Launchers send SIGTERM to the other ranks as soon as the first one has left.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stopped(Exception):
    """Raised on every rank where something is given up because the ranks agreed to stop."""


class StopRequest:
    """While active, a signal is remembered until the ranks agree.

    A second Ctrl-C, seconds after the first signal, acts as usual: somebody is at the keyboard and doesn't want to
    wait. SIGTERM and SIGUSR1 that come again are schedulers and launchers repeating themselves, and change nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
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
        flag = torch.tensor(float(self.received is not None), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._received_at > PATIENCE_SECONDS:
            signal.signal(number, self._previous[signal.SIGINT])
            signal.raise_signal(number)
