"""Sinks record every metric exactly once, across kills and restarts."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megamor.config import MetricsConfig
from megamor.errors import ConfigError
from megamor.metrics import JsonlSink, TensorBoardSink, WandbSink, read_jsonl
from megamor.train.build import last_evaluation
from tests.resume.runs import tiny_run


def write_steps(path: Path, steps: range, resume_step: int | None, loss: float = 1.0) -> None:
    sink = JsonlSink(path, resume_step=resume_step)
    for step in steps:
        sink.log(step, {"train/loss": loss})
    sink.close()


def steps_and_losses(path: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["train/loss"]) for record in read_jsonl(path)]


def test_lines_are_standard_json_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=None)
    sink.log(1, {"a": 1.5, "mfu": None, "count": 3, "bad": math.nan, "worse": -math.inf})
    (line,) = path.read_text().splitlines()  # readable before close: every line is flushed
    record = json.loads(line, parse_constant=pytest.fail)
    expected = {"step": 1, "a": 1.5, "mfu": None, "count": 3, "bad": "nan", "worse": "-inf"}
    assert record == {**expected, "time": record["time"]}
    (back,) = read_jsonl(path)
    assert math.isnan(back["bad"])
    assert back["worse"] == -math.inf
    sink.close()


def test_resuming_removes_steps_that_will_be_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 9), None)
    with path.open("a") as file:
        file.write('{"step": 9, "train/lo')  # killed in the middle of a line
    with caplog.at_level(logging.WARNING):
        write_steps(path, range(6, 8), 5, loss=2.0)
    assert "4 of 9 lines removed" in caplog.text
    assert steps_and_losses(path) == [(step, 1.0) for step in range(1, 6)] + [(6, 2.0), (7, 2.0)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 3), None)
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(path, range(3, 4), 2)
    assert [step for step, _ in steps_and_losses(path)] == [1, 3]


def test_lines_of_other_programs_are_no_obstacle(tmp_path: Path) -> None:
    lines = [b'{"step": 1, "train/loss": "nan"}', b"\xff\xfe", b'{"step": 2, "note": "by hand"}', b"[1]"]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    first, second = read_jsonl(tmp_path / "m.jsonl")
    assert math.isnan(first["train/loss"])
    assert second == {"step": 2, "note": "by hand"}


def test_metrics_that_cannot_be_read_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read .*Is a directory"):
        last_evaluation(tmp_path, 3)


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(4), None)
    write_steps(path, range(2), None, loss=2.0)
    assert steps_and_losses(path) == [(0, 2.0), (1, 2.0)]


def test_failing_to_shorten_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 5), None)
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        JsonlSink(path, resume_step=2)
    assert path.read_bytes() == before


def scalars(directory: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["train/loss"], "metrics without a value make no curve"
    return [(event.step, event.value) for event in accumulator.Scalars("train/loss")]


def test_tensorboard_hides_repeated_steps(tmp_path: Path) -> None:
    for resume_step, steps, loss in ((None, range(1, 6), 1.0), (3, range(4, 6), 2.0)):
        sink = TensorBoardSink(tmp_path, resume_step=resume_step)
        for step in steps:
            sink.log(step, {"train/loss": loss, "throughput/mfu": None})
        sink.close()
    assert scalars(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_wandb_offline_keeps_the_run_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = replace(tiny_run(tmp_path), metrics=MetricsConfig(wandb=True, wandb_mode="offline"))
    run_id = None
    for launch in range(2):
        sink = WandbSink(config, tmp_path, run_id)
        assert run_id in (None, sink.run_id)
        run_id = sink.run_id
        sink.log(launch, {"train/loss": 1.0, "throughput/mfu": None})
        sink.close()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    assert any(b"train/loss" in path.read_bytes() for path in files)
    assert not any(b"throughput/mfu" in path.read_bytes() for path in files)


@pytest.mark.parametrize(("module", "make"), [("wandb", WandbSink), ("torch.utils.tensorboard", TensorBoardSink)])
def test_missing_library_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, make: type
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    arguments = {"config": tiny_run(tmp_path)} if make is WandbSink else {"resume_step": None}
    with pytest.raises(ConfigError, match=r"is not installed: pip install (wandb|tensorboard)"):
        make(directory=tmp_path, **arguments)


def test_a_broken_installation_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "can't be imported (AttributeError: no np.float_): pip install wandb, or set metrics.wandb=false"
    (tmp_path / "wandb.py").write_text("raise AttributeError('no np.float_')")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(broken)):
        WandbSink(tiny_run(tmp_path), tmp_path)


def test_importing_metrics_imports_neither_torch_nor_a_tracker() -> None:
    code = (
        "import sys, megamor.metrics, megamor.progress\nassert not {'torch', 'wandb', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
