"""A run that was stopped and resumed equals the run that was never stopped, to the last bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megamor.config import CheckpointConfig, ParallelConfig, RouterConfig
from tests.combinations import ROUTERS
from tests.resume.runs import (
    EXPERT_CHOICE,
    LOSS_FREE,
    assert_same_run,
    directory_of,
    fit,
    named,
    tiny_run,
    trace,
    until,
)

STOP = 3  # odd, so that a bias that moves up or down in each step isn't back at zero
CASES = [
    pytest.param(ParallelConfig("single"), EXPERT_CHOICE, id="single"),
    pytest.param(ParallelConfig("ddp"), EXPERT_CHOICE, id="ddp"),
    pytest.param(ParallelConfig("fsdp2"), EXPERT_CHOICE, id="fsdp2"),
    pytest.param(ParallelConfig("fsdp2"), LOSS_FREE, id="fsdp2, router with a buffer"),
    pytest.param(ParallelConfig("fsdp2", shard_degree=1), LOSS_FREE, id="hsdp 2 x 1, router with a buffer"),
    pytest.param(ParallelConfig("fsdp2", shard_degree=2), EXPERT_CHOICE, id="hsdp 2 x 2"),
    pytest.param(ParallelConfig("deepspeed", zero_stage=0), EXPERT_CHOICE, id="zero 0"),
    pytest.param(ParallelConfig("deepspeed", zero_stage=1), EXPERT_CHOICE, id="zero 1"),
    pytest.param(ParallelConfig("deepspeed", zero_stage=2), LOSS_FREE, id="zero 2, router with a buffer"),
    pytest.param(ParallelConfig("deepspeed", zero_stage=3), EXPERT_CHOICE, id="zero 3"),
]


@pytest.mark.promise("R1", "R9")
@pytest.mark.parametrize(("parallel", "router"), CASES)
def test_resume_is_bitwise(tmp_path: Path, parallel: ParallelConfig, router: RouterConfig) -> None:
    straight = replace(tiny_run(tmp_path, eval_every=4), router=router, parallel=parallel)
    stopped = named(straight, "stopped")
    world_size = {"single": 1}.get(parallel.backend, 2 * (parallel.shard_degree or 1))

    assert all(fit(straight, world_size))
    assert all(fit(until(stopped, STOP), world_size))
    assert len(trace(stopped).steps) == STOP
    if router is LOSS_FREE:
        assert trace(stopped).tensors["model.stage.router.bias"].abs().min() > 0
    assert all(fit(stopped, world_size))

    expected = trace(straight)
    assert expected.steps[-1]["train/loss"] < expected.steps[0]["train/loss"]
    assert len(expected.validation) == 2
    assert_same_run(expected, trace(stopped))


def test_checkpointing_modes_compute_the_same(tmp_path: Path) -> None:
    modes = ("none", "recursion", "block")
    runs = [named(tiny_run(tmp_path), mode, activation_checkpointing=mode) for mode in modes]
    for config in runs:
        fit(config, world_size=1)
    none, recursion, block = map(trace, runs)
    assert_same_run(none, recursion)
    assert_same_run(none, block)
    # Recomputed work counts for HFU (which needs a known peak, absent here) but not for the model's FLOPs.
    assert none.steps[-1]["throughput/executed_flops"] == block.steps[-1]["throughput/executed_flops"]


@pytest.mark.promise("R1", "R9")
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_every_router_resumes(tmp_path: Path, router: RouterConfig) -> None:
    """All state of a router, random numbers included, is in the checkpoint."""
    config = replace(tiny_run(tmp_path, max_steps=5), router=router, checkpoint=CheckpointConfig(every_steps=3))
    fit(config, world_size=1)
    straight = trace(config)
    checkpoints = directory_of(config) / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000005")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_00000003")
    fit(config, world_size=1)
    assert_same_run(straight, trace(config))
