"""What the training loop sees of parallelism: the Backend protocol, and what it expects of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from megamor.parallel.state import StateCopy

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class ModelStructure(Protocol):
    """What a model says about its own structure, in forward order.

    `units` are sharded and gathered as a whole; the shared core is one of them, however often its forward pass loops.
    Parameters outside every unit (embedding with its tied head, final norm, routers) belong to the root.
    `compile_targets` can be compiled one by one.
    """

    @property
    def units(self) -> Sequence[nn.Module]: ...

    @property
    def shared_core(self) -> nn.Module | None: ...

    @property
    def compile_targets(self) -> Sequence[nn.Module]: ...


class Backend(Protocol):
    """A wrapped model with its optimizer. All methods except `set_lr` are collective: all ranks call them in one order.

    Every backend averages gradients over ranks. One optimizer step is

        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with backend.forward_context(last_micro_batch=last):
                loss = ...backend.model(...)
            backend.backward(loss, last_micro_batch=last)
        grad_norm = backend.step(max_grad_norm)

    A parameter that a step didn't use has gradient zero: its moments and weight decay continue as usual. All ranks must
    use the same parameters in a step; a rank that needs a module for no token adds zero times its output.
    """

    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    """The module to call. Under FSDP2 and ZeRO-3 a forward pass is collective, in evaluation too."""
    module: nn.Module
    """The model as it was built, for its methods and buffers."""

    def forward_context(self, *, last_micro_batch: bool = True) -> AbstractContextManager[object]:
        """Context of a forward pass: precision, and whether its backward pass will communicate."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group to `lr` times its `lr_multiplier`."""

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Add the gradient of `loss` (scalar) to the gradients of the step."""

    def step(self, max_grad_norm: float) -> Tensor:
        """Clip to `max_grad_norm`, update, clear the gradients. Returns the global norm before clipping (fp32 scalar).

        When that norm isn't finite, weights and moments stay bitwise as they were, on every rank.
        """

    def save(self, directory: Path) -> None:
        """Write model and optimizer to `state/` in the existing `directory`: see `megamor.checkpoint.state`."""

    def copy_state(self) -> StateCopy:
        """Copy what `save` would write to host memory; training can continue while it is written."""

    def load(self, directory: Path) -> None:
        """Restore what any backend's `save` wrote: bitwise at the same world size.

        Raises:
            CheckpointError: the state belongs to another model, or has no optimizer state.
        """
