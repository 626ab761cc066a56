"""Weights and optimizer state of a backend as named tensors: what a checkpoint's `state/` holds, however it is sharded.

DTensor (FSDP2) and `Slices` (ZeRO, copies in host memory) tell torch.distributed.checkpoint which part of the whole
tensor a rank holds, so every backend reads what any of them wrote, at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from megamor.checkpoint.state import MODEL_PREFIX, OPTIMIZER_PREFIX, read_state
from megamor.parallel.slices import Slices

# One key for each tensor, `state.<parameter>.<moment>`, instead of nested dictionaries and lists of groups: keys that
# `ZeroState` can produce too, whose engine knows neither.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def collect_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments under their stored names, sharing memory with `module` and `optimizer`. Collective.

    `module` may be wrapped by DDP, sharded by FSDP2, or neither.
    """
    weights = get_model_state_dict(module, options=OPTIONS)
    return _named(weights, get_optimizer_state_dict(module, optimizer, options=OPTIONS))


def load_state(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the state of `checkpoint` into `module` and `optimizer`. Collective.

    Raises:
        CheckpointError: as `read_state`.
    """
    weights = get_model_state_dict(module, options=OPTIONS)
    optimizer_state = get_optimizer_state_dict(module, optimizer, options=OPTIONS)
    read_state(checkpoint, _named(weights, optimizer_state))  # in place: the values are now in both dictionaries
    set_model_state_dict(module, weights, options=OPTIONS)
    set_optimizer_state_dict(module, optimizer, optimizer_state, options=OPTIONS)


def _named(weights: Mapping[str, Any], optimizer_state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Both under their stored names, without the hyperparameters of the optimizer's groups."""
    moments = {key: value for key, value in optimizer_state.items() if key.startswith("state.")}
    return {MODEL_PREFIX + name: value for name, value in weights.items()} | {
        OPTIMIZER_PREFIX + name: value for name, value in moments.items()
    }


def copy_to_host(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """Copies in host memory of what this rank has to write of `tensors`. Training can continue while they are written.

    `write_state` may write them in any thread, over a group that no other thread is using.
    """
    copies: dict[str, Tensor] = {}
    load = [0] * world_size
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
            # A rank whose slice of a short tensor is empty has nothing to write.
            boxes = [(tuple(chunk.offsets), _to_host(tensor.to_local()))] if chunk.sizes.numel() else []
            copies[name] = Slices(tensor.shape, tensor.dtype, boxes)
        elif isinstance(tensor, Slices):
            boxes = [(offsets, _to_host(values)) for offsets, values in tensor.boxes]
            copies[name] = Slices(tensor.shape, tensor.dtype, boxes)
        else:
            # Every rank holds this tensor whole (DDP). One of them copies and writes it, the one with the least to
            # write so far, so that neither host memory nor time is spent world_size times.
            owner = load.index(min(load))
            load[owner] += tensor.numel()
            if owner == rank:
                copies[name] = _to_host(tensor)
    return copies


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
