"""Runs whose depth changes: resumed to the last bit, the same on any number of processes, known to what loads them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.config import CheckpointConfig, Config, DepthStep, FixedDepthConfig, ParallelConfig
from megamor.config.depth import recursions_at
from megamor.interop.export import export_huggingface
from megamor.load import load_model
from megamor.model import build_model
from megamor.model.flops import expected_steps
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

GROWTH = (DepthStep(0.0, 1), DepthStep(0.35, 2), DepthStep(0.7, 3))
DEPTHS = [1, 1, 1, 2, 2, 2, 3, 3]  # of the eight steps; 0.35 · 8 = 2.8, 0.7 · 8 = 5.6


def scheduled(config: Config, **recursion: Any) -> Config:
    growth = recursion or {"schedule": "steps", "schedule_steps": GROWTH}
    own = {"recursion_embedding": True, "input_injection": True}
    return replace(config, recursion=replace(config.recursion, **own, **growth))  # type: ignore[arg-type]


def depths(config: Config) -> list[int]:
    return [record["train/recursions"] for record in trace(config).steps]


@pytest.mark.parametrize(
    ("parallel", "router", "stop"),
    [
        pytest.param(ParallelConfig("single"), EXPERT_CHOICE, 3, id="single, at a change"),
        pytest.param(ParallelConfig("single"), ROUTERS["skip_forward_recurse"], 5, id="single, a router that draws"),
        pytest.param(ParallelConfig("fsdp2"), LOSS_FREE, 4, id="fsdp2, in between"),
        pytest.param(
            ParallelConfig("deepspeed", zero_stage=3),
            EXPERT_CHOICE,
            6,
            id="zero 3, at a change",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resume_across_a_change_of_depth(tmp_path: Path, parallel: ParallelConfig, router: Any, stop: int) -> None:
    straight = scheduled(replace(tiny_run(tmp_path, eval_every=4), router=router, parallel=parallel))
    stopped = named(straight, "stopped")
    world_size = 1 if parallel.backend == "single" else 2
    fit(straight, world_size)
    fit(until(stopped, stop), world_size)
    fit(stopped, world_size)
    assert depths(straight) == DEPTHS
    assert_same_run(trace(straight), trace(stopped))


@pytest.mark.parametrize("router", [EXPERT_CHOICE, pytest.param(LOSS_FREE, marks=pytest.mark.slow)])
def test_every_backend_skips_the_same_parameters(tmp_path: Path, router: Any) -> None:
    """Two processes, sharded or not, take the steps of one; what isn't run has gradients of zero everywhere."""
    base = replace(scheduled(tiny_run(tmp_path), schedule="sampled"), router=router)
    single = named(base, "single")
    fit(single, world_size=1)
    drawn = depths(single)
    assert drawn == [recursions_at(base, 0.0, step) for step in range(8)]
    assert set(drawn) == {1, 2, 3}
    expected = trace(single)
    for parallel in (ParallelConfig("ddp"), ParallelConfig("fsdp2"), ParallelConfig("deepspeed", zero_stage=2)):
        config = replace(named(base, f"{parallel.backend}"), parallel=parallel)
        fit(config, world_size=2)
        assert depths(config) == drawn
        found = trace(config)
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_flops_are_those_that_run(tmp_path: Path) -> None:
    """The FLOPs of a step are those of its depth; a budget of them ends the run where its schedule is at its end."""
    config = replace(scheduled(tiny_run(tmp_path)), router=FixedDepthConfig())
    config = replace(config, data=replace(config.data, document_mask=False))  # or steps differ in what they attend to
    fit(config, world_size=1)
    steps = trace(config).steps
    counted = [0, *(record["throughput/executed_flops"] for record in steps)]
    costs = [later - earlier for earlier, later in pairwise(counted)]
    assert sorted(set(costs)) == [costs[0], costs[3], costs[6]]
    assert costs[3] - costs[0] == pytest.approx(costs[6] - costs[3])
    assert [record["routing/mean_depth"] for record in steps] == DEPTHS
    limited = named(config, "limited", max_steps=None, max_flops=60 * costs[6])
    by_hand = 60 * costs[6] * (0.35 / costs[0] + 0.35 / costs[3] + 0.3 / costs[6])
    assert expected_steps(limited) == pytest.approx(by_hand, abs=2)
    limited = named(limited, "limited", max_flops=8 * costs[6])
    fit(limited, world_size=1)
    found = depths(limited)
    assert found == sorted(found)
    assert set(found) == {1, 2, 3}
    assert len(found) == pytest.approx(expected_steps(limited), abs=1)


def test_a_checkpoint_knows_its_depth(tmp_path: Path) -> None:
    """In the middle of a schedule, evaluation, loading and exports run what has been trained."""
    config = replace(scheduled(tiny_run(tmp_path, eval_every=1)), router=FixedDepthConfig())
    config = replace(config, checkpoint=CheckpointConfig(every_steps=1, keep_last=10))
    fit(config, world_size=1)
    evaluated = [record["validation/held_out/mean_depth_causal"] for record in trace(config).validation]
    assert evaluated == DEPTHS
    ids = torch.arange(20).unsqueeze(0)
    for step in (3, 6, 8):
        loaded = load_model(directory_of(config) / "checkpoints" / f"step_{step:08d}", device="cpu")
        depth = DEPTHS[step - 1]
        with torch.no_grad():
            out = loaded.model(ids, mode="causal")
        assert out.depth.unique().tolist() == [depth]
        assert loaded.origin.endswith(f"(step {step}, {depth} of 3 recursions)")
        export_huggingface(loaded.model, tmp_path / f"export_{step}")
        again = load_model(tmp_path / f"export_{step}", device="cpu").model
        with torch.no_grad():
            assert torch.equal(again(ids, mode="causal").logits, out.logits)


def test_sampled_depth_is_evaluated_at_full_depth(tmp_path: Path) -> None:
    config = replace(scheduled(tiny_run(tmp_path, eval_every=1), schedule="sampled"), router=FixedDepthConfig())
    fit(config, world_size=1)
    assert {record["validation/held_out/mean_depth_causal"] for record in trace(config).validation} == {3}
    loaded = load_model(directory_of(config), device="cpu")
    assert loaded.model.recursions == 3
    assert loaded.config == build_model(loaded.config).config


def test_the_z_loss_is_logged(tmp_path: Path) -> None:
    """As a mean per label, beside the loss, which doesn't have it; the first step's by hand."""
    config = tiny_run(tmp_path, z_loss_coeff=0.01)
    fit(config, world_size=2)
    plain = named(config, "plain", z_loss_coeff=0.0)
    fit(plain, world_size=2)
    with_z, without = trace(config).steps, trace(plain).steps
    assert with_z[0]["train/loss"] == without[0]["train/loss"]
    # At first all 128 logits are nearly 0.
    assert with_z[0]["train/lm_z_loss"] == pytest.approx(0.01 * torch.tensor(128.0).log().item() ** 2, rel=0.02)
    assert with_z[-1]["train/loss"] != without[-1]["train/loss"]
    assert "train/lm_z_loss" not in without[0]
    assert {f"routing/stream_rms_{number}" for number in range(4)} <= without[0].keys()
