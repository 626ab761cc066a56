"""A run that was stopped and started again is the run that was never stopped, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megamor.config import ParallelConfig, RouterConfig
from tests.resume.runs import EXPERT_CHOICE, LOSS_FREE, STEPS, assert_same_run, fit, named, tiny_run, trace, until

CASES = [
    pytest.param("single", 0, EXPERT_CHOICE, id="single"),
    pytest.param("ddp", 0, EXPERT_CHOICE, id="ddp"),
    pytest.param("fsdp2", 0, EXPERT_CHOICE, id="fsdp2"),
    pytest.param("fsdp2", 0, LOSS_FREE, id="fsdp2, router with a buffer"),
    pytest.param("deepspeed", 1, EXPERT_CHOICE, id="zero 1"),
    pytest.param("deepspeed", 2, LOSS_FREE, id="zero 2, router with a buffer"),
    pytest.param("deepspeed", 3, EXPERT_CHOICE, id="zero 3"),
]


@pytest.mark.parametrize(("backend", "stage", "router"), CASES)
def test_resume_is_bitwise(tmp_path: Path, backend: str, stage: int, router: RouterConfig) -> None:
    parallel = ParallelConfig(backend=backend, zero_stage=stage)  # type: ignore[arg-type]
    straight = replace(tiny_run(tmp_path, eval_every=4), router=router, parallel=parallel)
    stopped = named(straight, "stopped")
    world_size = 1 if backend == "single" else 2

    assert all(fit(straight, world_size))
    assert all(fit(until(stopped, STEPS // 2), world_size))
    assert len(trace(stopped).steps) == STEPS // 2
    assert all(fit(stopped, world_size))

    expected = trace(straight)
    assert expected.steps[-1]["train/loss"] < expected.steps[0]["train/loss"]
    assert len(expected.validation) == 2
    assert_same_run(expected, trace(stopped))
    if router is LOSS_FREE:
        assert trace(stopped).tensors["model.stage.router.bias"].abs().sum() > 0
