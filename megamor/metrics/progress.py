"""What a run shows while it trains: a live bar on a terminal, lines in a log file, nothing on other ranks.

with make_progress(total_steps=400, start_step=0, name="mor_135m", enabled=rank == 0) as progress:
    progress.update(step, metrics)
    progress.message("checkpoint saved: runs/x/checkpoints/step_00000100")
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megamor.metrics.sinks import Metrics

LOSS = "train/loss"


class TrainingProgress(Protocol):
    """A display of one run's progress."""

    def __enter__(self) -> TrainingProgress:
        """Start to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last state and leave the terminal as it was."""

    def update(self, step: int, metrics: Metrics) -> None:
        """Show that `step` is done, with what its metrics say; metrics that are not given keep their last value."""

    def message(self, text: str) -> None:
        """Print `text` above what is shown."""


def make_progress(
    *,
    total_steps: int,
    start_step: int,
    name: str,
    enabled: bool = True,
    console: Console | None = None,
    seconds_between_lines: float = 10.0,
) -> TrainingProgress:
    """The display that suits this process.

    Args:
        total_steps: of the whole run; `start_step` of them were done by earlier launches.
        name: of the run.
        enabled: false for nothing at all: ranks other than 0, or `metrics.progress: false`.
        console: where to print; stdout by default.
        seconds_between_lines: where it isn't a terminal.
    """
    if not enabled:
        return SilentProgress()
    console = console or Console(highlight=False)
    state = ProgressState(name, total_steps, start_step)
    if console.is_terminal:
        return LiveProgress(state, console)
    return PlainProgress(state, console, seconds_between_lines)


class SilentProgress:
    """Shows nothing."""

    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, step: int, metrics: Metrics) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


class PlainProgress:
    """Lines for a log file: the first step, then one every few seconds, and the last."""

    def __init__(self, state: ProgressState, console: Console, seconds_between_lines: float) -> None:
        self._state = state
        self._console = console
        self._seconds = seconds_between_lines
        self._printed_at = -math.inf
        self._pending = False

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pending:
            self._print()

    def update(self, step: int, metrics: Metrics) -> None:
        """Print a line if it is time."""
        self._state.update(step, metrics)
        self._pending = True
        if self._state.clock() - self._printed_at >= self._seconds:
            self._print()

    def message(self, text: str) -> None:
        """Print a line of its own."""
        self._write(text)

    def _print(self) -> None:
        state = self._state
        shown = [f"step {state.step}/{state.total_steps}", *(f"{label} {text}" for label, text in state.readings())]
        self._write("  ".join([*shown, f"eta {format_duration(state.remaining_seconds())}"]))
        self._printed_at = state.clock()
        self._pending = False

    def _write(self, text: str) -> None:
        # Not Console.print: it would wrap the line at the width that it assumes for a file.
        self._console.file.write(text + "\n")
        self._console.file.flush()


class LiveProgress:
    """A bar with the readings below it, redrawn in place; whatever else is printed appears above."""

    def __init__(self, state: ProgressState, console: Console) -> None:
        self._state = state
        self._console = console
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, step: int, metrics: Metrics) -> None:
        """Take over the values; they are drawn four times a second."""
        self._state.update(step, metrics)

    def message(self, text: str) -> None:
        """Print above the bar."""
        self._console.print(Text(text))

    def _render(self) -> RenderableType:
        state = self._state
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
        top.add_column(ratio=1)
        for _ in range(3):
            top.add_column(no_wrap=True, justify="right")
        top.add_row(
            Text(state.name, style="bold"),
            ProgressBar(total=state.total_steps, completed=state.step, complete_style="cyan", finished_style="green"),
            Text(f"{state.step}/{state.total_steps}", style="cyan"),
            Text(format_duration(state.elapsed_seconds()), style="dim"),
            Text(f"eta {format_duration(state.remaining_seconds())}"),
        )
        readings = Text("  ").join(
            Text.assemble((f"{label} ", "dim"), (text, "bold")) for label, text in state.readings()
        )
        return Group(top, readings)


class Smoothed:
    """Exponential moving average, without bias towards the start."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        """Take in a value; a non-finite one is passed over."""
        if math.isfinite(value):
            self._sum = self._decay * self._sum + (1 - self._decay) * value
            self._weight = self._decay * self._weight + (1 - self._decay)

    @property
    def value(self) -> float | None:
        """The average, None before the first value."""
        return self._sum / self._weight if self._weight else None


@dataclass(frozen=True)
class _Reading:
    """One number on display."""

    metric: str
    label: str
    format: Callable[[float], str]
    always: bool = False  # shown as n/a when it has no value


_READINGS = (
    _Reading(LOSS, "loss", lambda value: f"{value:.4f}"),
    _Reading("train/lr", "lr", lambda value: f"{value:.2e}"),
    _Reading("train/grad_norm", "grad", lambda value: f"{value:.2f}"),
    _Reading("throughput/tokens_per_second", "tok/s", lambda value: format_count(value)),
    _Reading("routing/mean_depth", "depth", lambda value: f"{value:.2f}"),
    _Reading("memory/peak_gib", "mem", lambda value: f"{value:.2f} GiB"),
    _Reading("throughput/mfu", "mfu", lambda value: f"{100 * value:.1f}%", always=True),
)


class ProgressState:
    """What is known of the run, and what of it is to be shown."""

    def __init__(
        self, name: str, total_steps: int, start_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.total_steps = total_steps
        self.step = start_step
        self.clock = clock
        self._started_at = self._stepped_at = clock()
        self._metrics: dict[str, float | None] = {}
        self._loss = Smoothed(0.9)
        self._seconds_per_step = Smoothed(0.95)

    def update(self, step: int, metrics: Metrics) -> None:
        now = self.clock()
        if step > self.step:
            self._seconds_per_step.add((now - self._stepped_at) / (step - self.step))
            self._stepped_at = now
        self.step = step
        self._metrics.update(metrics)
        loss = metrics.get(LOSS)
        if loss is not None:
            self._loss.add(loss)
            # A loss that is not a number must be seen at once, not smoothed away.
            self._metrics[LOSS] = self._loss.value if math.isfinite(loss) else loss

    def readings(self) -> list[tuple[str, str]]:
        """Label and text of every number that there is."""
        return list(_texts(self._metrics))

    def elapsed_seconds(self) -> float:
        return self.clock() - self._started_at

    def remaining_seconds(self) -> float | None:
        """From the recent time per step, pauses included; None before the first step."""
        pace = self._seconds_per_step.value
        return None if pace is None else pace * (self.total_steps - self.step)


def _texts(metrics: Mapping[str, float | None]) -> list[tuple[str, str]]:
    shown = []
    for reading in _READINGS:
        value = metrics.get(reading.metric)
        if value is not None:
            shown.append((reading.label, reading.format(value)))
        elif reading.always:
            shown.append((reading.label, "n/a"))
    return shown


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
    """`950`, `14.2k`, `3.10M`, `1.25G`."""
    for limit, suffix, digits in ((1e9, "G", 2), (1e6, "M", 2), (1e3, "k", 1)):
        if value >= limit:
            return f"{value / limit:.{digits}f}{suffix}"
    return f"{value:.0f}"
