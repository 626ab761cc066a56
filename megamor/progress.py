"""The one progress display: a live bar on a terminal, a log line every 30 seconds elsewhere, nothing on other ranks.

with ProgressDisplay("merging", total=size, unit="bytes") as progress:
    for chunk in chunks:
        progress.advance(len(chunk))
        progress.message("above the bar, or a line of its own in a log")

Training, preprocessing and passes over files all use it. This module doesn't import torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

LOG_SECONDS = 30.0
"""Seconds between two lines where the output isn't a terminal."""

UNLIMITED_COLUMNS = 10_000
"""Width of output that isn't a terminal: 80 columns would break lines that another program reads."""

# Rates and remaining times are means over this many seconds: long enough for several optimizer steps of a minute each.
_RATE_SECONDS = 600.0


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no emoji, no highlights, and no wrapping except on a terminal."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = UNLIMITED_COLUMNS
    return console


class ProgressDisplay:
    """Shows how far a piece of work is. Use it as a context manager; one at a time per terminal.

    Args:
        description: what is being done, such as "merging".
        total: amount of work in `unit`; None if unknown, which leaves out percentage and remaining time.
        unit: what is counted, in the plural, such as "steps". "bytes" are shown as kB, MB, GB.
        start: amount done earlier, by the run that this one resumes.
        enabled: False shows nothing at all, messages included: for ranks other than 0.
        log_first: log the first update at once, for work whose first update is long in coming.
        console: where to print; stderr by default.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        unit: str = "bytes",
        start: int = 0,
        enabled: bool = True,
        log_first: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unit, self._enabled, self._clock = unit, enabled, clock
        self._console = console or Console(stderr=True, highlight=False)
        self._live = enabled and self._console.is_terminal
        label = Column(no_wrap=True, overflow="ellipsis", max_width=24)
        self._bar = _TwoLines(
            TextColumn("{task.description}", "bold", markup=False, table_column=label),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            _State(unit, table_column=Column(no_wrap=True, justify="right")),
            console=self._console,
            refresh_per_second=4,
            speed_estimate_period=_RATE_SECONDS,
            get_time=clock,
            # Rich computes rates and remaining time for log files too; it only mustn't draw there.
            disable=not self._live,
            expand=True,
        )
        self._id = self._bar.add_task(description, total=total, completed=start, figures={})
        self._logged_at = -math.inf if log_first else clock()
        self._lines, self._unlogged = 0, False

    def __enter__(self) -> ProgressDisplay:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()
        elif self._lines and self._unlogged:
            # Work that took long enough for lines also gets its last state; a short one stays silent.
            self._log_line()

    def advance(self, amount: float = 1, figures: Mapping[str, str] | None = None) -> None:
        """Show that `amount` more is done. `figures`: further values by label, such as {"loss": "2.13"}."""
        self.update(self.done + amount, figures)

    def update(self, done: float, figures: Mapping[str, str] | None = None) -> None:
        """Show that `done` of the total is done. Without `figures` the previous ones remain."""
        if not self._enabled:
            return
        if figures is not None:
            self._task.fields["figures"] = figures
        self._bar.update(self._id, completed=done)
        self._unlogged = True
        if not self._live and self._clock() - self._logged_at >= LOG_SECONDS:
            self._log_line()

    def message(self, text: str) -> None:
        """Print `text` above the bar, or as a line of its own."""
        if self._live:
            self._console.print(Text(text))
        elif self._enabled:
            # Not Console.print: it would wrap the line at the width that it assumes for a file.
            self._console.file.write(text + "\n")
            self._console.file.flush()

    @property
    def done(self) -> float:
        """Amount done so far, `start` included."""
        return self._task.completed

    @property
    def _task(self) -> Task:
        return self._bar.tasks[0]

    def _log_line(self) -> None:
        self._logged_at = self._clock()
        self._lines, self._unlogged = self._lines + 1, False
        figures = [f"{label} {value}" for label, value in self._task.fields["figures"].items()]
        self.message(f"{self._task.description}: " + "  ".join([*_state(self._task, self._unit), *figures]))


class _TwoLines(Progress):
    """Rich's bar, with the extra figures on a second line."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the figures if there are any."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["figures"]:
                yield Text("  ").join(
                    Text.assemble((f"{label} ", "dim"), (value, "bold"))
                    for label, value in task.fields["figures"].items()
                )


class _State(ProgressColumn):
    """Amount, rate and remaining time."""

    def __init__(self, unit: str, table_column: Column) -> None:
        super().__init__(table_column)
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("  ".join(_state(task, self._unit)))


def _state(task: Task, unit: str) -> list[str]:
    """Amount done, rate and remaining time, as far as they are known."""
    rate = task.speed
    shown = [_amount(task.completed, task.total, unit)]
    if rate:
        shown.append(f"{format_bytes(rate)}/s" if unit == "bytes" else f"{format_count(rate)} {unit}/s")
    if task.total is not None:
        left = max(0.0, task.total - task.completed) / rate if rate else None
        shown.append(f"eta {format_duration(left)}")
    return shown


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit == "bytes":
        return f"{done / total:.1%} of {format_bytes(total)}" if total else format_bytes(done)
    if total is not None and total >= 1e6:
        return f"{format_count(done)}/{format_count(total)} {unit}"
    return f"{done:.0f} {unit}" if total is None else f"{done:.0f}/{total:.0f} {unit}"


def format_duration(seconds: float | None) -> str:
    """`42s`, `3m05s`, `2h07m`, `3d04h`; `?` for None."""
    if seconds is None:
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(value: float) -> str:
    """`0.42`, `9.5`, `950`, `14.2k`, `3.10M`, `1.25G`, up to E (1e18)."""
    for power, suffix in zip(range(18, 0, -3), "EPTGMk", strict=True):
        if value >= 10**power:
            return f"{value / 10**power:.{1 if suffix == 'k' else 2}f}{suffix}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def format_bytes(value: float) -> str:
    """Decimal units: `950 B`, `14.2 kB`, `3.1 MB`, `1.25 GB`."""
    for limit, suffix, digits in ((1e12, "TB", 2), (1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if value >= limit:
            return f"{value / limit:.{digits}f} {suffix}"
    return f"{value:.0f} B"
