"""The progress display on a terminal, in a log file, and switched off."""

from __future__ import annotations

import io
import math
import re

from rich.console import Console

from megamor.metrics import TrainingDisplay
from megamor.progress import LOG_SECONDS, ProgressDisplay, format_bytes, format_count, format_duration

METRICS = {
    "train/loss": 5.4321,
    "train/lr": 3e-3,
    "train/grad_norm": 1.2,
    "throughput/tokens_per_second": 14234.0,
    "throughput/mfu": None,
    "routing/mean_depth": 2.01,
    "memory/peak_gib": 1.25,
    "something/else": 7.0,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def training(name: str, steps: int, start: int, console: Console, clock: Clock) -> TrainingDisplay:
    return TrainingDisplay(name, steps, start=start, enabled=True, console=console, clock=clock)


def test_a_training_run_fits_100_columns_and_shows_its_figures() -> None:
    console, clock = terminal(), Clock()
    with training("a-very-long-name-of-a-run-with-many-words", 200000, 119000, console, clock) as progress:
        progress.show(119500, METRICS)
        clock.now += 500
        progress.show(120000, METRICS)
        progress.message("checkpoint saved [step 120000]")
    screen = written(console)
    assert "checkpoint saved [step 120000]" in screen
    lines = [line for line in screen.splitlines() if "120000/200000 steps" in line]
    assert "…" in lines[-1]
    assert "1 steps/s  eta 22h13m" in lines[-1]
    assert "loss 5.4321  lr 3.00e-03  grad 1.20  tok/s 14.2k  depth 2.01  mem 1.25 GiB  mfu n/a" in screen
    drawn = re.split(r"[\r\n]|\x1b\[\??\d+[A-Za-z]", screen)
    assert 90 <= max(len(line) for line in drawn) <= 100


def test_a_log_file_gets_a_line_now_and_then_and_the_last_state() -> None:
    clock, console = Clock(), Console(file=io.StringIO())
    with training("run", 100, 40, console, clock) as progress:
        for step in range(41, 66):
            clock.now += LOG_SECONDS / 10
            progress.show(step, {"train/loss": 2.0, "throughput/mfu": 0.415})
        progress.message("saved")
    with ProgressDisplay("merging", 4e9, console=console, clock=clock) as merging:
        for _ in range(2):
            clock.now += LOG_SECONDS / 2
            merging.advance(1e9)
    lines = written(console).splitlines()
    starts = ["run: 41/100", "run: 51/100", "run: 61/100", "saved", "run: 65/100", "merging: 50.0% of 4.00 GB"]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert lines[-2] == "run: 65/100 steps  0.33 steps/s  eta 1m45s  loss 2.0000  mfu 41.5%"


def test_short_work_and_other_ranks_log_nothing() -> None:
    console = Console(file=io.StringIO())
    with ProgressDisplay("verifying", 10, console=console) as progress:
        progress.advance(10)
    with TrainingDisplay("run", 2, start=0, enabled=False, console=console) as silent:
        silent.show(1, METRICS)
        silent.message("never")
    with ProgressDisplay("run", 2, enabled=False, console=terminal()) as progress:
        progress.advance()
        progress.message("never")
    assert written(console) == ""


def test_loss_is_smoothed_but_nan_is_seen_at_once() -> None:
    console = Console(file=io.StringIO())
    clock = Clock()
    display = training("run", 10, 0, console, clock)
    for step, loss in enumerate((4.0, 2.0, math.nan, 2.0), start=1):
        clock.now += LOG_SECONDS
        display.show(step, {"train/loss": loss})
    shown = [re.search(r"loss (\S+)", line)[1] for line in written(console).splitlines()]  # type: ignore[index]
    mean = (0.9 * 4 + 2) / 1.9
    assert shown == ["4.0000", f"{mean:.4f}", "nan", f"{(0.9 * (0.9 * 4 + 2) + 2) / (0.81 + 0.9 + 1):.4f}"]


def test_formats() -> None:
    durations = (None, -1, 42, 60, 185, 3599.6, 7620, 90000)
    assert [format_duration(s) for s in durations] == ["?", "0s", "42s", "1m00s", "3m05s", "1h00m", "2h07m", "1d01h"]
    counts = (0, 0.417, 9.5, 950, 14234, 3.1e6, 1.25e9)
    assert [format_count(v) for v in counts] == ["0", "0.42", "9.5", "950", "14.2k", "3.10M", "1.25G"]
    sizes = (12, 14234, 3.1e6, 1.25e9, 2e12)
    assert [format_bytes(v) for v in sizes] == ["12 B", "14.2 kB", "3.1 MB", "1.25 GB", "2.00 TB"]
