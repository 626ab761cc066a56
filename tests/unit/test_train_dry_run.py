"""Figures of a dry run compared with counts of the real model and arithmetic by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RecursionConfig,
    RunConfig,
    TrainConfig,
    load_config,
)
from megamor.errors import ConfigError
from megamor.model import build_model
from megamor.model.flops import nominal_flops
from megamor.plan.dry_run import describe_run

CONFIGS = Path(__file__).parents[2] / "configs"


def config(**train: Any) -> Config:
    """A recursive model small enough to build."""
    shape = {"global_batch_size": 8, "micro_batch_size": 1, "max_steps": 10, **train}
    return Config(
        model=ModelConfig(vocab_size=100, dim=32, num_layers=8, num_heads=4, num_kv_heads=2, ffn_dim=64),
        recursion=RecursionConfig(num_recursions=3, sharing="middle_cycle"),
        data=DataConfig(seq_len=64),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(**shape),
    )


def test_the_description_counts_the_real_model() -> None:
    model = build_model(config())
    unique = sum(parameter.numel() for parameter in model.parameters())
    core = sum(parameter.numel() for parameter in model.stage.blocks.parameters())  # type: ignore[union-attr]
    text = describe_run(config(), 1)
    assert f"{unique:,} unique with embedding" in text
    assert f"{unique + 2 * core - 100 * 32:,} effective (no embedding)" in text
    assert "with single" in text
    assert "10 of 512 tokens = 5,120 tokens" in text


def test_the_backend_follows_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = describe_run(replace(config()), 2)
    assert "with fsdp2" in text
    assert "4 per rank and step, 2 in parallel" in text
    assert "fsdp2 in groups of 2 (HSDP)" in describe_run(config(), 4, per_node=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, backend in (("auto", "fsdp2"), ("cuda", "fsdp2"), ("cpu", "single")):
        assert f"per device with {backend}: " in describe_run(replace(config(), run=RunConfig(device=device)), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", [8, 64, 512])
@pytest.mark.parametrize("recipe", ["mor_135m", "mor_360m", "mor_1b"])
def test_recipes_on_one_and_on_many_nodes(recipe: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the micro-batches that their files name, they divide the batch, fit into 80 GB and shard within a node."""
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    named = re.search(r"micro_batch_size: (\d+) .*, (\d+) on 512", text)
    assert named
    wanted = int(named[2]) if gpus == 512 else min(int(named[1]), 1024 // gpus)
    found = load_config(CONFIGS / f"{recipe}.yaml", [f"train.micro_batch_size={wanted}"], gpus)
    said = describe_run(found, gpus, per_node=8)
    assert ("fsdp2 in groups of 8 (HSDP)" in said) == (gpus > 8)
    assert f"{1024 // (wanted * gpus)} per rank and step, {gpus} in parallel" in said
    assert float(said.split("about ")[1].split(" GiB")[0]) < 0.92 * 80e9 / 2**30
    if gpus == 512:
        with pytest.raises(ConfigError, match="or micro_batch_size 2"):
            load_config(CONFIGS / f"{recipe}.yaml", (), gpus)


@pytest.mark.promise("R21")
def test_a_budget_of_flops_is_estimated_in_steps() -> None:
    step = nominal_flops(config(), 8).training
    limited = config(max_steps=None, max_flops=9.5 * step)
    text = describe_run(limited, 1)
    assert f"about 10 of 512 tokens = 5,120 tokens, until {9.5 * step:.3e} FLOPs are executed" in text
    assert "1 warm-up steps, decay (wsd) by the fraction of train.max_flops used" in text
    with pytest.raises(ConfigError, match="warmup_steps = 11 is more than the run's 10 steps"):
        describe_run(replace(limited, optim=OptimConfig(warmup_steps=11)), 1)
