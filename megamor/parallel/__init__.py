"""How a run is spread over processes: the `Backend` protocol and who fulfils it."""

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
