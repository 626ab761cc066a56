"""The estimate of a step's peak memory compared with the tensors that are live at once in a real step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamor.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, RecursionConfig, TrainConfig
from megamor.model import build_model
from megamor.optim import build_optimizer
from megamor.parallel import World, build_backend
from megamor.plan.memory import Memory, bytes_per_parameter, moment_bytes, step_memory
from tests.combinations import ROUTERS
from tests.live_bytes import LiveBytes

TOLERANCE = 0.10


SIZES = {
    "wide": ModelConfig(512, dim=128, num_layers=8, num_heads=4, num_kv_heads=2, ffn_dim=344, max_seq_len=256),
    "deep": ModelConfig(4096, dim=64, num_layers=14, num_heads=4, num_kv_heads=4, ffn_dim=256, max_seq_len=128),
}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "block": {"activation_checkpointing": "block"},
    "recursion": {"activation_checkpointing": "recursion"},
    "selective sdpa": {"activation_checkpointing": "selective", "selective_ops": ("sdpa",)},
    "selective sdpa mm": {"activation_checkpointing": "selective", "selective_ops": ("sdpa", "mm")},
    "selective silu": {"activation_checkpointing": "selective", "selective_ops": ("silu",)},
}
MODELS = {
    "vanilla": ("fixed", RecursionConfig()),
    "fixed": ("fixed", RecursionConfig(3, "middle_cycle")),
    "expert_choice": ("expert_choice", RecursionConfig(3, "middle_cycle")),
    "sequence": ("expert_choice", RecursionConfig(2, "sequence")),
    "share_first": ("expert_choice", RecursionConfig(3, "middle_cycle", "share_first")),
    "hybrid": ("expert_choice", RecursionConfig(3, "middle_cycle", "hybrid")),
    "halted_reuse": ("expert_choice", RecursionConfig(3, "middle_cycle", "halted_reuse")),
}


def step_config(size: str, model: str, policy: str, precision: str = "fp32") -> Config:
    """One process, four sequences in one micro-batch."""
    router, recursion = MODELS[model]
    train = TrainConfig(global_batch_size=4, micro_batch_size=4, max_steps=10, precision=precision)  # type: ignore[arg-type]
    return Config(
        model=SIZES[size],
        recursion=recursion,
        router=ROUTERS[router],
        data=DataConfig(seq_len=SIZES[size].max_seq_len, document_mask=False),
        optim=OptimConfig(warmup_steps=1),
        train=replace(train, **POLICIES[policy]),
    )


def measured_peak(config: Config) -> int:
    """Bytes of live tensors (parameters, moments, gradients, activations) at the peak of a step."""
    torch.manual_seed(0)
    model = build_model(config)
    world = World(0, 1, 0, torch.device("cpu"))
    backend: Any = build_backend(model, config, world, lambda module: build_optimizer(module, config))
    ids = torch.randint(config.model.vocab_size, (config.train.micro_batch_size, config.data.seq_len + 1))
    moments = [value for state in backend.optimizer.state.values() for value in state.values()]
    with LiveBytes([*model.parameters(), *moments]) as live:
        with backend.forward_context():
            out = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            loss = out.loss_sum / ids.numel() + sum(out.router_losses.values())
        backend.backward(loss, last_micro_batch=True)
        del out, loss
        backend.step(1.0)
    return live.peak


def assert_close(estimate: Memory, measured: int) -> None:
    assert estimate.total == pytest.approx(measured, rel=TOLERANCE), estimate


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("size", "precision", "model"),
    [
        *(("wide", "fp32", model) for model in MODELS),
        *(("deep", "fp32", model) for model in ("vanilla", "expert_choice")),
        *(("wide", "bf16", model) for model in ("vanilla", "expert_choice", "share_first")),
    ],
)
def test_peak_of_a_step(size: str, precision: str, model: str, policy: str) -> None:
    config = step_config(size, model, policy, precision)
    assert_close(step_memory(config, 1, on_gpu=False), measured_peak(config))


@pytest.mark.parametrize(
    ("backend", "options", "precision", "expected"),
    [
        ("single", {}, "fp32", 4 + 8 + 4),
        ("single", {}, "bf16", 4 + 8 + 4 + 2),
        ("ddp", {}, "bf16", 4 + 8 + 4 + 2),
        ("fsdp2", {}, "bf16", (4 + 8 + 4) / 8),
        ("fsdp2", {"shard_degree": 4}, "bf16", (4 + 8 + 4) / 4),
        ("fsdp2", {"reshard_after_forward": False}, "bf16", (4 + 8 + 4) / 8 + 2),
        ("fsdp2", {"reshard_after_forward": False}, "fp32", (4 + 8 + 4) / 8 + 4),
        ("deepspeed", {"zero_stage": 0}, "bf16", 4 + 8 + 4 + 4 + 2),
        ("deepspeed", {"zero_stage": 1}, "bf16", 2 + (4 + 8 + 4) / 8 + 2 + 4),
        ("deepspeed", {"zero_stage": 2}, "fp32", 4 + (4 + 8 + 4) / 8 + 4),
        ("deepspeed", {"zero_stage": 3}, "bf16", (2 + 4 + 8 + 4) / 8 + 2 + 2),
    ],
)
def test_bytes_a_parameter(backend: str, options: dict, precision: str, expected: float) -> None:
    """Sizes of the tensors that live throughout, or for most of, a step; calculated by hand."""
    parallel = ParallelConfig(backend=backend, **options)  # type: ignore[arg-type]
    config = step_config("wide", "vanilla", "none", precision)
    config = replace(config, parallel=parallel, train=replace(config.train, global_batch_size=32))
    held = bytes_per_parameter(config, 1 if backend == "single" else 8)
    found = held.weights + held.optimizer + held.gradients + held.buckets + held.whole + held.copies
    assert found == pytest.approx(expected)


def test_accumulated_gradients_are_whole() -> None:
    config = replace(step_config("wide", "vanilla", "none"), parallel=ParallelConfig(backend="fsdp2"))
    config = replace(config, train=replace(config.train, global_batch_size=64))
    assert (bytes_per_parameter(config, 16).buckets, bytes_per_parameter(config, 16).gradients) == (0, 4 / 16)
    assert (bytes_per_parameter(config, 8).buckets, bytes_per_parameter(config, 8).gradients) == (4, 4 / 8)


def test_parts_follow_what_they_depend_on() -> None:
    base = replace(step_config("wide", "expert_choice", "none"), parallel=ParallelConfig(backend="fsdp2"))

    def memory(world_size: int, micro_batch_size: int) -> Memory:
        train = replace(base.train, micro_batch_size=micro_batch_size, global_batch_size=micro_batch_size * world_size)
        return step_memory(replace(base, train=train), world_size)

    small, large, spread = memory(2, 4), memory(2, 8), memory(8, 4)
    assert large.activations == pytest.approx(2 * small.activations)
    assert (large.parameters, large.optimizer) == (small.parameters, small.optimizer)
    assert spread.optimizer == small.optimizer / 4
    assert spread.activations == small.activations


def test_muon_has_one_moment_and_the_average_is_one_more() -> None:
    config = step_config("wide", "fixed", "none")
    config = replace(config, optim=replace(config.optim, kind="muon", average_decay=0.9))
    model = build_model(config)
    backend: Any = build_backend(
        model, config, World(0, 1, 0, torch.device("cpu")), lambda module: build_optimizer(module, config)
    )
    states = [value for state in backend.optimizer.state.values() for key, value in state.items() if key != "step"]
    held = sum(value.nbytes for value in states) + sum(
        value.nbytes for name, value in backend.average.tensors.items() if name != "average.updates"
    )
    assert moment_bytes(config) * model.num_parameters() == pytest.approx(held)
    assert moment_bytes(replace(config, optim=OptimConfig())) == 8
    fractions = bytes_per_parameter(replace(config, parallel=ParallelConfig(backend="fsdp2")), 2)
    assert fractions.optimizer == pytest.approx(moment_bytes(config) / 2)


@pytest.mark.parametrize("policy", ["none", "block"])
def test_peak_of_a_step_with_muon(policy: str) -> None:
    config = step_config("wide", "fixed", policy)
    config = replace(config, optim=replace(config.optim, kind="muon"))
    assert_close(step_memory(config, 1, on_gpu=False), measured_peak(config))
