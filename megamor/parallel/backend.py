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

    `units` are gathered as a whole; the shared core is one of them, however often its forward loops. Parameters outside
    every unit (embedding with its tied head, final norm, routers) stay with the root. `compile_targets` may be compiled
    each on its own.
    """

    @property
    def units(self) -> Sequence[nn.Module]: ...

    @property
    def shared_core(self) -> nn.Module | None: ...

    @property
    def compile_targets(self) -> Sequence[nn.Module]: ...


class Backend(Protocol):
    """A wrapped model with its optimizer. All methods but `set_lr` are collective: every rank calls them alike.

    Gradients are averaged over ranks, whatever the backend. One optimizer step is

        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with backend.forward_context(last_micro_batch=last):
                loss = ...backend.model(...)
            backend.backward(loss, last_micro_batch=last)
        grad_norm = backend.step(max_grad_norm)

    A parameter that took no part in a step has gradient zero: its moments and weight decay as usual. Every rank must
    use the same parameters in a step, if only by adding zero times the output of an idle module.
    """

    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    """Call this one. Under FSDP2 and ZeRO-3 a forward pass is collective, evaluation included."""
    module: nn.Module
    """The model as it was built, for its methods and buffers."""

    def forward_context(self, *, last_micro_batch: bool = True) -> AbstractContextManager[object]:
        """Context of a forward pass: precision, and whether its backward pass will communicate."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate, times each group's `lr_multiplier`."""

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Add the gradient of `loss` (scalar) to what the step has gathered so far."""

    def step(self, max_grad_norm: float) -> Tensor:
        """Clip to `max_grad_norm`, update, forget the gradients. Returns the global norm before clipping (fp32 scalar).

        When that norm isn't finite, weights and moments stay bitwise as they were, on every rank.
        """

    def save(self, directory: Path) -> None:
        """Write model and optimizer into `directory`, which exists. `state/` always holds the weights as `model.<name>`
        in the format of torch.distributed.checkpoint, unsharded in meaning and fp32."""

    def copy_state(self) -> StateCopy:
        """Copy what `save` would write into host memory, to be written while training goes on."""

    def load(self, directory: Path) -> None:
        """Restore what any backend's `save` wrote: bitwise at the same world size.

        Raises:
            CheckpointError: another model's state, or one without the optimizer's.
        """
