"""DeepSpeed ZeRO 0 to 3 compared with one process that sees the whole batch; what the engine saves and restores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamor.config import Config
from megamor.model import build_model
from megamor.parallel import zero_config
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    EXPERT_CHOICE,
    FIXED_DEPTH,
    LOSS_FREE,
    StepResult,
    assert_resumes_bitwise,
    digest,
    fresh_run,
    mark_buffers,
    preload_deepspeed,
    relative_differences,
    run_step,
    save,
    start,
    stored_tensors,
    tiny,
)

STAGES = (0, 1, 2, 3)
# Each runs different code in DeepSpeed: stage 0 steps the plain optimizer; stage 1 shares a class with stage 2 in fp32
# and has its own in bf16.
KINDS = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


@pytest.fixture(scope="module", autouse=True)
def deepspeed_before_forking() -> None:
    preload_deepspeed()


@pytest.fixture(autouse=True)
def shard_small_parameters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_config, "PERSIST_BELOW", 100)
    monkeypatch.setattr(zero_config, "BUCKET_ELEMENTS", 6000)  # several buckets, and an embedding that exceeds one


@pytest.fixture(scope="module")
def one_process() -> dict[str, list[StepResult]]:
    """One process, one micro-batch."""
    configs = {
        precision: tiny("single", router=FIXED_DEPTH, micro_batch_size=4, precision=precision)
        for precision in ("fp32", "bf16")
    }
    return {precision: run_ranks(fresh_run, config, world_size=1)[0] for precision, config in configs.items()}


@pytest.mark.promise("R7")
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_agree_with_one_process(stage: int, one_process: dict[str, list[StepResult]]) -> None:
    """Two micro-batches on each of two processes, compared with one micro-batch of four sequences on one process."""
    results = run_ranks(fresh_run, tiny("deepspeed", zero_stage=stage, router=FIXED_DEPTH))
    assert results[0] == results[1]
    losses, norms = relative_differences(one_process["fp32"], results[0])
    assert losses < 1e-6
    # DeepSpeed sums the squares of the norm shard by shard in fp32, which rounds differently on each processor (stage 3
    # differs by 4e-7 on one and by 1.02e-6 on another, the losses by 2e-7 on both).
    assert norms < 2e-6


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_close(stage: int, one_process: dict[str, list[StepResult]]) -> None:
    results = run_ranks(fresh_run, tiny("deepspeed", zero_stage=stage, router=FIXED_DEPTH, precision="bf16"), 8)[0]
    loss_difference, _ = relative_differences(one_process["bf16"][:8], results)
    assert 0.0 < loss_difference < 1e-3


@pytest.mark.promise("R1", "R9")
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_resume_is_bitwise(stage: int, precision: str, tmp_path: Path) -> None:
    router = EXPERT_CHOICE if precision == "fp32" else LOSS_FREE
    assert_resumes_bitwise(tiny("deepspeed", zero_stage=stage, precision=precision, router=router), tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_the_weights_in_state_are_the_fp32_ones(stage: int, tmp_path: Path) -> None:
    config = tiny("deepspeed", zero_stage=stage, router=LOSS_FREE, precision="bf16")
    run_ranks(save_at_start, config, tmp_path / "zero")
    run_ranks(save_at_start, tiny("single", router=LOSS_FREE), tmp_path / "single", world_size=1)
    expected = weights_in(tmp_path / "single")
    if stage > 0:  # the engine takes its master weights from the bf16 model, except the routers'
        names = [name for name, _ in build_model(config).named_parameters()]
        parameters = {f"model.{name}" for name in names if ".router." not in name}
        assert len(parameters) < len(names)
        expected |= {name: expected[name].bfloat16().float() for name in parameters}
    assert digest(weights_in(tmp_path / "zero")) == digest(expected)


def weights_in(directory: Path) -> dict[str, Tensor]:
    """Weights and buffers of a saved state."""
    return {name: tensor for name, tensor in stored_tensors(directory).items() if name.startswith("model.")}


def save_at_start(config: Config, directory: Path) -> None:
    """Save an untrained model with buffers that bf16 would round."""
    backend = start(config)
    mark_buffers(backend)
    save(backend, directory)


@pytest.mark.promise("R8")
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_a_step_that_is_not_finite_changes_nothing(stage: int, precision: str, tmp_path: Path) -> None:
    config = tiny("deepspeed", zero_stage=stage, precision=precision)
    for norm, finite_norm in run_ranks(spoiled_step, config, tmp_path):
        assert not torch.isfinite(torch.tensor(norm))
        assert finite_norm < float("inf")
    assert digest(stored_tensors(tmp_path / "before")) == digest(stored_tensors(tmp_path / "after"))
    # This also compares the moments: one step from each of the two states gives the same weights.
    assert digest(stored_tensors(tmp_path / "next")) == digest(stored_tensors(tmp_path / "unspoiled"))


def spoiled_step(config: Config, directory: Path) -> tuple[float, float]:
    """Gradient norms of a step that the last rank spoils, and of the good step after it."""
    unspoiled = start(config)
    run_step(unspoiled, 1, config)
    run_step(unspoiled, 2, config)
    save(unspoiled, directory / "unspoiled")
    backend = start(config)
    run_step(backend, 1, config)
    save(backend, directory / "before")
    _, norm = run_step(backend, 2, config, spoil=float("nan") if backend.rank == 1 else 1.0)
    save(backend, directory / "after")
    _, finite_norm = run_step(backend, 2, config)
    save(backend, directory / "next")
    return norm, finite_norm


def test_one_process_needs_no_launcher() -> None:
    config = tiny("deepspeed", zero_stage=2)
    assert run_ranks(without_launcher, config, world_size=1)[0] == run_ranks(fresh_run, config, 3, world_size=1)[0]


def without_launcher(config: Config) -> list[StepResult]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return fresh_run(config, 3)
