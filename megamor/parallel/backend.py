"""What the training loop sees of parallelism: the backend for one process, from which the others inherit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megamor.checkpoint.state import read_averages, write_state
from megamor.config import Config
from megamor.parallel.average import WeightAverage
from megamor.parallel.mesh import World
from megamor.parallel.state import collect_state, copy_to_host, load_state

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class ModelStructure(Protocol):
    """What a model says about its own structure, in forward order.

    `units` are sharded and gathered as a whole; `stages` are those among them whose forward passes loop, each rank's as
    often as it needs. Parameters outside every unit (embedding with its tied head, final norm) belong to the root.
    `compile_targets` can be compiled one by one. The `routers` compute with fp32 weights whatever the precision.
    `uses_everything`: every forward pass uses every parameter.
    """

    @property
    def units(self) -> Sequence[nn.Module]: ...

    @property
    def stages(self) -> Sequence[nn.Module]: ...

    @property
    def compile_targets(self) -> Sequence[nn.Module]: ...

    @property
    def routers(self) -> Sequence[nn.Module]: ...

    @property
    def uses_everything(self) -> bool: ...


class Backend:
    """A wrapped model with its optimizer: here plain PyTorch in one process, with bf16 by autocast.

    All methods except `set_lr` are collective: all ranks call them in one order. Every backend averages gradients over
    ranks. One optimizer step is

        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with backend.forward_context(last_micro_batch=last):
                loss = ...backend.model(...)
            backend.backward(loss, last_micro_batch=last)
        grad_norm = backend.step(max_grad_norm)

    A parameter that a step didn't use has gradient zero: its moments and weight decay continue as usual. All ranks must
    use the same parameters in a step; a rank that needs a module for no token adds zero times its output.
    """

    model: nn.Module
    """The module to call. Under FSDP2 and ZeRO-3 a forward pass is collective, in evaluation too."""
    module: nn.Module
    """The model as it was built, for its methods and buffers."""
    average: WeightAverage | None = None
    """The moving average of the weights, with `optim.average_decay`."""
    router_square: Tensor | None = None
    """This rank's addend of the squared norm that the routers' gradients had in the last step, before clipping. None if
    no router has parameters, and with ZeRO-1 to 3, where the engine holds the gradients."""

    def __init__(
        self, model: nn.Module, plan: ModelStructure, config: Config, world: World, build_optimizer: BuildOptimizer
    ) -> None:
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self.precision = config.train.precision
        self.module, self.watched = model, tuple(plan.routers)
        self.model = self.wrap(model, plan, config)
        self.optimizer = build_optimizer(model)
        allocate_optimizer_state(self.optimizer)

    def wrap(self, model: nn.Module, plan: ModelStructure, config: Config) -> nn.Module:
        """Move `model` to the device and, in subclasses, distribute it. The training loop calls the result."""
        return model.to(self.device)

    def forward_context(self, *, last_micro_batch: bool = True) -> AbstractContextManager[object]:
        """Context of a forward pass: precision, and whether its backward pass will communicate."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, dtype=torch.bfloat16)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group to `lr` times its `lr_multiplier`."""
        set_group_lr(self.optimizer, lr)

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Add the gradient of `loss` (scalar) to the gradients of the step."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, max_grad_norm: float) -> Tensor:
        """Clip to `max_grad_norm`, update, clear the gradients. Returns the global norm before clipping (fp32 scalar).

        When that norm isn't finite, weights and moments stay bitwise as they were, on every rank.
        """
        self.router_square = squared_norm(self.watched, self.world_size)
        norm = clip_gradients(self.optimizer, max_grad_norm)
        self.update(norm, self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def update(self, norm: Tensor, step: Callable[[], object]) -> None:
        """Update weights and their average by `step`, unless the gradients' `norm` isn't finite. Doesn't wait."""
        # The norm is of all ranks' gradients, so all ranks decide alike. A skipped step must leave every bit as it
        # was: clipping has spread the NaN to all gradients, and no scaling brings a NaN back to 0. The optimizer's
        # kernels read the decision on the device, where a question to the host would end all queued work.
        skipped = norm.isfinite().logical_not().float()
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        step()
        if self.average is not None:
            self.average.update(skipped)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the model has the averaged weights and must not be trained. Collective."""
        assert self.average is not None
        self.average.swap()
        self.refresh()
        try:
            yield
        finally:
            self.average.swap()
            self.refresh()

    def refresh(self) -> None:
        """Bring copies of the weights, if the backend has any, in line with the fp32 weights. Collective."""

    def save(self, directory: Path) -> None:
        """Write model and optimizer to `state/` in the existing `directory`: see `megamor.checkpoint.state`."""
        write_state(directory, self.stored())

    def copy_state(self) -> dict[str, Tensor]:
        """What `save` would write, copied to host memory: `write_state` may write it while training continues."""
        return copy_to_host(self.stored(), self.rank, self.world_size)

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint contains: `tensors`, and the moving average."""
        return self.tensors() | (self.average.tensors if self.average is not None else {})

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and moments by stored name, sharing memory with model and optimizer."""
        return collect_state(self.module, self.optimizer)

    def load(self, directory: Path) -> None:
        """Restore what any backend's `save` wrote: bitwise at the same world size.

        Raises:
            CheckpointError: the state belongs to another model, or has no optimizer state.
        """
        load_state(directory, self.module, self.optimizer)
        self.load_average(directory)

    def load_average(self, directory: Path) -> None:
        """Restore the moving average, which begins with the weights if `directory` has none."""
        if self.average is not None and not read_averages(directory, self.average.tensors):
            self.average.restart()


def set_originals(routers: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the modules of `routers` the fp32 `values` of their parameters, by name in `routers`, to compute with."""
    for path, module in routers.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        prefix = f"{path}." if path else ""
        module.originals = {name: values[prefix + name] for name in names}


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


def squared_norm(modules: Sequence[nn.Module], world_size: int) -> Tensor | None:
    """Squared gradient norm of `modules` divided over the ranks: the ranks' addends sum to it. None: no parameters.

    The sum is left to a reduction that takes place anyway.
    """
    squares = []
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        gradient, copies = parameter.grad, world_size
        if isinstance(gradient, DTensor):
            axes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
            gradient, copies = gradient.to_local(), math.prod(size for size, placed in axes if placed.is_replicate())
        known = torch.zeros((), device=parameter.device) if gradient is None else gradient
        squares.append(known.double().square().sum() / copies)
    return torch.stack(squares).sum() if squares else None


def allocate_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create moments and step counts now, all zero.

    So a GPU runs out of memory at the start or not at all, and a checkpoint of step 0 is like any other. Left to
    itself, torch.distributed.checkpoint creates missing state by an optimizer step of its own, which it counts.
    """
    # torch creates the state in the first step. A step with gradient 0 and learning rate 0 changes no weight (weight
    # decay is times the learning rate) and leaves the moments 0; only the counts have to be set back.
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]  # DeepSpeed offloads into buffers of its own
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()
