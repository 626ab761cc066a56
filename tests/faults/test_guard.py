"""Bad steps: skipped on every rank without changing a bit and counted, or rolled back together with their data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.checkpoint import TrainerState
from megamor.config import CheckpointConfig, Config, GuardConfig, ParallelConfig
from megamor.errors import TrainingError
from megamor.train import Trainer
from megamor.train.guard import Guard, Verdict
from tests.distributed.runs import stored_tensors
from tests.resume.runs import (
    LOSS_FREE,
    Spoil,
    assert_same_run,
    directory_of,
    fit,
    fit_to_failure,
    named,
    tiny_run,
    trace,
    until,
)

BACKENDS = {
    "ddp": ParallelConfig("ddp"),
    "fsdp2": ParallelConfig("fsdp2"),
    "hsdp": ParallelConfig("fsdp2", shard_degree=1),
    **{f"zero{stage}": ParallelConfig("deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)},  # type: ignore
}
SKIPPING = GuardConfig(skip_non_finite=True, max_skips_in_a_row=2)


def spoiled_loss(*steps: int, factor: float = math.nan) -> Spoil:
    """Multiply a rank's gradients by `factor` in the steps after `steps`."""

    def spoil(trainer: Trainer) -> None:
        total_loss = trainer.total_loss

        def broken(*arguments: Any) -> Tensor:
            loss = total_loss(*arguments)
            return loss * factor if trainer.progress.step in steps else loss

        trainer.total_loss = broken  # type: ignore[method-assign]

    return spoil


SLOW = ("hsdp", "zero0", "zero1")


@pytest.mark.promise("R8")
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in BACKENDS]
)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, backend: str) -> None:
    base = tiny_run(tmp_path, precision="bf16" if backend == "zero2" else "fp32")
    config = replace(
        base,
        parallel=BACKENDS[backend],
        router=LOSS_FREE,  # has a buffer that changes in each step
        guard=SKIPPING,
        checkpoint=CheckpointConfig(every_steps=1, keep_last=100),
    )
    assert fit(config, spoil=spoiled_loss(4), on_rank=1) == [True, True]
    before, after, later = (checkpoint(config, step) for step in (4, 5, 6))
    assert any("exp_avg" in name for name in before)
    different = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not different
    assert [name for name, tensor in before.items() if not torch.equal(tensor, later[name])]

    steps = trace(config).steps
    assert [record["guard/skipped_steps"] for record in steps] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert not math.isfinite(steps[4]["train/grad_norm"])
    assert all(math.isfinite(record["train/loss"]) for record in steps)


def checkpoint(config: Config, step: int) -> dict[str, Tensor]:
    """All tensors of the checkpoint of `step`."""
    return stored_tensors(directory_of(config) / "checkpoints" / f"step_{step:08d}")


@pytest.mark.promise("R8", "R9", backend="fsdp2")
def test_the_guard_remembers_over_a_restart(tmp_path: Path) -> None:
    straight = replace(tiny_run(tmp_path), guard=SKIPPING)
    stopped = named(straight, "stopped")
    for config, stop in ((straight, None), (stopped, 5), (stopped, None)):
        assert fit(until(config, stop), spoil=spoiled_loss(2, 3, 6), on_rank=1) == [True, True]
    assert trace(stopped).steps[-1]["guard/skipped_steps"] == 3
    assert_same_run(trace(straight), trace(stopped))
    first, second = (component_of(config, "guard") for config in (straight, stopped))
    assert first == second
    assert len(first["losses"]) == 5


def component_of(config: Config, name: str) -> dict[str, Any]:
    """State of a component in the newest checkpoint."""
    return TrainerState.read(directory_of(config) / "checkpoints" / "latest").components[name]


