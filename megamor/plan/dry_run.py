"""The text of `--dry-run`: parameters, FLOPs and estimated memory, from a model on the meta device (shapes only)."""

from __future__ import annotations

from dataclasses import replace

import torch

from megamor.config import Config, CustomRouterConfig
from megamor.config.derive import derive
from megamor.config.validate import validate_length
from megamor.model import build_model
from megamor.model.flops import expected_steps, nominal_flops
from megamor.parallel import resolve_backend, shard_degree
from megamor.plan.memory import step_memory

GIB = 2**30


def describe_run(config: Config, world_size: int, per_node: int | None = None) -> str:
    """Aligned lines about a validated configuration on `world_size` devices, `per_node` (default: all) on each node.

    Raises:
        ConfigError: `train.max_flops` allows fewer steps than the warm-up takes.
    """
    steps = expected_steps(config)
    validate_length(config, steps)
    derived = derive(config, world_size, expected_steps=steps)
    model = build_model(config, device="meta")
    counted = model.num_parameters()
    own = counted - derived.unique_parameters_with_embedding
    if any(isinstance(stage.config.router, CustomRouterConfig) for stage in derived.segments):
        # The formulas can't know the parameters of a user's own router; the built model does.
        derived = replace(
            derived,
            unique_parameters_with_embedding=counted,
            unique_parameters=derived.unique_parameters + own,
            effective_parameters=derived.effective_parameters + own,
        )
    else:
        assert own == 0, f"the model has {own} parameters more than the formula"
    flops = nominal_flops(config)
    seq_len = config.data.seq_len
    backend = resolve_backend(config.parallel, world_size, config.run.device != "cpu" and torch.cuda.is_available())
    if backend == "fsdp2":
        degree = shard_degree(config.parallel, world_size, per_node or world_size, counted)
        config = replace(config, parallel=replace(config.parallel, shard_degree=degree))
        backend += "" if degree == world_size else f" in groups of {degree} (HSDP)"
    memory = step_memory(config, world_size)
    states = memory.parameters + memory.gradients + memory.optimizer + memory.gathered
    lines = {
        "FLOPs": f"{flops.training / seq_len:.3e} per token in training ({flops.forward / seq_len:.3e} forward), "
        "at the configured capacities" + ("" if config.recursion.schedule == "constant" else ", in the deepest steps"),
        "memory": f"about {memory.total / GIB:.2f} GiB per device with {backend}: {states / GIB:.2f} weights, "
        f"gradients and optimizer, {memory.activations / GIB:.2f} activations, {memory.loss / GIB:.2f} loss",
    }
    width = max(len(line.split("  ")[0]) for line in derived.describe().splitlines())
    return "\n".join([derived.describe(), *(f"{name:<{width}}  {text}" for name, text in lines.items())])
