"""Bytes that the ranks send each other in one optimizer step, for every backend.

`tests/distributed/test_traffic.py` counts them on two processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamor.config import Config
from megamor.config.derive import derive
from megamor.parallel import resolve_backend
from megamor.plan.memory import BF16, FP32, unit_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole tensors that pass through each kind of collective in a step. Scalars aren't counted.

    `all_gather` and `reduce_scatter` run among `shards` ranks, `all_reduce` among `replicas`. `rings` is the number of
    all-gathers and reduce-scatters.
    """

    shards: int
    replicas: int
    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_reduce: float = 0.0
    rings: int = 0

    @property
    def sent_among_shards(self) -> float:
        """Bytes that each rank sends in all-gathers and reduce-scatters over rings."""
        return (self.all_gather + self.reduce_scatter) * (self.shards - 1) / self.shards

    @property
    def sent_among_replicas(self) -> float:
        """Bytes that each rank sends in all-reduces, each a reduce-scatter and an all-gather."""
        return 2 * self.all_reduce * (self.replicas - 1) / self.replicas

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in all."""
        return self.sent_among_shards + self.sent_among_replicas


def step_traffic(config: Config, world_size: int) -> Traffic:
    """Traffic of one step on `world_size` ranks.

    Gradients are reduced in fp32, once a step; ZeRO-2 and 3 do so in every micro-batch. FSDP2 gathers the root once a
    step, and every unit once a step if weights are kept, else in both passes of every micro-batch. The core is one
    unit: how many recursions run, and whether they are computed again, makes no difference. ZeRO gathers once a step:
    the updated weights, or with stage 3 each weight when it is first used (which holds up to 1e9 parameters).
    """
    counts = unit_parameters(config)
    total = sum(counts.values())
    backend, micro_batches = (
        resolve_backend(config.parallel, world_size, on_gpu=True),
        derive(config, world_size).micro_batches,
    )
    element = BF16 if config.train.precision == "bf16" else FP32
    if backend == "single":
        return Traffic(1, 1)
    if backend == "fsdp2":
        shards = config.parallel.shard_degree or world_size
        # How often a step gathers a unit that isn't the root.
        passes = 2 * micro_batches if config.parallel.reshard_after_forward else 1
        replicas = world_size // shards
        across = FP32 * total / shards if replicas > 1 else 0.0
        units, gathered = len(counts), counts["root"] + passes * (total - counts["root"])
        rings = 1 + passes * (units - 1) + units
        return Traffic(shards, replicas, element * gathered, FP32 * total, across, rings)
    stage = config.parallel.zero_stage if backend == "deepspeed" else 0
    if stage == 0:
        return Traffic(1, world_size, all_reduce=FP32 * total)
    if stage == 3:
        return Traffic(world_size, 1, element * total, FP32 * total * micro_batches, 0.0, len(counts) + micro_batches)
    reductions = micro_batches if stage == 2 else 1
    return Traffic(world_size, world_size, element * total, all_reduce=FP32 * total * reductions, rings=1)
