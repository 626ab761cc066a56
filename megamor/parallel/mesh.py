"""The processes of a run: ranks, devices, the group they communicate through, and where bf16 is used.

torchrun and the deepspeed launcher describe the world in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
`launch` translates what srun and mpirun say. Without any of it the world is this process alone.

Weights and optimizer state are fp32 with every backend. For bf16, `single` and `ddp` cast at each operation (autocast),
FSDP2 casts the gathered weights, and DeepSpeed keeps a bf16 copy. fp16 isn't offered.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamor.config import ParallelConfig
from megamor.devices import check_computes, usable_device
from megamor.errors import ConfigError
from megamor.parallel.device import prepare_device
from megamor.parallel.launch import adopt_launch
from megamor.ranks import exit_status, report_errors_once

DESCRIPTORS = (512, 4)
"""Open files that a process may need: so many, and so many for each rank. Two gloo groups have two connections to each,
and device meshes further ones to some."""
ENOUGH_DESCRIPTORS = 65_536

STATE_BYTES = 16
"""Per parameter: weight, gradient and two moments in fp32."""
UNKNOWN_MEMORY = 80e9
"""Bytes of a device that isn't at hand: what an H100 or A100 has."""


@dataclass(frozen=True)
class World:
    """This process among all of a run. `local_rank` counts within the machine."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, and writes the files that only one process may write."""
        return self.rank == 0


def launched_world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher.

    Raises:
        ConfigError: the launcher's variables contradict each other or leave open which process this is.
    """
    adopt_launch()
    return _env_int("WORLD_SIZE", default=1)


def resolve_backend(config: ParallelConfig, world_size: int, on_gpu: bool = False) -> str:
    """Name of the backend to use: `auto` becomes `single` for one process on a CPU, and otherwise `fsdp2`."""
    if config.backend == "auto":
        # On one GPU too: autocast keeps the stream in fp32 (twice the traffic between products, and other roundings
        # than on several GPUs) and casts each weight anew in each micro-batch.
        return "fsdp2" if world_size > 1 or on_gpu else "single"
    assert config.backend != "single" or world_size == 1, "validate() refuses several processes that train alone"
    return config.backend


def local_world_size(world_size: int) -> int:
    """Processes of this run on this machine, as the launcher says; all of them if it doesn't."""
    return min(world_size, max(1, _env_int("LOCAL_WORLD_SIZE", default=world_size)))


def shard_degree(
    config: ParallelConfig, world_size: int, per_node: int, parameters: int, memory: float = UNKNOWN_MEMORY
) -> int:
    """How many neighbouring ranks divide the weights among them under FSDP2; their groups are replicas.

    `parallel.shard_degree` if it is set. Otherwise the ranks of a node, `per_node` of them, because links within a node
    are several times faster than the network; all ranks if weights, moments and gradients of a model of so many
    `parameters` would then take more than half of a device's `memory` (bytes).
    """
    if config.shard_degree is not None:
        return config.shard_degree
    fits = STATE_BYTES * parameters / per_node <= memory / 2
    return per_node if fits and world_size % per_node == 0 else world_size


def prepare_allocator() -> None:
    """Let CUDA's caching allocator grow its segments, unless the user has configured it. Before CUDA is used.

    The sets of tokens that ragged routers select differ in size from step to step, and so do their tensors: segments of
    fixed sizes would fragment.
    """
    if not os.environ.keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


@contextmanager
def joined_world(config: ParallelConfig, device: str | None = None) -> Iterator[World]:
    """`init_world`; afterwards the processes leave their group. A rank that fails among several exits at once.

    Leaving an NCCL group waits for its collectives, and thus forever for ranks that no longer take part. So a rank that
    fails prints its error (`report_errors_once`) and ends its process without leaving, with a status of its own.

    Raises:
        SystemExit: as `report_errors_once`, in a process that is alone.
    """
    world = init_world(config, device)
    try:
        with report_errors_once():
            yield world
    except BaseException as error:
        if world.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_status(error))
        close_world()
        raise
    close_world()


def init_world(config: ParallelConfig, device: str | None = None) -> World:
    """Find this process's rank and device and, unless the backend is `single`, join the process group.

    The group uses gloo between hosts and, on GPUs, NCCL between them. One that exists already is used as it is.
    Collective over all processes of the launch.

    Args:
        device: as for `usable_device`; `cuda` is this process's own GPU.

    Raises:
        ConfigError: the launcher's variables are incomplete, there are more processes than GPUs on this machine, its
            GPUs can't be used, or the limit of open files is too low.
    """
    prepare_allocator()
    size = launched_world_size()
    rank = _env_int("RANK", default=None if size > 1 else 0)
    if rank >= size:
        raise ConfigError(f"RANK is {rank} in a world of {size}: set WORLD_SIZE to the number of processes")
    local_rank = _env_int("LOCAL_RANK", default=None if size > 1 else 0)
    place = _select_device(device, local_rank)
    prepare_device(place)
    _raise_open_files(size)
    if resolve_backend(config, size, place.type == "cuda") != "single" and not dist.is_initialized():
        # One process without a launcher has no address to meet at; a store in memory does for it.
        alone = size == 1 and "MASTER_ADDR" not in os.environ
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            store=dist.HashStore() if alone else None,  # type: ignore[attr-defined]
            device_id=place if place.type == "cuda" else None,
        )
    return World(rank, size, local_rank, place)


def close_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _select_device(name: str | None, local_rank: int) -> torch.device:
    device = usable_device(name)
    if device.type != "cuda":
        return device
    gpus = torch.cuda.device_count()
    if gpus == 1 and "SLURM_STEP_ID" in os.environ:
        local_rank = 0  # srun --gpus-per-task shows each process its own GPU; NCCL refuses one that is shared
    if local_rank >= gpus:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are {gpus}; start at most one process for each GPU"
        )
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    torch.cuda.set_device(device)
    check_computes(device)
    return device


def _raise_open_files(world_size: int) -> None:
    """Raise this process's limit of open files to what is allowed: 1024, the usual limit, is too low for 256 ranks.

    Raises:
        ConfigError: that is less than so many ranks need.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = DESCRIPTORS[0] + DESCRIPTORS[1] * world_size
    allowed = ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_DESCRIPTORS)
    if allowed < needed and world_size > 1:
        raise ConfigError(
            f"this process may open {hard} files (ulimit -Hn), and {world_size} ranks need up to {needed}: raise the "
            "limit on every node (LimitNOFILE of slurmd, /etc/security/limits.conf)"
        )
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _env_int(name: str, default: int | None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise ConfigError(
            f"the environment variable {name} is {value!r} in a launch of several processes: "
            "start them with torchrun or deepspeed, which set it"
        )
    return int(value)
