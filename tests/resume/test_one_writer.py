"""One launch at a time writes to a run: a second is refused, a killed one succeeded, one that lost the run stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megamor import lock as lock_module
from megamor.config import CheckpointConfig, Config, config_to_yaml
from megamor.errors import DataError
from megamor.lock import Holder
from megamor.train import Trainer
from tests.distributed.harness import start_ranks
from tests.resume.runs import (
    STEPS,
    Spoil,
    _fit_here,
    checkpoint_names,
    directory_of,
    fit,
    fit_to_failure,
    tiny_run,
    trace,
    until,
    wait_for_steps,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(lock_module, "DYING_SECONDS", 0.2)
    return replace(tiny_run(tmp_path, eval_every=4), checkpoint=CheckpointConfig(every_steps=4, keep_last=10_000))


def lock_of(config: Config) -> Path:
    return directory_of(config) / "checkpoints.lock"


def contents(config: Config) -> dict[Path, int]:
    """Every file of the published checkpoints, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in directory_of(config).glob("checkpoints/step_*/*.*")}


def pretrain(config: Config) -> subprocess.Popen[str]:
    """`megamor pretrain` in one process."""
    file = Path(config.run.dir) / "run.yaml"
    file.write_text(config_to_yaml(config))
    command = [sys.executable, "-m", "megamor", "pretrain", "--config", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def broken_batch(trainer: Trainer) -> None:
    """The next batch can't be read."""

    def fail() -> None:
        raise DataError("x.bin is damaged")

    trainer.loader.next_step = fail  # type: ignore[method-assign, assignment]


def taken_over_after(step: int) -> Spoil:
    """Somebody else takes the lock while `step` is done."""

    def spoil(trainer: Trainer) -> None:
        update = trainer.backend.step

        def interrupted(max_grad_norm: float) -> object:
            if trainer.progress.step == step - 1:
                assert trainer.lock is not None
                other = replace(Holder.of_this_process(trainer.lock.path.parent), host="node7", pid=12)
                trainer.lock.path.write_text(json.dumps(asdict(other)))
            return update(max_grad_norm)

        trainer.backend.step = interrupted  # type: ignore[method-assign, assignment]

    return spoil


@pytest.mark.promise("R20")
def test_a_second_launch_is_refused_and_a_killed_one_is_succeeded(base: Config) -> None:
    long = replace(base, train=replace(base.train, max_steps=100_000))
    (holder, _), (other, _) = ranks = start_ranks(_fit_here, long, None, 0, world_size=2)
    try:
        wait_for_steps(long, 5)
        before, lock = contents(long), lock_of(long).read_text()
        first, second = fit_to_failure(long)
        assert first == second
        assert first.startswith(f"InUseError: rank 0: another process is writing the run {directory_of(long)}: ")
        assert f"process {holder.pid} on {os.uname().nodename}, since " in first
        assert "wait for it, stop it, or choose another run.name" in first
        assert lock_of(long).read_text() == lock
        assert before.items() <= contents(long).items()
    finally:
        for process, _ in ranks:
            process.kill()
    other.join()
    # The holder is not even waited for: a zombie doesn't write.
    steps = [record["step"] for record in trace(long).steps]
    assert steps == list(range(1, len(steps) + 1))
    assert fit(until(long, len(steps) + 1)) == [True, True]
    assert not lock_of(long).exists()
    holder.join()


@pytest.mark.promise("R20")
def test_of_two_launches_at_the_same_moment_one_trains(base: Config) -> None:
    config = replace(base, train=replace(base.train, max_steps=100))
    launches = [pretrain(config), pretrain(config)]
    ended = [(launch.communicate(timeout=120), launch.returncode) for launch in launches]
    assert sorted(status for _, status in ended) == [0, 2]
    ((refused, said),) = [(out, err) for (out, err), status in ended if status == 2]
    (winner,) = [launch for launch in launches if launch.returncode == 0]
    assert refused == ""
    assert f"InUseError: another process is writing the run {directory_of(base)}: process {winner.pid} on " in said
    assert [record["step"] for record in trace(base).steps] == list(range(1, 101))
    assert checkpoint_names(base)[-1] == "step_00000100"


@pytest.mark.promise("R20")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_launch_that_lost_the_run_publishes_nothing(base: Config, asynchronous: bool) -> None:
    config = replace(base, checkpoint=replace(base.checkpoint, asynchronous=asynchronous))
    first, second = fit_to_failure(config, spoil=taken_over_after(6))
    assert first == second
    assert "CheckpointError" in first
    assert "checkpoints.lock was taken over by process 12 on node7" in first
    assert checkpoint_names(config) == ["latest", "step_00000004"]
    assert '"node7"' in lock_of(config).read_text(), "the successor's lock stays"


@pytest.mark.promise("R20")
def test_a_launch_that_lost_the_run_stops_before_its_next_save(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.02)
    config = replace(base, train=replace(base.train, max_steps=100_000), checkpoint=CheckpointConfig(every_steps=10**6))
    first, second = fit_to_failure(config, spoil=taken_over_after(6))
    assert first == second
    assert first.startswith("TrainingError: rank 0: ")
    assert "was taken over by process 12 on node7, since " in first
    assert first.endswith(f"so this process no longer writes to the run {directory_of(config)}")
    assert checkpoint_names(config) == []


def test_the_lock_is_given_back_after_success_and_after_an_error(base: Config) -> None:
    assert fit(base, world_size=1) == [True]
    assert trace(base).steps[-1]["step"] == STEPS
    assert not lock_of(base).exists()
    ended = fit_to_failure(replace(base, train=replace(base.train, max_steps=12)), spoil=broken_batch)
    assert ended == ["DataError: rank 0: x.bin is damaged"] * 2
    assert not lock_of(base).exists()
    # An error before the first step, in a process that ends as usual.
    launch = pretrain(replace(base, model=replace(base.model, ffn_dim=128)))
    assert "ffn_dim" in launch.communicate(timeout=120)[1]
    assert launch.returncode == 2
    assert not lock_of(base).exists()
