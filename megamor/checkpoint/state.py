"""The directory `state/` of a checkpoint: named tensors in the format of torch.distributed.checkpoint.

`model.<name>` are parameters and persistent buffers, `optimizer.state.<name>.<moment>` the optimizer's, and
`average.<name>` moving averages of parameters (`optim.average_decay`). Tensors are whole in meaning and fp32 whatever
backend and number of ranks wrote them, so any other can read them. Hyperparameters are not state: a resumed run takes
those of its configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megamor.checkpoint.layout import STATE_DIR
from megamor.checkpoint.manifest import summary
from megamor.checkpoint.metadata import TensorPlanner, TensorReader
from megamor.errors import CheckpointError
from megamor.ranks import describe

MODEL_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."
MOMENTS_PREFIX = OPTIMIZER_PREFIX + "state."
AVERAGE_PREFIX = "average."


def write_state(checkpoint: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write named tensors: sharded ones slice by slice, replicated ones by one rank.

    Collective over `group` (default: all ranks), if there is a process group.
    """
    writer = FileSystemWriter(checkpoint / STATE_DIR)
    with _one_process_allowed():
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())


def read_state(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill named tensors in place: all weights and moments of a run. Collective, if there is a process group.

    Raises:
        CheckpointError: `state/` can't be read, belongs to another model, or has no optimizer state.
    """
    # Every rank compares all names and shapes first, and gets the same answer: nothing is overwritten by a checkpoint
    # that is refused, and no rank enters the collective load alone.
    stored = {name: shape for name, shape in state_shapes(checkpoint).items() if not name.startswith(AVERAGE_PREFIX)}
    if not any(name.startswith(OPTIMIZER_PREFIX) for name in stored):
        raise CheckpointError(
            f"{checkpoint} has weights without optimizer state: it can't be resumed, but a run can start from it "
            "(init.from)"
        )
    check_same_model(checkpoint, stored, {name: tensor.size() for name, tensor in tensors.items()})
    _load(checkpoint, tensors, no_dist=not dist.is_initialized())


def read_averages(checkpoint: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Fill the moving averages in place; False if `checkpoint` has none. Collective, if there is a process group."""
    stored = {name: shape for name, shape in state_shapes(checkpoint).items() if name.startswith(AVERAGE_PREFIX)}
    if stored:
        check_same_model(checkpoint, stored, {name: tensor.size() for name, tensor in tensors.items()})
        _load(checkpoint, tensors, no_dist=not dist.is_initialized())
    return bool(stored)


def weight_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Name (without `model.`) and full shape of every weight and buffer; reads no tensor.

    Raises:
        CheckpointError: `state/` can't be read, or has no weights.
    """
    return {name.removeprefix(MODEL_PREFIX): entry.size for name, entry in _weight_entries(checkpoint).items()}


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every weight and buffer as a full CPU tensor in the stored type, by name without `model.`.

    For one process, with or without a process group.

    Raises:
        CheckpointError: `state/` can't be read, or has no weights.
    """
    tensors = _read(checkpoint, _weight_entries(checkpoint))
    return {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in tensors.items()}


def state_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Stored name and full shape of every tensor, moments included; reads no tensor.

    Raises:
        CheckpointError: `state/` can't be read.
    """
    return {name: entry.size for name, entry in _entries(checkpoint).items()}


def iterate_state(
    checkpoint: Path, batch_bytes: int = 2**31, names: Sequence[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Stored name and full CPU tensor of `names` (default: everything), about `batch_bytes` in memory at a time.

    Raises:
        CheckpointError: `state/` can't be read.
    """
    batch: dict[str, TensorStorageMetadata] = {}
    waiting = 0
    entries = _entries(checkpoint)
    for name, entry in ((name, entries[name]) for name in (entries if names is None else names)):
        size = entry.size.numel() * entry.properties.dtype.itemsize
        if batch and waiting + size > batch_bytes:
            yield from _read(checkpoint, batch).items()
            batch, waiting = {}, 0
        batch[name] = entry
        waiting += size
    yield from _read(checkpoint, batch).items()


def check_same_model(origin: Path, stored: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Refuse a checkpoint whose tensors don't fit the model.

    Args:
        origin: the checkpoint, for the message.
        stored: full (unsharded) shape of each of its tensors, by name.
        expected: full shape of each of the model's.

    Raises:
        CheckpointError: naming the first few tensors that are missing, unknown to the model, or of another shape.
    """
    differences = shape_differences(stored, expected)
    if differences:
        raise CheckpointError(
            f"{origin} belongs to another model: {summary(differences)}. Use the configuration in that checkpoint, "
            "or another run directory"
        )


def shape_differences(stored: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """What differs between stored and expected tensors, one line for each; arguments as in `check_same_model`."""
    both = [name for name in expected if name in stored]
    return [
        *(f"{n} is {tuple(stored[n])} instead of {tuple(expected[n])}" for n in both if [*stored[n]] != [*expected[n]]),
        *(f"{name} {tuple(shape)} is missing" for name, shape in expected.items() if name not in stored),
        *(f"{name} {tuple(shape)} is not in the model" for name, shape in stored.items() if name not in expected),
    ]


def _weight_entries(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    entries = {name: entry for name, entry in _entries(checkpoint).items() if name.startswith(MODEL_PREFIX)}
    if not entries:
        raise CheckpointError(f"{checkpoint / STATE_DIR} has no weights (no tensor is named {MODEL_PREFIX}…)")
    return entries


def _entries(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Metadata of all tensors, by stored name."""
    state = checkpoint / STATE_DIR
    try:
        found = TensorReader(state).read_metadata().state_dict_metadata
    except Exception as error:  # the metadata are a pickle, and a damaged pickle can raise nearly anything
        raise CheckpointError(f"{state} has no readable state: {describe(error)}") from error
    for name, entry in found.items():
        if name.startswith((MODEL_PREFIX, MOMENTS_PREFIX, AVERAGE_PREFIX)) and not isinstance(
            entry, TensorStorageMetadata
        ):
            raise CheckpointError(f"{state} has no readable state: {name} is an object, not a tensor")
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def _read(checkpoint: Path, entries: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Full CPU tensors of `entries` in the stored type, read by this process alone."""
    try:
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    except RuntimeError as error:
        raise CheckpointError(f"no memory for the tensors in {checkpoint / STATE_DIR}: {error}") from error
    _load(checkpoint, tensors, no_dist=True)
    return tensors


def _load(checkpoint: Path, tensors: Mapping[str, Tensor], *, no_dist: bool) -> None:
    """Fill `tensors` in place."""
    state = checkpoint / STATE_DIR
    try:
        with _one_process_allowed():
            load(dict(tensors), storage_reader=TensorReader(state), planner=TensorPlanner(), no_dist=no_dist)
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"can't read the weights in {state}: {describe(error)}") from error


@contextmanager
def _one_process_allowed() -> Iterator[None]:
    """Silence torch's warning that a checkpoint is saved or loaded by one process, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
