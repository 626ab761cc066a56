"""The progress display on a terminal, in a log file, and off."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from megamor.metrics import make_progress
from megamor.metrics.progress import PlainProgress, ProgressState, Smoothed, format_count, format_duration

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


def test_live_display_fits_100_columns_and_tells_everything() -> None:
    console = terminal()
    with make_progress(
        total_steps=200000, start_step=0, name="a-very-long-name-of-a-run-with-many-words", console=console
    ) as progress:
        progress.update(120000, METRICS)
        progress.message("checkpoint saved [step 120000]")
    screen = written(console)
    assert "checkpoint saved [step 120000]" in screen
    lines = [line for line in screen.splitlines() if "120000/200000" in line]
    assert lines
    assert "…" in lines[-1]
    assert "loss 5.4321  lr 3.00e-03  grad 1.20  tok/s 14.2k  depth 2.01  mem 1.25 GiB  mfu n/a" in screen
    drawn = re.split(r"[\r\n]|\x1b\[\??\d+[A-Za-z]", screen)
    assert 90 <= max(len(line) for line in drawn) <= 100


def test_plain_lines_come_at_intervals_and_the_last_is_not_lost() -> None:
    clock, console = Clock(), Console(file=io.StringIO())
    state = ProgressState("run", 100, 40, clock)
    with PlainProgress(state, console, seconds_between_lines=10) as progress:
        for step in range(41, 66):
            clock.now += 1
            progress.update(step, {"train/loss": 2.0, "throughput/mfu": 0.415})
        progress.message("saved")
    lines = written(console).splitlines()
    assert lines == [
        "step 41/100  loss 2.0000  mfu 41.5%  eta 59s",
        "step 51/100  loss 2.0000  mfu 41.5%  eta 49s",
        "step 61/100  loss 2.0000  mfu 41.5%  eta 39s",
        "saved",
        "step 65/100  loss 2.0000  mfu 41.5%  eta 35s",
    ]


def test_a_file_gets_plain_lines_and_other_ranks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress(total_steps=2, start_step=0, name="run") as progress:
        progress.update(1, METRICS)
    with make_progress(total_steps=2, start_step=0, name="run", enabled=False) as silent:
        silent.update(1, METRICS)
        silent.message("never")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 1/2  loss 5.4321  lr 3.00e-03")


def test_loss_is_smoothed_but_nan_is_seen_at_once() -> None:
    state = ProgressState("run", 10, 0, Clock())
    for step, loss in enumerate((4.0, 2.0), start=1):
        state.update(step, {"train/loss": loss})
    assert dict(state.readings())["loss"] == f"{(0.9 * 4 + 2) / 1.9:.4f}"
    state.update(3, {"train/loss": math.nan})
    assert dict(state.readings())["loss"] == "nan"
    state.update(4, {"train/lr": 0.1})
    assert dict(state.readings())["lr"] == "1.00e-01"
    state.update(5, {"train/loss": 2.0})
    assert float(dict(state.readings())["loss"]) < 3


def test_remaining_time_follows_the_recent_pace_from_the_resumed_step() -> None:
    clock = Clock()
    state = ProgressState("run", 100, 50, clock)
    assert state.remaining_seconds() is None
    clock.now += 20
    state.update(60, {})  # ten steps at once, two seconds each
    assert state.remaining_seconds() == pytest.approx(80)
    state.update(60, {})  # metrics of an evaluation
    assert state.remaining_seconds() == pytest.approx(80)


def test_smoothed_is_unbiased() -> None:
    smoothed = Smoothed(0.9)
    assert smoothed.value is None
    smoothed.add(3.0)
    assert smoothed.value == pytest.approx(3.0)
    smoothed.add(math.inf)
    assert smoothed.value == pytest.approx(3.0)


def test_formats() -> None:
    durations = (None, -1, 42, 60, 185, 3599.6, 7620, 90000)
    assert [format_duration(s) for s in durations] == ["?", "0s", "42s", "1m00s", "3m05s", "1h00m", "2h07m", "1d01h"]
    assert [format_count(v) for v in (0.4, 950, 14234, 3.1e6, 1.25e9)] == ["0", "950", "14.2k", "3.10M", "1.25G"]
