"""Launches with nothing left to do, and launches that fail: what is on disk afterwards, and each rank's error."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.config import CheckpointConfig, Config, ParallelConfig
from megamor.errors import DataError
from megamor.parallel import close_world, init_world
from megamor.train import Trainer, build_trainer
from tests.distributed.harness import run_ranks
from tests.resume.runs import (
    STEPS,
    assert_same_run,
    checkpoint_names,
    directory_of,
    fit,
    fit_to_failure,
    named,
    tiny_run,
    trace,
    until,
)


@pytest.fixture
def base(tmp_path: Path) -> Config:
    """A run that saves after four steps and after eight."""
    return replace(tiny_run(tmp_path, eval_every=4), checkpoint=CheckpointConfig(every_steps=4))


def at_step(step: int, action: Any) -> Any:
    """A spoil that calls `action` instead of fetching the batch that follows `step`."""

    def spoil(trainer: Trainer) -> None:
        next_step = trainer.loader.next_step
        trainer.loader.next_step = lambda: (action if trainer.progress.step == step else next_step)()  # type: ignore

    return spoil


def test_a_finished_run_says_so_and_changes_nothing(base: Config, capfd: pytest.CaptureFixture) -> None:
    assert fit(base, world_size=1) == [True]
    told = capfd.readouterr().out
    assert re.search(rf"trained +{STEPS} steps, {STEPS * 128:,} tokens in ", told)
    assert re.search(r"validation loss, held_out +topk \d\.\d{4}, causal \d\.\d{4} nats/token", told)
    assert re.search(r"depth +1\.9\d of 3 recursions per token", told)
    assert re.search(r"FLOPs executed, \d+\.\d% less than at full depth", told)
    assert f"megamor evaluate --checkpoint {directory_of(base)}/checkpoints/latest --data " in told
    before = {path: path.stat().st_mtime_ns for path in directory_of(base).rglob("*") if path.is_file()}
    capfd.readouterr()
    assert fit(base, world_size=1) == [True]
    assert f"step {STEPS} is done and the last one asked for is {STEPS}: finished" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in directory_of(base).rglob("*") if path.is_file()} == before


def test_a_stop_before_the_restored_step_does_nothing(base: Config, capfd: pytest.CaptureFixture) -> None:
    assert fit(until(base, 6), world_size=1) == [True]
    assert checkpoint_names(base) == ["latest", "step_00000004", "step_00000006"]
    capfd.readouterr()
    assert fit(until(base, 5), world_size=1) == [True]
    assert "step 6 is done and the last one asked for is 5" in capfd.readouterr().out
    assert checkpoint_names(base) == ["latest", "step_00000004", "step_00000006"]
    assert [record["step"] for record in trace(base).steps] == [1, 2, 3, 4, 5, 6]


def test_a_step_is_saved_once(base: Config) -> None:
    saved: list[int] = []

    def spoil(trainer: Trainer) -> None:
        save = trainer.checkpoints.manager.save

        def counted(step: int, *arguments: Any) -> Path:
            with (directory_of(base) / "saved").open("a") as file:
                file.write(f"{step}\n")
            return save(step, *arguments)

        trainer.checkpoints.manager.save = counted  # type: ignore[method-assign]

    fit(base, world_size=1, spoil=spoil)
    saved += map(int, (directory_of(base) / "saved").read_text().split())
    assert saved == [4, 8]


def test_an_evaluation_that_was_cut_off_is_done_by_the_next_launch(base: Config) -> None:
    whole = named(base, "whole")
    fit(whole, world_size=1)

    def spoil(trainer: Trainer) -> None:
        def killed() -> None:
            raise DataError("as good as killed")

        trainer.evaluate = killed  # type: ignore[method-assign]

    for already_done in (0, 1):
        assert fit_to_failure(base, world_size=1, spoil=spoil) == ["DataError: as good as killed"]
        assert len(trace(base).validation) == already_done
        if not already_done:
            assert fit(until(base, 7), world_size=1) == [True]
    assert fit(base, world_size=1) == [True]
    assert_same_run(trace(whole), trace(base))


@pytest.mark.parametrize("backend", ["ddp", "deepspeed"])
def test_a_loss_that_is_not_finite_ends_every_rank_and_saves_nothing(base: Config, backend: str) -> None:
    config = replace(base, parallel=ParallelConfig(backend=backend, zero_stage=1))  # type: ignore[arg-type]

    def spoil(trainer: Trainer) -> None:
        total_loss = trainer.total_loss

        def broken(*arguments: Any) -> torch.Tensor:
            return total_loss(*arguments) * (float("nan") if trainer.progress.step == 5 else 1.0)

        trainer.total_loss = broken  # type: ignore[method-assign]

    first, second = fit_to_failure(config, spoil=spoil, on_rank=1)
    assert first == second
    assert "the gradient norm of step 6 is" in first
    assert checkpoint_names(config) == ["latest", "step_00000004"]
    assert [record["step"] for record in trace(config).steps] == [1, 2, 3, 4, 5]


@pytest.mark.promise("R16")
def test_bad_data_on_one_rank_ends_every_rank(base: Config) -> None:
    def fail() -> None:
        raise DataError("x.bin holds token id 128")

    assert (
        fit_to_failure(base, spoil=at_step(5, fail), on_rank=1) == ["DataError: rank 1: x.bin holds token id 128"] * 2
    )
    assert checkpoint_names(base) == ["latest", "step_00000004"]


@pytest.mark.promise("R16")
def test_metrics_that_cannot_be_written_end_every_rank(base: Config) -> None:
    def spoil(trainer: Trainer) -> None:
        def full(step: int, metrics: Any) -> None:
            if step == 6:
                raise OSError(28, "No space left on device")

        for sink in trainer.sinks:
            sink.log = full  # type: ignore[method-assign]

    first, second = fit_to_failure(base, spoil=spoil)
    assert first == second
    assert first.startswith("TrainingError: rank 0: can't write the metrics of step 6: [Errno 28] No space left")


def start_without_tokenizer_on_rank_1(config: Config) -> str:
    if os.environ["RANK"] == "1":
        config = replace(config, data=replace(config.data, tokenizer="nowhere.json"))
    with pytest.raises(DataError) as error:
        build_trainer(config, init_world(config.parallel))
    return str(error.value)


@pytest.mark.promise("R16")
def test_an_error_of_one_rank_at_the_start_is_everybodys(base: Config) -> None:
    said = run_ranks(start_without_tokenizer_on_rank_1, base)
    first, second = said
    assert first == second
    assert first.startswith("rank 1: tokenizer nowhere.json can't be read: No such file or directory; correct the path")
    assert not directory_of(base).exists()


def meet_a_bug(config: Config) -> str:
    """How each rank ends if rank 1 has a bug in the sixth step; the group is closed as the command does it."""
    world = init_world(config.parallel)
    trainer = build_trainer(config, world)

    def fail() -> None:
        raise ZeroDivisionError("a bug")

    if world.rank == 1:
        at_step(5, fail)(trainer)
    try:
        trainer.fit()
    except (ZeroDivisionError, RuntimeError) as error:
        return type(error).__name__
    finally:
        close_world()
    return "nothing"


def test_a_bug_on_one_rank_does_not_leave_the_other_waiting(base: Config) -> None:
    started = time.monotonic()
    assert run_ranks(meet_a_bug, base, timeout=60.0) == ["RuntimeError", "ZeroDivisionError"]
    assert time.monotonic() - started < 30
    assert checkpoint_names(base) == ["latest", "step_00000004"]
