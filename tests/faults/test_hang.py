"""A rank that freezes: the others notice, report when they last heard from each rank, and exit with the requeue
status; so does the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megamor.config import Config, config_to_yaml
from megamor.train import EXIT_INTERRUPTED
from megamor.train.watchdog import Watchdog
from tests.distributed.harness import free_port
from tests.resume.runs import directory_of, fit, named, tiny_run, trace, until, wait_for_steps

ROOT = Path(__file__).parents[2]
TIMEOUT = 3.0


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run too long to finish, with a watchdog that waits for a few seconds only."""
    return tiny_run(tmp_path, max_steps=100_000, eval_every=200_000, hang_timeout_seconds=TIMEOUT)


@contextmanager
def ranks(config: Config) -> Iterator[list[subprocess.Popen]]:
    """Two ranks of a run without a launcher; killed at the end."""
    file = Path(config.run.dir) / "config.yaml"
    file.write_text(config_to_yaml(config))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "pretrain.py", "--config", file],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_frozen_rank_ends_the_run_with_the_requeue_status(config: Config) -> None:
    with ranks(config) as (first, second):
        wait_for_steps(config, 3)
        second.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        printed, _ = first.communicate(timeout=60)
        took = time.monotonic() - frozen_at
    assert first.returncode == EXIT_INTERRUPTED
    assert TIMEOUT < took < 45, "on a busy machine too, and far sooner than collectives give up"
    assert "rank 0 hangs: step" in printed
    assert 'File "' in printed  # the stack of each thread
    assert "train_step" in printed or "next_batch" in printed or "finish" in printed
    heard_of = printed.split("Last heartbeats:")[1]
    assert heard_of.index("rank_1:") < heard_of.index("rank_0:")  # the rank that was silent longest is listed first
    heartbeats = directory_of(config) / "heartbeats"
    assert "in fit" in (heartbeats / "stacks_0.txt").read_text()
    assert json.loads((heartbeats / "rank_1.json").read_text())["pid"] == second.pid


@pytest.mark.slow
def test_the_launcher_exits_with_the_requeue_status_too(config: Config) -> None:
    file = Path(config.run.dir) / "config.yaml"
    file.write_text(config_to_yaml(config))
    command = [sys.executable, "-m", "megamor", "launch", "--processes", "2", "--port", str(free_port())]
    launcher = subprocess.Popen(
        [*command, "--config", file],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_steps(config, 3)
        workers = psutil.Process(launcher.pid).children()
        workers[1].suspend()
        time.sleep(2 * TIMEOUT + 2)
        workers[1].resume()  # or torchrun would wait half a minute for it
        assert launcher.wait(timeout=60) == EXIT_INTERRUPTED
    finally:
        for process in [*psutil.Process(launcher.pid).children(), launcher] if launcher.poll() is None else []:
            process.kill()
        launcher.wait()


def test_a_rank_that_makes_progress_is_not_ended_if_the_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the wall clock jumps by years, in either direction, only the times in the metrics change."""
    now = time.time
    offsets = iter([0.0, 1e9, -1e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: now() + next(offsets))
    config = tiny_run(tmp_path, hang_timeout_seconds=5.0)
    assert fit(config) == [True, True]
    assert [record["step"] for record in trace(config).steps] == list(range(1, 9))
    assert all(0 <= record["throughput/step_seconds"] < 60 for record in trace(config).steps)
    stopped = named(config, "stopped")
    assert fit(until(stopped, 3)) == [True, True]
    assert fit(stopped) == [True, True]
    assert [r["train/loss"] for r in trace(stopped).steps] == [r["train/loss"] for r in trace(config).steps]


def test_heartbeats_start_with_the_first_step(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 1, 1000.0) as watchdog:
        assert not (tmp_path / "heartbeats").exists()
        watchdog.beat("step 1")
        note = json.loads((tmp_path / "heartbeats" / "rank_1.json").read_text())
    assert (note["doing"], note["pid"]) == ("step 1", os.getpid())


def test_a_watchdog_reports_only_missing_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[float] = []
    monkeypatch.setattr(Watchdog, "_report_and_exit", lambda self, silent, timeout: reported.append(silent))
    with Watchdog(tmp_path, 0, None):
        time.sleep(0.05)
    with Watchdog(tmp_path, 0, 0.4) as watchdog:
        for _ in range(20):
            watchdog.beat("step")
            time.sleep(0.05)
        assert not reported
        time.sleep(0.8)
    assert reported
    assert min(reported) > 0.4
    assert json.loads((tmp_path / "heartbeats" / "rank_0.json").read_text())["doing"] == "step"
