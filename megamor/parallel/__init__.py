"""Training on one or more processes: `Backend` for one process, and its subclasses (ddp, fsdp2, zero)."""

from megamor.parallel.backend import Backend, ModelStructure
from megamor.parallel.build import build_backend, compile_seconds, compiles, share_compiled_code, without_recompiling
from megamor.parallel.mesh import (
    World,
    close_world,
    init_world,
    joined_world,
    launched_world_size,
    local_world_size,
    resolve_backend,
    shard_degree,
)

__all__ = [
    "Backend",
    "ModelStructure",
    "World",
    "build_backend",
    "close_world",
    "compile_seconds",
    "compiles",
    "init_world",
    "joined_world",
    "launched_world_size",
    "local_world_size",
    "resolve_backend",
    "shard_degree",
    "share_compiled_code",
    "without_recompiling",
]
