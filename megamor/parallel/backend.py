"""What the training loop sees of parallelism: one protocol, and the function that picks who fulfils it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from megamor.config import Config
from megamor.parallel.mesh import World, resolve_backend

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class ParallelPlan(Protocol):
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

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote: bitwise at the same world size.

        Raises:
            CheckpointError: another model's state, or one that this backend can't resume from.
        """


def build_backend(model: nn.Module, config: Config, world: World, build_optimizer: BuildOptimizer) -> Backend:
    """Wrap `model` (on any device; it exports `parallel_plan()`) for this run.

    `build_optimizer` is called with the wrapped module, once its parameters are final. The order matters: activation
    checkpointing, compilation, sharding, optimizer.
    """
    model.set_activation_checkpointing(config.train.activation_checkpointing)  # type: ignore[operator]
    plan: ParallelPlan = model.parallel_plan()  # type: ignore[operator]
    if config.train.compile:
        # One graph for each size of recursion and way of attending; torch's own limit of 8 can be too few for Nr = 4.
        torch._dynamo.config.recompile_limit = 32
        for target in plan.compile_targets:
            target.compile()
    name = resolve_backend(config.parallel, world.size)
    if name == "deepspeed":
        from megamor.parallel.zero import ZeroBackend

        return ZeroBackend(model, plan, config, world, build_optimizer)
    if name == "fsdp2":
        from megamor.parallel.fsdp2 import Fsdp2Backend

        return Fsdp2Backend(model, plan, config, world, build_optimizer)
    if name == "ddp":
        from megamor.parallel.ddp import DdpBackend

        return DdpBackend(model, config, world, build_optimizer)
    from megamor.parallel.single import SingleBackend

    return SingleBackend(model, config, world, build_optimizer)
