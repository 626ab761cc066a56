"""Checkpoints written in the background equal blocking ones, and none is lost when a write fails or the run ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamor.checkpoint import TrainerState, verify
from megamor.config import CheckpointConfig, Config, ParallelConfig
from megamor.errors import DataError
from megamor.train import Trainer
from tests.distributed.runs import digest, stored_tensors
from tests.resume.runs import (
    EXPERT_CHOICE,
    LOSS_FREE,
    STEPS,
    assert_same_run,
    checkpoint_names,
    directory_of,
    fit,
    fit_to_failure,
    named,
    signal_after,
    tiny_run,
    trace,
    until,
)

BACKENDS = [
    pytest.param(ParallelConfig("single"), EXPERT_CHOICE, id="single"),
    pytest.param(ParallelConfig("ddp"), LOSS_FREE, id="ddp"),
    pytest.param(ParallelConfig("fsdp2"), LOSS_FREE, id="fsdp2"),
    pytest.param(ParallelConfig("fsdp2", shard_degree=1), EXPERT_CHOICE, id="hsdp"),
    pytest.param(ParallelConfig("deepspeed", zero_stage=1), EXPERT_CHOICE, id="zero 1", marks=pytest.mark.slow),
    pytest.param(ParallelConfig("deepspeed", zero_stage=2), EXPERT_CHOICE, id="zero 2"),
    pytest.param(ParallelConfig("deepspeed", zero_stage=3), LOSS_FREE, id="zero 3"),
]


def asynchronous(config: Config, every_steps: int = 2) -> Config:
    """The same run, saving often and in the background."""
    return replace(config, checkpoint=CheckpointConfig(every_steps=every_steps, asynchronous=True, keep_last=100))


@pytest.fixture
def base(tmp_path: Path) -> Config:
    """A run of eight steps that is saved after every second one."""
    return asynchronous(tiny_run(tmp_path))


def slowly(trainer: Trainer, before: Callable[[int], Any]) -> None:
    """Make each save call `before(step)` in its thread before it starts."""
    save = trainer.checkpoints.manager.save

    def delayed(step: int, *arguments: Any) -> Path:
        before(step)
        return save(step, *arguments)

    trainer.checkpoints.manager.save = delayed  # type: ignore[method-assign]


def write_later(trainer: Trainer) -> None:
    """Wait for some steps before anything is written."""
    slowly(trainer, lambda step: time.sleep(0.3))


@pytest.mark.promise("R1", "R3")
@pytest.mark.parametrize(("parallel", "router"), BACKENDS)
def test_every_checkpoint_is_what_a_blocking_save_writes(base: Config, parallel: ParallelConfig, router: Any) -> None:
    config = replace(base, parallel=parallel, router=router)
    blocking = named(replace(config, checkpoint=replace(config.checkpoint, asynchronous=False)), "blocking")
    world_size = 1 if parallel.backend == "single" else 2
    assert all(fit(blocking, world_size))
    assert all(fit(until(config, 5), world_size, spoil=write_later))
    assert all(fit(config, world_size, spoil=write_later))
    assert_same_run(trace(blocking), trace(config))
    for step in (2, 4, 6, 8):
        ours, theirs = (directory_of(run) / "checkpoints" / f"step_{step:08d}" for run in (config, blocking))
        verify(ours)
        assert digest(stored_tensors(ours)) == digest(stored_tensors(theirs)), step
        where_and_when = {"code_revision": "", "run_directory": {}, "seconds": 0.0}
        states = [replace(TrainerState.read(path), **where_and_when) for path in (ours, theirs)]
        assert states[0] == states[1]


def test_training_continues_while_a_checkpoint_is_written(base: Config) -> None:
    def spoil(trainer: Trainer) -> None:
        def wait_for_a_later_step(step: int) -> None:
            deadline = time.monotonic() + 30
            while step < STEPS and trainer.progress.step == step:
                assert time.monotonic() < deadline, "training waited for the checkpoint"
                time.sleep(0.001)

        slowly(trainer, wait_for_a_later_step)

    assert fit(base, spoil=spoil, on_rank=1) == [True, True]
    assert checkpoint_names(base) == ["latest", *(f"step_{step:08d}" for step in (2, 4, 6, 8))]


@pytest.mark.promise("R3", "R16")
def test_a_write_that_fails_ends_every_rank_and_leaves_latest(base: Config) -> None:
    def spoil(trainer: Trainer) -> None:
        def take_the_name_of_the_second_shard(stage: str) -> None:
            draft = directory_of(base) / "checkpoints" / ".writing_step_00000004"
            if stage == "started" and draft.exists():
                (draft / "state" / "__1_0.distcp").mkdir(parents=True)

        trainer.checkpoints.manager.on_stage = take_the_name_of_the_second_shard

    first, second = fit_to_failure(base, spoil=spoil, on_rank=1)
    assert first == second
    assert first.startswith("CheckpointError: writing ")
    assert "Is a directory" in first
    assert checkpoint_names(base) == ["latest", "step_00000002"]
    assert os.readlink(directory_of(base) / "checkpoints" / "latest") == "step_00000002"
    assert fit(base) == [True, True]
    verify(directory_of(base) / "checkpoints" / "latest")


@pytest.mark.promise("R4")
@pytest.mark.parametrize("every_steps", [2, 3], ids=["while one is written", "at a step that is saved anyway"])
def test_a_signal_waits_for_what_is_being_written(base: Config, every_steps: int) -> None:
    config = asynchronous(base, every_steps)

    def spoil(trainer: Trainer) -> None:
        slowly(trainer, lambda step: time.sleep(0.3))
        signal_after(2, signal.SIGTERM)(trainer)

    assert fit(config, spoil=spoil, on_rank=1) == [False, False]
    expected = [f"step_{step:08d}" for step in ((2, 3) if every_steps == 2 else (3,))]
    assert checkpoint_names(config) == ["latest", *expected]
    assert os.readlink(directory_of(config) / "checkpoints" / "latest") == "step_00000003"


def test_an_error_of_the_run_does_not_lose_what_is_being_written(base: Config) -> None:
    def spoil(trainer: Trainer) -> None:
        slowly(trainer, lambda step: time.sleep(0.5))
        next_step = trainer.loader.next_step

        def fail() -> Any:
            if trainer.progress.step == 4:
                raise DataError("no more")
            return next_step()

        trainer.loader.next_step = fail  # type: ignore[method-assign]

    assert fit_to_failure(base, spoil=spoil, on_rank=0) == ["DataError: rank 0: no more"] * 2
    assert checkpoint_names(base) == ["latest", "step_00000002", "step_00000004"]
