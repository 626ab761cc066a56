"""What a run would be, without running it: parameters, FLOPs and an estimate of memory, from a model of shapes only."""

from __future__ import annotations

from dataclasses import replace

from megamor.config import Config, CustomRouterConfig
from megamor.config.derive import derive
from megamor.model import build_model
from megamor.model.flops import nominal_flops, nominal_work
from megamor.model.sharing import layer_plan
from megamor.parallel import resolve_backend

GIB = 2**30


def describe_run(config: Config, world_size: int) -> str:
    """Aligned lines about a validated config on `world_size` devices; builds the model on the meta device."""
    derived = derive(config, world_size)
    model = build_model(config, device="meta")
    counted = model.num_parameters()
    own = counted - derived.unique_parameters_with_embedding
    if isinstance(config.router, CustomRouterConfig):  # what a router of the user's has, only the model knows
        derived = replace(
            derived,
            router_parameters=own,
            unique_parameters=derived.unique_parameters + own,
            effective_parameters=derived.effective_parameters + own,
        )
    else:
        assert own == 0, f"the model has {own} parameters more than the formula"
    flops = nominal_flops(config)
    seq_len = config.data.seq_len
    backend = resolve_backend(config.parallel, world_size)
    states, activations = state_bytes(config, counted, world_size), activation_bytes(config)
    lines = {
        "FLOPs": f"{flops.training / seq_len:.3e} per token in training ({flops.forward / seq_len:.3e} forward), "
        "at the configured capacities",
        "memory": f"about {(states + activations) / GIB:.2f} GiB per device with {backend}: "
        f"{states / GIB:.2f} weights, gradients and optimizer, {activations / GIB:.2f} activations",
    }
    width = max(len(line.split("  ")[0]) for line in derived.describe().splitlines())
    return "\n".join([derived.describe(), *(f"{name:<{width}}  {text}" for name, text in lines.items())])


def state_bytes(config: Config, parameters: int, world_size: int) -> float:
    """Weights, gradients and AdamW moments on one device.

    fp32 training keeps 16 bytes a parameter. bf16 adds a bf16 copy for compute: of everything under DDP and ZeRO up to
    stage 2, of the largest unit at a time where weights are sharded (not counted). Each ZeRO stage divides one part
    more among the devices (arXiv 1910.02054, section 5). FSDP2 divides all, but may keep the weights gathered
    (`parallel.reshard_after_forward: false`), and holds whole fp32 gradients while it accumulates.
    """
    backend = resolve_backend(config.parallel, world_size)
    half = config.train.precision == "bf16"
    if backend in ("single", "ddp"):
        return parameters * (18 if half else 16)
    if backend == "fsdp2":
        gathered = 0 if config.parallel.reshard_after_forward else 2 if half else 4
        accumulated = 4 if derive(config, world_size).micro_batches > 1 else 0
        return parameters * (16 / (config.parallel.shard_degree or world_size) + gathered + accumulated)
    stage = config.parallel.zero_stage
    weights, gradients, optimizer = (2, 2, 12) if half else (4, 4, 8)
    if stage == 3:
        return parameters * 16 / world_size
    shared = optimizer * (1 / world_size if stage >= 1 else 1) + gradients * (1 / world_size if stage >= 2 else 1)
    return parameters * (weights + shared)


def activation_bytes(config: Config) -> float:
    """What one micro-batch keeps for backward, from the tensors that a block saves; right within tens of percent."""
    model, plan = config.model, layer_plan(config)
    element = 2 if config.train.precision == "bf16" else 4
    kv_dim = model.num_kv_heads * model.head_dim
    # Inputs of: two norms, projections, attention (with its output), gate, up and their product, down; residuals.
    per_token = 8 * model.dim + 4 * kv_dim + 4 * model.ffn_dim
    tokens = config.train.micro_batch_size * config.data.seq_len
    work = nominal_work(config, config.train.micro_batch_size)
    visits = sum(selected for selected, _ in work) * plan.num_core
    edges = tokens * (plan.num_prelude + plan.num_coda)
    if config.train.activation_checkpointing == "none":
        saved = (edges + visits) * per_token
    elif config.train.activation_checkpointing == "block":
        saved = (edges + visits) * model.dim + tokens * per_token
    else:
        saved = (
            edges * model.dim
            + sum(selected for selected, _ in work) * model.dim
            + tokens * per_token * max(1, plan.num_core)
        )
    return element * saved