@pytest.mark.promise("R8", backend="fsdp2")
def test_too_many_skips_in_a_row_end_the_run(tmp_path: Path) -> None:
    config = replace(tiny_run(tmp_path), guard=SKIPPING, checkpoint=CheckpointConfig(every_steps=2))
    first, second = fit_to_failure(config, spoil=spoiled_loss(3, 4, 5), on_rank=1)
    assert first == second
    assert "so were those of the 2 steps before" in first
    assert "the gradient norm of step 6 is nan" in first


def test_without_the_setting_the_first_one_ends_the_run() -> None:
    guard = Guard(GuardConfig())
    assert guard.judge(16, 2.0, 1.0) is Verdict.GOOD
    for loss, norm, name in ((math.nan, 1.0, "loss"), (2.0, math.inf, "gradient norm")):
        with pytest.raises(TrainingError, match=f"the {name} of step 17 is (nan|inf)"):
            guard.judge(17, loss, norm)


def test_a_loss_that_is_not_finite_after_an_update_cannot_be_skipped() -> None:
    with pytest.raises(TrainingError, match="the loss of step 3 is inf"):
        Guard(SKIPPING).judge(3, math.inf, 1.0)


ROLLING_BACK = GuardConfig(window=4, spike_threshold=5.0, spike_steps=2, rollback_steps=2, max_rollbacks=1)


def guard_after(*losses: float, config: GuardConfig = ROLLING_BACK) -> Guard:
    """A guard that has judged `losses`, all good ones, and then was saved and restored."""
    guard, restored = Guard(config), Guard(config)
    for step, loss in enumerate(losses, start=1):
        assert guard.judge(step, loss, 1.0) is Verdict.GOOD
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert restored.state_dict() == guard.state_dict()
    return restored


USUAL = (1.0, 1.2, 0.8, 1.0)  # mean 1, standard deviation 0.1414: a spike begins above 1.7071


def test_a_spike_is_measured_in_standard_deviations_of_the_window() -> None:
    assert guard_after(*USUAL, 1.70, 1.0).spiking == 0
    guard = guard_after(*USUAL, 1.71)
    assert guard.spiking == 1
    assert list(guard.losses) == list(USUAL)  # the window doesn't get used to spikes
    # Half a window is enough to judge by, less is not.
    assert guard_after(1.0, 50.0).spiking == 0
    assert guard_after(1.0, 1.0, 50.0).spiking == 1


def test_spikes_in_a_row_are_counted_over_a_restart() -> None:
    assert guard_after(*USUAL, 9.0).judge(6, 9.0, 1.0) is Verdict.SPIKE
    assert guard_after(*USUAL, 9.0, 1.0, 9.0).judge(8, 1.0, 1.0) is Verdict.GOOD


def test_the_window_keeps_its_length_over_a_restart() -> None:
    guard = guard_after(*USUAL)
    for step in range(5, 15):
        guard.judge(step, 1.0, 2.0)
    assert list(guard.losses) == [1.0] * 4
    assert list(guard.grad_norms) == [2.0] * 4
    shorter = Guard(replace(ROLLING_BACK, window=2))
    shorter.load_state_dict(guard_after(*USUAL).state_dict())
    assert list(shorter.losses) == [0.8, 1.0]


def test_skips_in_a_row_are_counted_over_a_restart() -> None:
    guard = guard_after(2.0, config=SKIPPING)
    for step, loss in ((2, math.nan), (3, math.nan), (4, 2.0), (5, math.nan), (6, math.nan)):
        guard.judge(step, loss, loss)
    restored = Guard(SKIPPING)
    restored.load_state_dict(guard.state_dict())
    assert (restored.skipped, restored.skipped_in_a_row) == (4, 2)
    with pytest.raises(TrainingError, match="so were those of the 2 steps before"):
        restored.judge(7, math.nan, math.nan)


