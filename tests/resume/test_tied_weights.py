"""Shared and tied weights are one tensor each: the parameter count equals the formula at every stage of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

from megamor.config import Config, ParallelConfig, RecursionConfig
from megamor.config.derive import derive
from megamor.interop.export import export_huggingface
from megamor.load import load_model
from megamor.model import build_model
from megamor.optim import build_adamw
from megamor.parallel import build_backend, init_world
from tests.distributed.harness import run_ranks
from tests.distributed.runs import preload_deepspeed, stored_tensors
from tests.resume.runs import LOSS_FREE, directory_of, fit, tiny_run, until

BACKENDS = {
    "single": ParallelConfig("single"),
    "ddp": ParallelConfig("ddp"),
    "fsdp2": ParallelConfig("fsdp2"),
    "hsdp": ParallelConfig("fsdp2", shard_degree=1),
    "zero 1": ParallelConfig("deepspeed", zero_stage=1),
    "zero 2": ParallelConfig("deepspeed", zero_stage=2),
    "zero 3": ParallelConfig("deepspeed", zero_stage=3),
}


def count(module: nn.Module) -> int:
    """Elements of all parameters, each counted once and in full if a rank holds a shard."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def counts_when_built(config: Config) -> list[int]:
    """Counts after building the model, after wrapping (with compiled blocks), and in the optimizer."""
    world = init_world(config.parallel)
    model = build_model(config)
    counted = [count(model)]
    optimizers = []

    def build_optimizer(module: nn.Module) -> object:
        optimizers.append(build_adamw(module, config.optim))
        return optimizers[0]

    config = replace(config, train=replace(config.train, compile=True))
    backend = build_backend(model, config, world, build_optimizer)  # type: ignore[arg-type]
    counted.append(count(backend.module))
    if config.parallel.backend != "deepspeed":  # whose optimizer updates flat buffers, padding included
        counted.append(sum(p.numel() for group in optimizers[0].param_groups for p in group["params"]))
    return counted


@pytest.mark.promise("R10")
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.slow if name == "zero 1" else ()) for name in BACKENDS]
)
def test_each_parameter_counts_once_everywhere(backend: str, tmp_path: Path) -> None:
    preload_deepspeed()
    world_size = 1 if backend == "single" else 2
    config = replace(
        tiny_run(tmp_path),
        parallel=BACKENDS[backend],
        router=LOSS_FREE,
        recursion=RecursionConfig(3, "middle_cycle", separate_norms=True, lora_rank=2),
    )
    formula = derive(config, world_size).unique_parameters_with_embedding
    for counted in run_ranks(counts_when_built, config, world_size=world_size):
        assert counted == [formula] * len(counted)

    assert all(fit(until(config, 2), world_size))
    assert all(fit(until(config, 3), world_size))  # loaded and saved again
    checkpoint = directory_of(config) / "checkpoints" / "latest"
    loaded = load_model(checkpoint, "cpu")
    names = {name for name, _ in loaded.model.named_parameters()}
    stored = stored_tensors(checkpoint)
    assert sum(stored[f"model.{name}"].numel() for name in names) == formula
    assert sum(tensor.numel() for name, tensor in stored.items() if name.endswith(".exp_avg")) == formula
    assert count(loaded.model) == formula

    export_huggingface(loaded.model, tmp_path / "hf")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    buffers = {name for name, _ in loaded.model.named_buffers()}
    assert (
        sum(tensor.numel() for name, tensor in exported.items() if name.removeprefix("model.") not in buffers)
        == formula
    )
