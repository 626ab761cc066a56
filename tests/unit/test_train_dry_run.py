"""What a dry run promises, against counts of the real model and arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megamor.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, RecursionConfig, TrainConfig
from megamor.model import build_model
from megamor.train.dry_run import activation_bytes, describe_run, state_bytes

PARAMETERS = 1000


def config(backend: str = "auto", stage: int = 2, reshard: bool = True, **train: Any) -> Config:
    """A recursive model small enough to build."""
    shape = {"global_batch_size": 8, "micro_batch_size": 1, "max_steps": 10, **train}
    return Config(
        model=ModelConfig(vocab_size=100, dim=32, num_layers=8, num_heads=4, num_kv_heads=2, ffn_dim=64),
        recursion=RecursionConfig(num_recursions=3, sharing="middle_cycle"),
        data=DataConfig(seq_len=64),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(**shape),
        parallel=ParallelConfig(backend=backend, zero_stage=stage, reshard_after_forward=reshard),  # type: ignore
    )


@pytest.mark.parametrize(
    ("built", "world_size", "bytes_per_parameter"),
    [
        (config("single", precision="fp32"), 1, 4 + 4 + 8),
        (config("single"), 1, 4 + 4 + 8 + 2),
        (config("ddp"), 8, 4 + 4 + 8 + 2),
        (config("fsdp2"), 8, 16 / 8),
        (config("fsdp2", reshard=False), 8, 16 / 8 + 2),
        (config("fsdp2", reshard=False, precision="fp32"), 8, 16 / 8 + 4),
        (config("fsdp2", global_batch_size=16), 8, 16 / 8 + 4),
        (config("deepspeed", 0), 8, 16),
        (config("deepspeed", 1), 8, 2 + 2 + 12 / 8),
        (config("deepspeed", 2), 8, 2 + (2 + 12) / 8),
        (config("deepspeed", 3), 8, 16 / 8),
        (config("deepspeed", 2, precision="fp32"), 8, 4 + (4 + 8) / 8),
    ],
)
def test_bytes_of_the_state(built: Config, world_size: int, bytes_per_parameter: float) -> None:
    assert state_bytes(built, PARAMETERS, world_size) == pytest.approx(PARAMETERS * bytes_per_parameter)


def test_checkpointing_saves_activations() -> None:
    modes = [activation_bytes(config(activation_checkpointing=mode)) for mode in ("none", "recursion", "block")]
    assert modes[0] > max(modes[1:])
    assert activation_bytes(config(precision="fp32")) == 2 * modes[0]
    assert activation_bytes(config(micro_batch_size=2)) == 2 * modes[0]


def test_the_description_counts_the_real_model() -> None:
    model = build_model(config())
    unique = sum(parameter.numel() for parameter in model.parameters())
    core = sum(parameter.numel() for parameter in model.stage.blocks.parameters())  # type: ignore[union-attr]
    text = describe_run(config(), 1)
    assert f"{unique:,} unique with embedding" in text
    assert f"{unique + 2 * core - 100 * 32:,} effective (no embedding)" in text
    assert "with single" in text
    assert "10 of 512 tokens = 5,120 tokens" in text


def test_the_backend_follows_the_number_of_processes() -> None:
    text = describe_run(replace(config()), 2)
    assert "with fsdp2" in text
    assert "4 per rank and step, 2 in parallel" in text
