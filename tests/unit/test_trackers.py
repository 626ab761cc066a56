"""Trackers: their own choice is the default, and training neither waits for them nor ends with them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megamor.config import Config, MetricsConfig
from megamor.errors import ConfigError
from megamor.metrics import TensorBoardSink, TrackerSink, TrackioSink, WandbSink, trackers
from tests.resume.runs import tiny_run

DEPTHS = {"depth/0": 0.0, "depth/1": 0.25, "depth/2": 0.75}


class StandIn:
    """The module of a tracker: remembers what it was told; `behave` replaces functions by name."""

    def __init__(self, **behave: Callable[..., Any]) -> None:
        self.init_with: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.finished = False
        self.behave = behave

    def module(self, name: str) -> ModuleType:
        module = ModuleType(name)
        module.init = self.init  # type: ignore[attr-defined]
        module.Histogram = lambda np_histogram: ("histogram", *np_histogram)  # type: ignore[attr-defined]
        settings = type("Settings", (), {"mode": "offline", "project": None})()
        module.setup = lambda: type("Setup", (), {"settings": settings})()  # type: ignore[attr-defined]
        module.Settings = dict  # type: ignore[attr-defined]
        return module

    def init(self, **settings: Any) -> StandIn:
        self.init_with = settings
        self._behave("init")
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, record: dict[str, Any], step: int | None = None) -> None:
        self._behave("log")
        self.logged.append(record if step is None else {"step": step, **record})

    def finish(self) -> None:
        self._behave("finish")
        self.finished = True

    def _behave(self, what: str) -> None:
        if what in self.behave:
            self.behave[what]()


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **behave: Callable[..., Any]) -> StandIn:
    tracker = StandIn(**behave)
    monkeypatch.setitem(sys.modules, name, tracker.module(name))
    return tracker


def hang() -> None:
    threading.Event().wait(60)


def fail() -> None:
    raise RuntimeError("quota exceeded")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    return tiny_run(tmp_path)


def sink_of(name: str, config: Config, run_id: str | None = None) -> TrackerSink:
    return WandbSink(config, Path(config.run.dir), run_id) if name == "wandb" else TrackioSink(config, run_id)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_figure_arrives_with_the_histogram_of_depths(
    config: Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tracker = installed(monkeypatch, name)
    sink = sink_of(name, config)
    sink.log(3, {"train/loss": 2.0, "throughput/mfu": None, **DEPTHS})
    sink.log(4, {"train/loss": 1.0})
    sink.close()
    histogram = ("histogram", [0.0, 0.25, 0.75], [-0.5, 0.5, 1.5, 2.5])
    assert tracker.logged == [
        {"step": 3, "train/loss": 2.0, **DEPTHS, "depth/histogram": histogram},
        {"step": 4, "train/loss": 1.0},
    ]
    assert tracker.finished


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("what", ["init", "log", "finish"])
@pytest.mark.parametrize("trouble", [fail, hang])
def test_training_neither_ends_with_its_tracker_nor_waits_for_it(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    what: str,
    trouble: Callable[[], None],
) -> None:
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.3)
    if trouble is hang:
        monkeypatch.setattr(trackers, "QUEUE_RECORDS", 10)  # which 100 steps fill
    installed(monkeypatch, name, **{what: trouble})
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        sink = sink_of(name, config)
        for step in range(100):
            sink.log(step, {"train/loss": 1.0})
        sink.close()
    assert time.monotonic() - began < 3.0
    warnings = [record.message for record in caplog.records if name in record.message]
    assert len(warnings) == 1, warnings
    assert "metrics.jsonl has all figures" in warnings[0]
    if trouble is fail:
        assert "quota exceeded" in warnings[0]


def test_what_is_not_configured_is_left_to_wandb(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = installed(monkeypatch, "wandb")
    sink = sink_of("wandb", config)
    sink.close()
    left_open = ("mode", "entity", "group", "job_type", "tags", "notes", "resume")
    assert {tracker.init_with[name] for name in left_open} == {None}
    assert (tracker.init_with["project"], tracker.init_with["name"]) == ("megamor", "tiny")
    assert tracker.init_with["id"] == sink.run_id

    for name in ("WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, "mine")
    sink = sink_of("wandb", config)
    sink.close()
    assert (tracker.init_with["name"], tracker.init_with["dir"], sink.run_id) == (None, None, "mine")


def test_settings_reach_wandb(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = installed(monkeypatch, "wandb")
    chosen = {"entity": "lab", "group": "sweep", "job_type": "train", "notes": "n", "project": "p", "mode": "disabled"}
    metrics = MetricsConfig(**{f"wandb_{k}": v for k, v in chosen.items()}, wandb_tags=("a", "b"))  # type: ignore[arg-type]
    sink_of("wandb", replace(config, metrics=metrics)).close()
    assert {name: tracker.init_with[name] for name in chosen} == chosen
    assert tracker.init_with["tags"] == ("a", "b")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_there(config: Config, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tracker = installed(monkeypatch, name)
    first = sink_of(name, config)
    first.close()
    identity = tracker.init_with.get("id") or tracker.init_with["name"]
    assert first.run_id in identity
    again = sink_of(name, config, first.run_id)
    again.close()
    assert again.run_id == first.run_id
    assert (tracker.init_with.get("id") or tracker.init_with["name"]) == identity
    assert tracker.init_with["resume"] == "allow"


def test_trackio_that_is_not_installed_is_one_clear_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="trackio is not installed: pip install trackio"):
        TrackioSink(config)


def test_tensorboard_has_the_histogram(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, resume_step=None)
    sink.log(1, {"train/loss": 1.0, **DEPTHS})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Histograms("depth/histogram")
    assert list(event.histogram_value.bucket_limit) == [0.5, 1.5, 2.5]
    assert list(event.histogram_value.bucket) == [0.0, 0.25, 0.75]


NO_NETWORK = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
REAL = """
import logging, sys, time
from pathlib import Path
from megamor.metrics import WandbSink, trackers, wandb_sink
from tests.resume.runs import tiny_run
logging.basicConfig(level=logging.WARNING)
wandb_sink.INIT_SECONDS, trackers.FINISH_SECONDS = 1, float(sys.argv[2])
directory = Path(sys.argv[1])
began = time.monotonic()
sink = WandbSink(tiny_run(directory), directory)
sink.log(1, {"train/loss": 1.0, "depth/0": 0.5, "depth/1": 0.5})
print("waited", time.monotonic() - began < 10.0)  # a busy machine takes seconds to import wandb
sink.close()
print("closed", time.monotonic() - began < trackers.FINISH_SECONDS + 2.0)
"""


@pytest.mark.parametrize(
    ("env", "patience", "recorded", "said"),
    [
        pytest.param({"WANDB_MODE": "offline"}, 30, 1, "", id="WANDB_MODE=offline"),
        pytest.param({"WANDB_MODE": "disabled"}, 30, 0, "", id="WANDB_MODE=disabled", marks=pytest.mark.slow),
        pytest.param({}, 30, 1, "wandb can't go online: not logged in", id="no login", marks=pytest.mark.slow),
        pytest.param(NO_NETWORK, 1, 0, "wandb doesn't finish", id="no network", marks=pytest.mark.slow),
        pytest.param(NO_NETWORK, 60, 1, "wandb can't go online", id="no network, longer", marks=pytest.mark.slow),
    ],
)
def test_wandb_itself(tmp_path: Path, env: dict[str, str], patience: int, recorded: int, said: str) -> None:
    """The library that is installed, in a process of its own: it reads its environment once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "run"), str(patience)],
        env={**clean, "HOME": str(tmp_path), **env},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[:2] == ["waited True", "closed True"]  # wandb may say something at the exit
    assert time.monotonic() - began < 60
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == recorded
    assert all(b"train/loss" in run.read_bytes() and b"histogram" in run.read_bytes() for run in runs)
    assert said in ended.stderr
    assert ended.stderr.count("Training continues") == bool(said)
