"""Choose the backend of a run and wrap the model with it; compilation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from megamor.checkpoint.state import MODEL_PREFIX
from megamor.config import Config, TrainConfig
from megamor.errors import TrainingError
from megamor.parallel.average import WeightAverage
from megamor.parallel.backend import Backend, BuildOptimizer, ModelStructure
from megamor.parallel.ddp import DdpBackend
from megamor.parallel.fsdp2 import Fsdp2Backend
from megamor.parallel.mesh import World, resolve_backend
from megamor.parallel.zero import ZeroBackend

BACKENDS = {"single": Backend, "ddp": DdpBackend, "fsdp2": Fsdp2Backend, "deepspeed": ZeroBackend}


def compiles(train: TrainConfig, device: torch.device) -> bool:
    """Whether a run on `device` compiles its blocks."""
    return train.compile is True or (train.compile == "auto" and device.type == "cuda")


def share_compiled_code(directory: Path) -> None:
    """Keep compiled code in `directory`, for all ranks and later launches, unless TORCHINDUCTOR_CACHE_DIR is set."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory.absolute()))


def compile_seconds() -> float:
    """Seconds that this process has spent on compilation."""
    return torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0)


def build_backend(model: nn.Module, config: Config, world: World, build_optimizer: BuildOptimizer) -> Backend:
    """Wrap `model` (on any device; it has `parallel_plan()`) for this run.

    `build_optimizer` is called with the wrapped module, when its parameters are final.
    """
    # The order matters: what is compiled includes recomputation, and what is sharded is already compiled. FSDP2
    # replaces parameters, so the optimizer comes last.
    model.set_activation_checkpointing(config.train.activation_checkpointing, config.train.selective_ops)  # type: ignore[operator]
    plan: ModelStructure = model.parallel_plan()  # type: ignore[operator]
    if compiles(config.train, world.device):
        # One graph for each size of recursion and each attention layout; torch's limit of 8 can be too few for Nr = 4.
        torch._dynamo.config.recompile_limit = 32
        for target in plan.compile_targets:
            # A ramp changes every size: with symbolic sizes from the start, it recompiles nothing.
            target.compile(dynamic=True if config.train.ramp else None)
    name = resolve_backend(config.parallel, world.size, world.device.type == "cuda")
    backend = BACKENDS[name](model, plan, config, world, build_optimizer)
    if config.optim.average_decay is not None:
        parameters = {MODEL_PREFIX + name for name, _ in backend.module.named_parameters()}
        weights = {name: tensor for name, tensor in backend.tensors().items() if name in parameters}
        backend.average = WeightAverage(weights, config.optim.average_decay)
    return backend


@contextmanager
def without_recompiling(step: int, settled_after: int | None) -> Iterator[None]:
    """Refuse to compile anything inside, in `step` of a run that was to have compiled all after so many steps.

    Raises:
        TrainingError: on the rank that would have compiled; the others wait in a collective until the launcher ends
            them.
    """
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise TrainingError(
            f"step {step} needs a recompilation, and train.fail_on_recompile_after = {settled_after}: {error}\n"
            "Raise the number if shapes change on purpose (train.ramp, warm-ups)"
        ) from error
