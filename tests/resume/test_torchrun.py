"""Real launches by torchrun and `megamor launch`: signals save and stop all ranks, errors are printed once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megamor.config import Config, OptimConfig, config_to_yaml
from tests.distributed.harness import free_port
from tests.resume.runs import assert_same_run, checkpoint_names, fit, named, tiny_run, trace, until, wait_for_steps

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 120.0


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run too long to finish, with a learning rate that doesn't depend on its last step."""
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=2)
    return replace(tiny_run(tmp_path, max_steps=100_000, eval_every=200_000), optim=optim)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "pretrain.py"))


@contextmanager
def launched(config: Config, launcher: Sequence[str] = TORCHRUN) -> Iterator[subprocess.Popen]:
    """A launcher with two workers; killed with them if it still runs at the end."""
    file = Path(config.run.dir) / f"{config.run.name}.yaml"
    file.write_text(config_to_yaml(config))
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "--config", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    workers: list[int] = []
    try:
        yield process
    finally:
        workers += children(process.pid) if process.poll() is None else []
        for pid in [*workers, *([process.pid] if process.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def children(pid: int) -> list[int]:
    """Direct children of a process (Linux)."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def assert_saved_and_continues(config: Config) -> None:
    """The last logged step was saved, and the resumed run equals an uninterrupted one."""
    done = trace(config).steps[-1]["step"]
    assert checkpoint_names(config) == ["latest", f"step_{done:08d}"]
    straight = named(config, "straight")
    assert fit(until(straight, done + 2)) == [True, True]
    assert fit(until(config, done + 2)) == [True, True]
    assert_same_run(trace(straight), trace(config))


@pytest.mark.promise("R4")
def test_ctrl_c_to_torchrun(config: Config) -> None:
    with launched(config) as process:
        wait_for_steps(config, 3)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert "stopped on request after step" in printed
    assert process.returncode != 0
    assert_saved_and_continues(config)


@pytest.mark.promise("R4")
def test_a_signal_to_one_worker(config: Config) -> None:
    with launched(config) as process:
        wait_for_steps(config, 3)
        os.kill(children(process.pid)[-1], signal.SIGUSR1)
        printed, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert printed.count("stopped on request after step") == 1
    assert "exitcode  : 75" in printed
    assert "exitcode  : -" not in printed  # no worker was killed
    assert_saved_and_continues(config)


@pytest.mark.promise("R4")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGUSR1])
def test_launch_passes_a_signal_on_and_exits_with_the_workers_status(config: Config, stop: signal.Signals) -> None:
    with launched(config, ("megamor", "launch", "--processes", "2", "--port", str(free_port()))) as process:
        wait_for_steps(config, 3)
        process.send_signal(stop)
        printed, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert printed.count("stopped on request after step") == 1
    assert process.returncode == 75
    assert_saved_and_continues(config)


def test_an_error_is_printed_once(config: Config) -> None:
    with launched(replace(config, data=replace(config.data, tokenizer="nowhere.json"))) as process:
        printed, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert printed.count("nowhere.json can't be read") == 1
    assert "DataError: tokenizer nowhere.json" in printed
    assert process.returncode != 0
