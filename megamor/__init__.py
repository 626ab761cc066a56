"""megamor: pretraining and serving of Mixture-of-Recursions language models (arXiv 2507.10524).

The names below are the interface for scripts and notebooks; docs/python.md explains them. They are imported on first
use, so that `import megamor` and `megamor --help` don't wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamor.config import Config, load_config
    from megamor.evaluate.sampling import GeneratedText, generate
    from megamor.load import LoadedModel, load_model
    from megamor.model import Transformer, build_model
    from megamor.model.recursive_layer import RecursiveLayer
    from megamor.routing import Router
    from megamor.session import Losses, RoutingStats, Session, make_config

__version__ = "0.1.0"

_HOMES = {
    "megamor.config": ("Config", "load_config"),
    "megamor.evaluate.sampling": ("GeneratedText", "generate"),
    "megamor.load": ("LoadedModel", "load_model"),
    "megamor.model": ("Transformer", "build_model"),
    "megamor.model.recursive_layer": ("RecursiveLayer",),
    "megamor.routing": ("Router",),
    "megamor.session": ("Losses", "RoutingStats", "Session", "make_config"),
}
__all__ = [
    "Config",
    "GeneratedText",
    "LoadedModel",
    "Losses",
    "RecursiveLayer",
    "Router",
    "RoutingStats",
    "Session",
    "Transformer",
    "build_model",
    "generate",
    "load_config",
    "load_model",
    "make_config",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'megamor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
