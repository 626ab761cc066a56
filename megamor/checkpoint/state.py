"""Weights out of `state/`, in one process and without a process group, whatever number of ranks wrote them.

`state/` is in the format of torch.distributed.checkpoint; weights are its tensors named `model.<parameter>`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megamor.checkpoint.layout import STATE_DIR
from megamor.checkpoint.manifest import summary
from megamor.errors import CheckpointError
from megamor.ranks import describe

MODEL_PREFIX = "model."


def weight_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Name and full shape of every weight in `checkpoint`; reads no tensor.

    Raises:
        CheckpointError: there is no readable `state/`.
    """
    return {name: entry.size for name, entry in _weight_entries(checkpoint).items()}


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every weight of `checkpoint` as a full CPU tensor in the stored type, by parameter name without `model.`.

    Raises:
        CheckpointError: there is no readable `state/`, or no weight in it.
    """
    entries = {MODEL_PREFIX + name: entry for name, entry in _weight_entries(checkpoint).items()}
    return {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in _read(checkpoint, entries).items()}


def state_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Stored name and full shape of every tensor in `state/`, moments included; reads no tensor.

    Raises:
        CheckpointError: there is no readable `state/`.
    """
    return {name: entry.size for name, entry in _entries(checkpoint).items()}


def iterate_state(checkpoint: Path, at_once_bytes: int = 2**31) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in `state/` under its stored name; about so many bytes of them are in memory at a time.

    Raises:
        CheckpointError: there is no readable `state/`, or a tensor in it can't be read.
    """
    batch: dict[str, TensorStorageMetadata] = {}
    waiting = 0
    for name, entry in _entries(checkpoint).items():
        size = entry.size.numel() * entry.properties.dtype.itemsize
        if batch and waiting + size > at_once_bytes:
            yield from _read(checkpoint, batch).items()
            batch, waiting = {}, 0
        batch[name] = entry
        waiting += size
    yield from _read(checkpoint, batch).items()


def check_same_model(origin: Path, stored: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Refuse weights of `origin` that are not those of the model at hand.

    Args:
        stored: full (unsharded) shape of each of the weights there, by name.
        expected: that of each of the model's.

    Raises:
        CheckpointError: naming the first few weights that are missing, left over or of another shape.
    """
    missing = [f"{name} {tuple(expected[name])} is not in it" for name in expected if name not in stored]
    extra = [f"{name} {tuple(stored[name])} is not in the model" for name in stored if name not in expected]
    other = [
        f"{name} is {tuple(stored[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in stored and tuple(stored[name]) != tuple(shape)
    ]
    differences = other + missing + extra
    if differences:
        raise CheckpointError(
            f"{origin} belongs to another model: {summary(differences)}. Use the configuration in that checkpoint, "
            "or another run directory"
        )


def _weight_entries(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Metadata of the weights, by name without `model.`."""
    entries = {
        name.removeprefix(MODEL_PREFIX): entry
        for name, entry in _entries(checkpoint).items()
        if name.startswith(MODEL_PREFIX)
    }
    if not entries:
        raise CheckpointError(f"{checkpoint / STATE_DIR} holds no weights (no tensor is named {MODEL_PREFIX}…)")
    return entries


def _entries(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Metadata of all tensors, by stored name."""
    state = checkpoint / STATE_DIR
    try:
        metadata: Metadata = dcp.FileSystemReader(state).read_metadata()
    except Exception as error:  # damaged pickles raise nearly anything
        raise CheckpointError(f"{state} has no readable state: {describe(error)}") from error
    found = metadata.state_dict_metadata.items()
    return {name: entry for name, entry in found if isinstance(entry, TensorStorageMetadata)}


def _read(checkpoint: Path, entries: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Full CPU tensors of `entries` in the stored type."""
    state = checkpoint / STATE_DIR
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is wanted
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(state), no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"can't read the weights in {state}: {describe(error)}") from error
    return tensors
