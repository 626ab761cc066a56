"""Memory, traffic and bounds on speed of a run on given GPUs: the arithmetic of `megamor plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megamor.config import Config
from megamor.metrics.gpus import Gpu
from megamor.model.flops import expected_steps, nominal_flops
from megamor.plan.memory import Memory, moment_bytes, step_memory
from megamor.plan.traffic import Traffic, step_traffic

USABLE = 0.92
"""Fraction of a GPU's memory for a step's tensors; the rest is left to the driver, libraries and fragmentation."""

ADAMW_BYTES = 28
"""Memory traffic per parameter of an update, fp32: reads weight, gradient, two moments; writes weight and moments."""

HOP_SECONDS = 5e-6
"""Latency of a message to the next rank of a ring: an assumption, not a data sheet's figure."""

MODES = ("none", "selective", "block", "recursion")


@dataclass(frozen=True)
class Cluster:
    """`gpus` GPUs of one kind, in nodes of `per_node`."""

    gpu: Gpu
    gpus: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes, the last one possibly not full."""
        return -(-self.gpus // self.per_node)

    def bandwidth(self, ranks: int, neighbours: bool) -> float:
        """Bytes per second that each rank of a ring can send. `neighbours` share a node where they fit into one.

        Rings across nodes use all network ports of a node at once, so a rank gets their sum, limited by its own link.
        """
        if ranks <= self.per_node and (neighbours or self.nodes == 1):
            return self.gpu.link
        ports = 1 if not neighbours else min(self.per_node, self.gpus)
        return min(self.gpu.link, self.gpu.network * ports)


def variants(config: Config, cluster: Cluster) -> Iterator[tuple[str, Config]]:
    """The configuration under every backend that suits the cluster and every checkpointing policy, with its name."""
    backends: dict[str, dict[str, object]] = {"single": {"backend": "single"}}
    if cluster.gpus > 1:
        backends = {
            "ddp": {"backend": "ddp"},
            "fsdp2": {"backend": "fsdp2", "shard_degree": cluster.gpus, "reshard_after_forward": True},
            "fsdp2, kept": {"backend": "fsdp2", "shard_degree": cluster.gpus, "reshard_after_forward": False},
            **{f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
        }
        if cluster.nodes > 1 and cluster.gpus % cluster.per_node == 0:
            hsdp = {"backend": "fsdp2", "shard_degree": cluster.per_node}
            backends["hsdp"] = {**hsdp, "reshard_after_forward": True}
            backends["hsdp, kept"] = {**hsdp, "reshard_after_forward": False}
    for name, options in backends.items():
        # Every variant but HSDP shards over all GPUs, whatever the recipe says.
        parallel = replace(config.parallel, **{"shard_degree": None, **options})  # type: ignore[arg-type]
        for mode in MODES:
            train = replace(config.train, activation_checkpointing=mode)  # type: ignore[arg-type]
            yield name, replace(config, parallel=parallel, train=train)


@dataclass(frozen=True)
class Estimate:
    """One way to run on a cluster. Seconds are per step at the devices' peaks: real steps take longer."""

    memory: Memory
    traffic: Traffic
    compute_seconds: float
    communication_seconds: float
    update_seconds: float
    mfu_bound: float
    mfu_without_overlap: float
    fits: bool


def estimate(config: Config, cluster: Cluster) -> Estimate:
    """Memory, traffic and bounds of one configuration."""
    gpu, train = cluster.gpu, config.train
    memory, traffic = step_memory(config, cluster.gpus), step_traffic(config, cluster.gpus)
    flops = nominal_flops(config, train.global_batch_size / cluster.gpus)
    # MFU counts the FLOPs that the model needs; recomputation takes time but isn't useful work.
    needed = flops.training / gpu.bf16_peak
    compute = needed + flops.recomputed(train) / gpu.bf16_peak
    communication = communication_seconds(traffic, cluster)
    updated = memory.optimizer / moment_bytes(config)  # parameters whose moments this rank holds
    update = ADAMW_BYTES * updated / gpu.memory_bandwidth
    return Estimate(
        memory,
        traffic,
        compute,
        communication,
        update,
        mfu_bound=needed / (max(compute, communication) + update),
        mfu_without_overlap=needed / (compute + communication + update),
        fits=memory.total <= USABLE * gpu.memory,
    )


def communication_seconds(traffic: Traffic, cluster: Cluster) -> float:
    """Seconds that the step's collectives take one after the other at full bandwidth.

    The latency of a ring grows with its ranks. All-reduces are assumed to use trees, whose latency doesn't.
    """
    seconds = 0.0
    if traffic.shards > 1:
        seconds += traffic.rings * (traffic.shards - 1) * HOP_SECONDS
        seconds += traffic.sent_among_shards / cluster.bandwidth(traffic.shards, neighbours=True)
    if traffic.replicas > 1:
        # The replicas of a sharded group are on different nodes, one per node, and each uses its own port.
        whole = traffic.replicas == cluster.gpus
        seconds += traffic.sent_among_replicas / cluster.bandwidth(traffic.replicas, neighbours=whole)
    return seconds


def run_seconds(config: Config, cluster: Cluster, mfu: float) -> float:
    """Seconds of the whole run at an MFU."""
    flops = config.train.max_flops
    if flops is None:
        flops = expected_steps(config) * nominal_flops(config, config.train.global_batch_size).training
    return flops / (cluster.gpus * cluster.gpu.bf16_peak * mfu)


def nearest_that_fits(config: Config, cluster: Cluster) -> tuple[str, Config] | None:
    """The smallest change that makes a step fit, as overrides and as a configuration; None if nothing does.

    Tries more checkpointing first, then smaller micro-batches, then FSDP2.
    """
    sharded = replace(config.parallel, backend="fsdp2", reshard_after_forward=True, shard_degree=cluster.gpus)
    backends = [config.parallel] if cluster.gpus == 1 else [config.parallel, sharded]
    largest = config.train.micro_batch_size
    sizes = [largest >> halvings for halvings in range(largest.bit_length())]
    for parallel, size, mode in product(backends, sizes, MODES[MODES.index(config.train.activation_checkpointing) :]):
        train = replace(config.train, activation_checkpointing=mode, micro_batch_size=size)  # type: ignore[arg-type]
        changed = replace(config, parallel=parallel, train=train)
        if step_memory(changed, cluster.gpus).total <= USABLE * cluster.gpu.memory:
            sharding = "parallel.backend=fsdp2 parallel.reshard_after_forward=true"
            if cluster.nodes > 1:
                sharding += f" parallel.shard_degree={cluster.gpus}"
            changes = [sharding] if parallel != config.parallel else []
            for name in ("activation_checkpointing", "micro_batch_size"):
                if getattr(train, name) != getattr(config.train, name):
                    changes.append(f"train.{name}={getattr(train, name)}")
            return " ".join(changes), changed
    return None
