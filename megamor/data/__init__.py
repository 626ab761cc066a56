"""Token shards on disk, the order of samples, blends and loaders: everything that training reads.

The loaders need torch and are imported on first use, so that preprocessing starts without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megamor.data.dataset import TrainingData
from megamor.data.meta import ShardMeta, fingerprint, read_meta
from megamor.data.order import SampleOrder
from megamor.data.shard import TokenShard, dtype_for_vocab

if TYPE_CHECKING:
    from megamor.data.loader import MicroBatch, TrainingLoader, ValidationSet, open_validation_sets

_NEED_TORCH = ("MicroBatch", "TrainingLoader", "ValidationSet", "open_validation_sets")

__all__ = [
    "MicroBatch",
    "SampleOrder",
    "ShardMeta",
    "TokenShard",
    "TrainingData",
    "TrainingLoader",
    "ValidationSet",
    "dtype_for_vocab",
    "fingerprint",
    "open_validation_sets",
    "read_meta",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(import_module("megamor.data.loader"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
