"""Disks that fail during a run: every rank raises a clear error, and a rerun on a good disk is bitwise the same run."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megamor.config import Config
from megamor.train import Trainer
from tests.commands import flip_bit
from tests.resume.runs import (
    Trace,
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that saves after every second step."""
    config = tiny_run(tmp_path_factory.mktemp("disk"), eval_every=4)
    return replace(config, checkpoint=replace(config.checkpoint, every_steps=2))


@pytest.fixture(scope="module")
def straight(base: Config) -> Trace:
    """The same run on a disk without faults."""
    assert fit(base) == [True, True]
    return trace(base)


def full_at(step: int) -> Callable[[Trainer], None]:
    """Limit the files of this process to a few kilobytes once `step` steps are done."""

    def spoil(trainer: Trainer) -> None:
        save = trainer.checkpoints.save

        def limited(progress: object) -> object:
            if trainer.progress.step == step:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            return save(progress)

        object.__setattr__(trainer.checkpoints, "save", limited)

    return spoil


@pytest.mark.promise("R3", "R16", backend="fsdp2")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_on_one_rank(base: Config, straight: Trace, rank: int) -> None:
    config = named(base, f"full on rank {rank}")
    first, second = fit_to_failure(config, spoil=full_at(4), on_rank=rank)
    assert first == second
    assert f"rank {rank}: " in first
    assert "is the disk full?" in first
    assert checkpoint_names(config) == ["latest", "step_00000002"]
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))


@pytest.mark.promise("R3", backend="fsdp2")
def test_a_flipped_byte_costs_the_steps_since_the_checkpoint_before(base: Config, straight: Trace) -> None:
    config = named(base, "flipped")
    assert fit(until(config, 6)) == [True, True]
    state = max((directory_of(config) / "checkpoints" / "step_00000006" / "state").glob("*.distcp"))
    flip_bit(state, state.stat().st_size // 2)

    def begins_before(trainer: Trainer) -> None:
        assert trainer.progress.step == 4

    assert fit(config, spoil=begins_before, on_rank=None) == [True, True]
    assert_same_run(straight, trace(config))


@pytest.mark.promise("R16", backend="fsdp2")
def test_a_missing_shard_is_named_and_the_run_goes_on_when_it_is_back(base: Config, straight: Trace) -> None:
    config = named(base, "missing")
    assert fit(until(config, 4)) == [True, True]
    shard = Path(config.data.train[0].prefix + ".bin")
    hidden = shard.rename(shard.with_suffix(".away"))
    first, second = fit_to_failure(config)
    assert first == second
    assert str(shard) in first
    assert checkpoint_names(config)[-1] == "step_00000004"
    hidden.rename(shard)
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))
