"""Routers compute with fp32 weights in bf16 runs of every backend, also after a step and after loading a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import Config, ExpertChoiceConfig, HaltingConfig, RouterConfig, SkipForwardRecurseConfig
from megamor.routing import heads
from tests.distributed.harness import run_ranks
from tests.distributed.runs import preload_deepspeed, run_step, save, start, stored_tensors, tiny

BACKENDS: dict[str, dict[str, object]] = {
    "single": {},
    "ddp": {},
    "fsdp2": {},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
}
ROUTERS: dict[str, RouterConfig] = {
    "expert_choice": ExpertChoiceConfig(aux_coeff=0.01, head="mlp"),
    "act": HaltingConfig(),
    "skip_forward_recurse": SkipForwardRecurseConfig(hidden=16),
}


def used_weights(config: Config, checkpoint: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The weights that the router's products use in a step after a step and a load, and the stored ones."""
    backend = start(config)
    run_step(backend, 0, config)
    save(backend, checkpoint)
    run_step(backend, 1, config)
    backend.load(checkpoint)
    used: list[Tensor] = []
    linear = F.linear

    def watch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        assert x.dtype == weight.dtype == torch.float32
        used.append(weight.detach().clone())
        return linear(x, weight, bias)

    heads.F = type("F", (), {"linear": staticmethod(watch), "gelu": F.gelu})  # type: ignore[misc]
    try:
        run_step(backend, 1, config)
    finally:
        heads.F = F  # type: ignore[misc]
    return used, stored_tensors(checkpoint)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_routers_compute_with_fp32_weights(backend: str, router: str, tmp_path: Path) -> None:
    name = "deepspeed" if backend.startswith("zero") else backend
    if name == "deepspeed":
        preload_deepspeed()
    config = tiny(name, router=ROUTERS[router], precision="bf16", **BACKENDS[backend])
    world_size = 1 if backend == "single" else 2
    used, stored = run_ranks(used_weights, config, tmp_path, world_size=world_size)[0]
    weights = [value for key, value in stored.items() if key.startswith("model.stage.router.") and value.dim() == 2]
    assert weights
    for weight in weights:
        assert not torch.equal(weight, weight.bfloat16().float()), "stored in bf16"
        assert any(torch.equal(weight, other) for other in used)
    for other in used:
        assert any(torch.equal(weight, other) for weight in weights)