def spiking(*samples: int) -> Spoil:
    """Make the reported loss jump in the steps that begin at one of the global samples `samples`."""

    def spoil(trainer: Trainer) -> None:
        judge = trainer.guard.judge

        def shown(step: int, loss: float, grad_norm: float) -> Verdict:
            first = trainer.loader.consumed_samples - trainer.config.train.global_batch_size
            return judge(step, loss + 10.0 * (first in samples), grad_norm)

        trainer.guard.judge = shown  # type: ignore[method-assign]

    return spoil


def both(spoil: Spoil) -> dict[str, Any]:
    """The loss is spoiled on all ranks, since all of them see the same figure."""
    return {"spoil": spoil, "on_rank": None}


@pytest.mark.promise("R8")
@pytest.mark.parametrize("backend", ["fsdp2", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_a_spike_sends_the_run_back_and_leaves_its_data_out(tmp_path: Path, backend: str) -> None:
    base = replace(
        tiny_run(tmp_path),
        parallel=BACKENDS[backend],
        guard=ROLLING_BACK,
        checkpoint=CheckpointConfig(every_steps=2, keep_last=100),
    )
    # The steps after 5 and 6 (samples 20 and 24) spike: the run returns from step 7 to the checkpoint of step 4 and
    # continues with sample 28.
    config = named(base, "spiking")
    assert fit(config, **both(spiking(20, 24))) == [True, True]
    found = trace(config).steps
    assert [record["step"] for record in found] == list(range(1, 9))
    assert [record["guard/rollbacks"] for record in found] == [0, 0, 0, 0, 1, 1, 1, 1]

    state = component_of(config, "guard")
    assert (state["left_out"], state["spiking"]) == ([[16, 28]], 0)
    # A run that resumes from the same checkpoint with these data ends with the same weights.
    reference = named(base, "reference")
    assert fit(until(reference, 4)) == [True, True]

    def without_samples(trainer: Trainer) -> None:
        trainer.loader.load_state_dict({**trainer.loader.state_dict(), "consumed_samples": 28})

    assert fit(reference, **both(without_samples)) == [True, True]
    expected = trace(reference)
    different = [n for n, t in expected.tensors.items() if not torch.equal(t, trace(config).tensors[n])]
    assert not different
    for name in ("train/loss", "train/lr", "throughput/executed_flops"):  # counts of the steps that the weights took
        assert [r[name] for r in found] == [r[name] for r in expected.steps]


def test_a_rollback_keeps_what_belongs_to_the_run(tmp_path: Path) -> None:
    """A checkpoint may be older than the run's id in a tracker."""
    base = replace(tiny_run(tmp_path), guard=ROLLING_BACK, checkpoint=CheckpointConfig(every_steps=2, keep_last=9))
    fit(until(base, 4), world_size=1)

    def spoil(trainer: Trainer) -> None:
        spiking(20, 24)(trainer)
        trainer.progress.run_ids["wandb"] = "new"
        trainer.progress.resumed_from = 4

    fit(base, world_size=1, spoil=spoil)
    state = TrainerState.read(directory_of(base) / "checkpoints" / "latest")
    assert (state.run_ids, state.resumed_from, state.step) == ({"wandb": "new"}, 4, 8)
    assert component_of(base, "guard")["left_out"] == [[16, 28]]


def test_a_rollback_needs_a_checkpoint_and_has_a_limit(tmp_path: Path) -> None:
    config = replace(tiny_run(tmp_path), guard=ROLLING_BACK)
    first, second = fit_to_failure(config, **both(spiking(20, 24)))
    assert first == second
    assert "no checkpoint is 2 steps older" in first
    config = replace(named(config, "often"), checkpoint=CheckpointConfig(every_steps=2))
    first, second = fit_to_failure(config, **both(spiking(20, 24, 36, 40)))
    assert first == second
    assert "after 1 rollbacks" in first
    # Neither does a rollback count for less if the next one goes back to before it.
    config = replace(named(config, "further back"), guard=replace(ROLLING_BACK, spike_steps=1))
    assert "after 1 rollbacks" in fit_to_failure(config, world_size=1, spoil=spiking(24, 28))[0]
