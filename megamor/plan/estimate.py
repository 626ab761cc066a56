"""What a run would need and take on given GPUs: memory, traffic, bounds on speed. The arithmetic of megamor plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megamor.config import Config
from megamor.config.derive import derive
from megamor.metrics.gpus import Gpu
from megamor.model.flops import nominal_flops
from megamor.plan.memory import MOMENTS, Memory, step_memory, unit_parameters
from megamor.plan.traffic import Traffic, step_traffic

USABLE = 0.92
"""Share of a GPU's memory for a step's tensors: the rest is for the driver, libraries and fragmentation."""

ADAMW_BYTES = 28
"""Memory traffic of a parameter's update: weight, gradient and two moments read, weight and moments written, fp32."""

HOP_SECONDS = 5e-6
"""Time for a message to the next rank of a ring however short it is: an assumption, not a data sheet's figure."""

MODES = ("none", "selective", "block", "recursion")


@dataclass(frozen=True)
class Cluster:
    """`gpus` of one kind in nodes of `per_node`."""

    gpu: Gpu
    gpus: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Whole nodes."""
        return -(-self.gpus // self.per_node)

    def bandwidth(self, ranks: int, neighbours: bool) -> float:
        """Bytes a second that each rank of a ring sends. `neighbours` are on one node if they fit.

        Rings over nodes use all network ports of a node at once, so a rank gets the sum of them, or less where its own
        link is slower.
        """
        if ranks <= self.per_node and (neighbours or self.nodes == 1):
            return self.gpu.link
        ports = 1 if not neighbours else min(self.per_node, self.gpus)
        return min(self.gpu.link, self.gpu.network * ports)


def variants(config: Config, cluster: Cluster) -> Iterator[tuple[str, Config]]:
    """The configuration on every backend that fits so many GPUs, under every checkpointing policy."""
    backends: dict[str, dict[str, object]] = {"single": {"backend": "single"}}
    if cluster.gpus > 1:
        backends = {
            "ddp": {"backend": "ddp"},
            "fsdp2": {"backend": "fsdp2", "shard_degree": None, "reshard_after_forward": True},
            "fsdp2, kept": {"backend": "fsdp2", "shard_degree": None, "reshard_after_forward": False},
            **{f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
        }
        if cluster.nodes > 1 and cluster.gpus % cluster.per_node == 0:
            degree = {"shard_degree": cluster.per_node}
            backends["hsdp"] = {"backend": "fsdp2", "reshard_after_forward": True, **degree}
    for name, options in backends.items():
        if "shard_degree" not in options:
            options = {**options, "shard_degree": None}
        parallel = replace(config.parallel, **options)  # type: ignore[arg-type]
        for mode in MODES:
            train = replace(config.train, activation_checkpointing=mode)  # type: ignore[arg-type]
            yield name, replace(config, parallel=parallel, train=train)


@dataclass(frozen=True)
class Estimate:
    """One way to run on a cluster. Seconds are of a step, at the devices' peaks: real ones are longer."""

    backend: str
    config: Config
    memory: Memory
    traffic: Traffic
    compute_seconds: float
    communication_seconds: float
    update_seconds: float
    mfu_bound: float
    mfu_without_overlap: float
    fits: bool


def estimate(name: str, config: Config, cluster: Cluster) -> Estimate:
    """Memory, traffic and bounds of one configuration."""
    gpu, train = cluster.gpu, config.train
    memory, traffic = step_memory(config, cluster.gpus), step_traffic(config, cluster.gpus)
    flops = nominal_flops(config, train.global_batch_size / cluster.gpus)
    needed = flops.training / gpu.bf16_peak
    compute = needed + flops.recomputed(train) / gpu.bf16_peak
    communication = communication_seconds(traffic, cluster)
    held = memory.optimizer / MOMENTS  # parameters that this rank updates
    update = ADAMW_BYTES * held / gpu.memory_bandwidth
    return Estimate(
        name,
        config,
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
    """Seconds that the step's collectives take at full bandwidth, one after the other. Rings of many ranks take their
    time even for little; all-reduces are taken to use trees for that."""
    seconds = 0.0
    if traffic.shards > 1:
        seconds += traffic.rings * (traffic.shards - 1) * HOP_SECONDS
        seconds += traffic.sent_among_shards / cluster.bandwidth(traffic.shards, neighbours=True)
    if traffic.replicas > 1:
        # Replicas of groups on nodes are on different nodes, one from each, and each has its own port.
        whole = traffic.replicas == cluster.gpus
        seconds += traffic.sent_among_replicas / cluster.bandwidth(traffic.replicas, neighbours=whole)
    return seconds


def run_seconds(found: Estimate, cluster: Cluster, mfu: float) -> float:
    """Seconds of the whole run at an MFU of `mfu`, or at the bound without overlap where that is lower."""
    config = found.config
    steps = derive(config, cluster.gpus).total_steps
    flops = nominal_flops(config, config.train.global_batch_size).training
    return steps * flops / (cluster.gpus * cluster.gpu.bf16_peak * min(mfu, found.mfu_without_overlap))


def nearest_that_fits(config: Config, cluster: Cluster) -> tuple[str, Config] | None:
    """The smallest change after which a step fits: more checkpointing, then smaller micro-batches, then sharding."""
    micro_batch, backends = config.train.micro_batch_size, [config.parallel]
    if cluster.gpus > 1:
        sharded = replace(config.parallel, backend="fsdp2", reshard_after_forward=True, shard_degree=None)
        backends.append(sharded)
    for parallel in backends:
        size = micro_batch
        while size >= 1:
            for mode in MODES[MODES.index(config.train.activation_checkpointing) :]:
                train = replace(config.train, activation_checkpointing=mode, micro_batch_size=size)  # type: ignore[arg-type]
                changed = replace(config, parallel=parallel, train=train)
                if step_memory(changed, cluster.gpus).total <= USABLE * cluster.gpu.memory:
                    return described_change(config, changed), changed
            size //= 2
    return None


def described_change(old: Config, new: Config) -> str:
    """Overrides that lead from one configuration to the other."""
    changes = []
    if new.parallel != old.parallel:
        changes.append("parallel.backend=fsdp2 parallel.reshard_after_forward=true")
    for name in ("activation_checkpointing", "micro_batch_size"):
        if getattr(new.train, name) != getattr(old.train, name):
            changes.append(f"train.{name}={getattr(new.train, name)}")
    return " ".join(changes)


def parameters(config: Config) -> int:
    """Unique parameters, embedding included."""
    return sum(unit_parameters(config).values())
