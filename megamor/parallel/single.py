"""One process with plain PyTorch, and what the other backends have in common with it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megamor.checkpoint.state import write_state
from megamor.config import Config
from megamor.parallel.backend import BuildOptimizer, ModelStructure
from megamor.parallel.mesh import World, autocast
from megamor.parallel.state import StateCopy, collect_state, load_state


class SingleBackend:
    """`Backend` for one process, with bf16 by autocast. The other backends inherit from it."""

    def __init__(
        self, model: nn.Module, plan: ModelStructure, config: Config, world: World, build_optimizer: BuildOptimizer
    ) -> None:
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self.precision = config.train.precision
        self.module = model
        self.model = self.wrap(model, plan, config)
        self.optimizer = build_optimizer(model)
        allocate_optimizer_state(self.optimizer)

    def wrap(self, model: nn.Module, plan: ModelStructure, config: Config) -> nn.Module:
        """Move `model` to the device and, in subclasses, distribute it. The training loop calls the result."""
        return model.to(self.device)

    def forward_context(self, *, last_micro_batch: bool = True) -> AbstractContextManager[object]:
        return autocast(self.device, self.precision)

    def set_lr(self, lr: float) -> None:
        set_group_lr(self.optimizer, lr)

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, max_grad_norm: float) -> Tensor:
        norm = clip_gradients(self.optimizer, max_grad_norm)
        # The norm is of all ranks' gradients, so all ranks decide alike. A skipped step must leave every bit as it
        # was: clipping has spread the NaN to all gradients, and no scaling brings a NaN back to 0.
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, directory: Path) -> None:
        write_state(directory, self.tensors())

    def copy_state(self) -> StateCopy:
        return StateCopy.of(self.tensors(), self.rank, self.world_size)

    def tensors(self) -> dict[str, Tensor]:
        """All state by stored name, sharing memory with model and optimizer."""
        return collect_state(self.module, self.optimizer)

    def load(self, directory: Path) -> None:
        load_state(directory, self.module, self.optimizer)


def set_group_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group `lr` times its `lr_multiplier` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients of `optimizer` so that their global norm is at most `max_norm`; return the norm before.

    Parameters without a gradient get zeros first: their moments then decay as under backends that always have one.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def allocate_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create moments and step counts now, all zero.

    So a GPU runs out of memory at the start or not at all, and a checkpoint of step 0 is like any other. Left to
    itself, torch.distributed.checkpoint creates missing state by an optimizer step of its own, which it counts.
    """
    # torch creates the state in the first step. A step with gradient 0 and learning rate 0 changes no weight (weight
    # decay is times the learning rate) and leaves the moments 0; only the counts have to be set back.
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()
