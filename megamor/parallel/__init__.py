"""Training on one or more processes: the `Backend` protocol and its implementations (single, ddp, fsdp2, zero)."""

from megamor.parallel.backend import Backend, ModelStructure
from megamor.parallel.build import build_backend
from megamor.parallel.mesh import World, close_world, init_world, launched_world_size, resolve_backend

__all__ = [
    "Backend",
    "ModelStructure",
    "World",
    "build_backend",
    "close_world",
    "init_world",
    "launched_world_size",
    "resolve_backend",
]
