"""How far a long pass over bytes is, for people (a bar) and for log files (a line now and then)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_SECONDS = 30.0


@contextmanager
def byte_progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show the way to `total` bytes (None: unknown) on stderr; yields a function to call with the bytes just done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(label, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(label, total=total)
        yield lambda size: bar.advance(task, size)


def _lines(label: str, total: int | None) -> Callable[[int], None]:
    started = shown = time.monotonic()
    done = 0

    def advance(size: int) -> None:
        nonlocal shown, done
        done += size
        now = time.monotonic()
        if now - shown < LINE_SECONDS:
            return
        shown = now
        share = f"{done / total:6.1%}  " if total else ""
        speed = done / (now - started)
        left = f", {(total - done) / speed:,.0f} s left" if total else ""
        print(f"{label}: {share}{done / 1e6:,.0f} MB ({speed / 1e6:,.1f} MB/s{left})", file=sys.stderr, flush=True)

    return advance
