"""Model and optimizer state in the format of torch.distributed.checkpoint, independent of how it was sharded.

Every backend reads what any of them wrote, at any world size. Keys: `model.<name>` for parameters and
persistent buffers, `optimizer.state.<name>.<moment>` for the optimizer. Hyperparameters are not state: those of the
running configuration hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from megamor.errors import CheckpointError

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class StateCopy:
    """A copy of a backend's state in host memory, which training no longer changes."""

    tensors: Mapping[str, Tensor]

    def write(self, directory: Path, group: dist.ProcessGroup | None) -> None:
        """What `Backend.save` does, from any thread. Collective over `group`, which nobody else may use meanwhile."""
        write_tensors(directory / "state", self.tensors, group)


def collect_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state of `module` under the names they are stored by. Collective."""
    model_state, optimizer_state = _model_state(module), _optimizer_state(module, optimizer)
    return _prefixed("model", model_state) | _prefixed("optimizer", _moments(optimizer_state))


def load_state(directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the state in `directory` into `module` and `optimizer`, wrapped in any way. Collective.

    Raises:
        CheckpointError: the state belongs to another model, or holds no optimizer state.
    """
    model_state, optimizer_state = _model_state(module), _optimizer_state(module, optimizer)
    moments = _moments(optimizer_state)
    read_tensors(directory, _prefixed("model", model_state) | _prefixed("optimizer", moments))
    set_model_state_dict(module, model_state, options=OPTIONS)
    set_optimizer_state_dict(module, optimizer, optimizer_state, options=OPTIONS)


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write named tensors: sharded ones slice by slice, replicated ones by one rank.

    Collective over `group`, or over all ranks.
    """
    writer = dcp.FileSystemWriter(directory)
    with _silence_about_one_process():
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())


def read_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill named tensors in place from `directory`. Collective.

    Raises:
        CheckpointError: `directory` has no complete state, or lacks one of the names or shapes.
    """
    _check_fits(directory, tensors)
    with _silence_about_one_process():
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(directory), no_dist=not dist.is_initialized())


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under `prefix.<name>`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


@contextmanager
def _silence_about_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _model_state(module: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(module, options=OPTIONS)


def _optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return get_optimizer_state_dict(module, optimizer, options=OPTIONS)


def _moments(optimizer_state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a flattened optimizer state, without the hyperparameters of its groups."""
    return {key: value for key, value in optimizer_state.items() if key.startswith("state.")}


def _check_fits(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with the stored ones, the same on every rank, before anything is overwritten."""
    if not (directory / ".metadata").is_file():
        raise CheckpointError(f"{directory} holds no complete state (.metadata is missing): choose another checkpoint")
    stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    if not any(key.startswith("optimizer.") for key in stored) and any(key.startswith("optimizer.") for key in tensors):
        raise CheckpointError(f"{directory} holds weights without optimizer state: it is there to load, not to resume")
    for key, tensor in tensors.items():
        found = stored.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"{directory} lacks {key}: it belongs to a model of another configuration")
        if found.size != tensor.size():
            raise CheckpointError(
                f"{key} has shape {tuple(found.size)} in {directory} and {tuple(tensor.size())} in this run: "
                "use the configuration that the checkpoint was trained with"
            )
    unknown = sorted(key for key in stored if key.startswith("model.") and key not in tensors)
    if unknown and any(key.startswith("optimizer.") for key in tensors):
        raise CheckpointError(
            f"{directory} has {unknown[0]}, which this model lacks: use the checkpoint's configuration"
        )
