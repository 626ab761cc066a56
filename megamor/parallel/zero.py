"""DeepSpeed ZeRO, stages 0 to 3, through its engine. The only file that imports deepspeed.

The engine owns the fp32 master weights, the moments, communication and clipping. The optimizer comes from `optim`, and
the training loop decides when a step is complete. At stage 0 every rank holds everything, and this file clips.

At stages 1 to 3 the engine keeps weights and moments in flat buffers, of which each rank holds a range. `ZeroState`
maps the ranges back to parameters, so that checkpoints are those of any other backend.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamor.checkpoint.state import MODEL_PREFIX, OPTIMIZER_PREFIX, read_state
from megamor.config import Config
from megamor.parallel.backend import (
    Backend,
    BuildOptimizer,
    ModelStructure,
    allocate_optimizer_state,
    clip_gradients,
    set_originals,
    squared_norm,
)
from megamor.parallel.mesh import World
from megamor.parallel.slices import Slices, boxes_of_range
from megamor.parallel.zero_config import engine_config

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroBackend(Backend):
    """`Backend` with a DeepSpeed engine. In bf16 the model is bf16 with fp32 master weights (stage 0: autocast).

    Gradients are reduced in fp32. From stage 2 on every micro-batch reduces them, so that no rank holds the gradient of
    the whole model.
    """

    def __init__(
        self, model: nn.Module, plan: ModelStructure, config: Config, world: World, build_optimizer: BuildOptimizer
    ) -> None:
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self.stage = config.parallel.zero_stage
        settings = engine_config(config, world.size)
        deepspeed = import_deepspeed(world.device)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # the engine fails without it
        if not deepspeed.comm.is_initialized():
            deepspeed.comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        for stage in plan.stages if self.stage == 3 else ():
            # Stage 3 gathers a module's parameters when the module is called, and a gather waits for all ranks. Ranks
            # may run different numbers of recursions, so gathers inside the loop would deadlock. A leaf module is
            # gathered whole before its forward pass, once, however often its blocks run.
            deepspeed.utils.set_z3_leaf_module(stage, True)
        self.module, self.watched = model.to(world.device), tuple(plan.routers)
        own_routers = self.stage > 0 and config.train.precision == "bf16"
        self.routers = nn.ModuleList(plan.routers if own_routers else ())
        drawn = {name: parameter.detach().clone() for name, parameter in self.routers.named_parameters()}
        optimizer = build_optimizer(self.module)
        with redirect_stdout(io.StringIO()):  # stage 1 in bf16 prints a dozen lines about memory
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self.model = self.engine
        if self.stage == 0:
            allocate_optimizer_state(self.optimizer)
        self.state = ZeroState(self.module, self.optimizer, self.stage) if self.stage > 0 else None
        if drawn and self.state is not None:
            self.state.fill(self.routers, drawn)  # the engine's fp32 weights are copies of its bf16 ones
        self.gather_originals()

    def forward_context(self, *, last_micro_batch: bool = True) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last_micro_batch)
        return nullcontext()

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last_micro_batch)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, max_grad_norm: float) -> Tensor:
        if self.stage == 0:
            self.router_square = squared_norm(self.watched, self.world_size)
            norm = clip_gradients(self.optimizer, max_grad_norm)
            self.update(norm, self.engine.step)
            self.engine.zero_grad()
            return norm
        zero: Any = self.optimizer
        zero.clip_grad = max_grad_norm
        self.engine.step()  # the engine itself leaves out the update when the norm isn't finite
        if self.stage == 3:
            # The engine overwrites the gradients of the parameters that a step uses and keeps the others', which would
            # update a parameter that the next step leaves out with this step's gradient once more.
            zero.grad_partitions_flat_buffer.zero_()
            for partition in zero.fp32_partitioned_groups_flat:
                if partition.grad is not None:  # with an offloaded optimizer
                    partition.grad.zero_()
        elif hasattr(zero, "averaged_gradients"):
            # After a step that was left out, the engine keeps an offloaded optimizer's sums and would add to them.
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        self.gather_originals()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        if self.average is not None and norm.isfinite():
            self.average.update()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() if self.state is None else self.state.tensors()

    def load(self, directory: Path) -> None:
        if self.state is None:
            super().load(directory)
            return
        tensors = self.tensors()
        read_state(directory, tensors)
        self.state.after_reading(tensors)
        self.load_average(directory)
        self.gather_originals()

    def refresh(self) -> None:
        if self.state is not None:
            self.state.after_reading(self.tensors())
        self.gather_originals()

    def gather_originals(self) -> None:
        """Gather the routers' fp32 weights, which the engine's forward pass has in bf16. Collective."""
        if self.state is not None:
            set_originals(self.routers, self.state.whole(self.routers))


class ZeroState:
    """Weights and moments of a ZeRO engine (stages 1 to 3) by parameter: the ranges that this rank holds.

    DeepSpeed has no public interface for this, so the private attributes it uses are named here and nowhere else.
    """

    def __init__(self, module: nn.Module, optimizer: Any, stage: int) -> None:
        self.module, self.zero, self.stage = module, optimizer, stage
        self.torch_optimizer: torch.optim.Optimizer = optimizer.optimizer
        self._allocate_moments()

    def tensors(self) -> dict[str, Tensor]:
        """All state by stored name: `Slices` that share the engine's memory, and buffers as they are."""
        persistent = self.module.state_dict().keys()
        found = {MODEL_PREFIX + name: buffer for name, buffer in self.module.named_buffers() if name in persistent}
        step = self._step_counts()[0]
        for name, parameter in self.module.named_parameters():
            # Stage 3 replaces a parameter by an empty tensor while it isn't gathered; `ds_shape` is the whole one's.
            shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
            stored: dict[str | None, str] = {None: f"{MODEL_PREFIX}{name}"}
            stored |= {key: f"{OPTIMIZER_PREFIX}state.{name}.{key}" for key in MOMENTS}
            for moment, key in stored.items():
                ranges = self._held_ranges(parameter, moment)
                boxes = [box for start, flat in ranges for box in boxes_of_range(flat, start, shape)]
                found[key] = Slices(shape, torch.float32, boxes)
            # The engine has one count for all; the common format has one for each parameter.
            found[f"{OPTIMIZER_PREFIX}state.{name}.step"] = step.clone()
        return found

    def whole(self, part: nn.Module) -> dict[str, Tensor]:
        """The fp32 weights of `part`, a module of the model, by name. Collective."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in part.named_parameters()}
        flat = {name: torch.zeros(shapes[name].numel(), device=p.device) for name, p in part.named_parameters()}
        for name, parameter in part.named_parameters():
            for start, values in self._held_ranges(parameter, None):
                flat[name][start : start + values.numel()] = values.detach()
        if not flat:
            return {}
        # Each element is held by one rank, so a sum over the ranks gathers them, in one reduction.
        together = torch.cat([*flat.values()])
        dist.all_reduce(together)
        parts = torch.split(together, [len(values) for values in flat.values()])
        return {name: values.view(shapes[name]) for name, values in zip(flat, parts, strict=True)}

    def fill(self, part: nn.Module, weights: dict[str, Tensor]) -> None:
        """Set what this rank holds of the fp32 weights of `part`, a module of the model, by name."""
        for name, parameter in part.named_parameters():
            for start, values in self._held_ranges(parameter, None):
                values.detach().copy_(weights[name].flatten()[start : start + values.numel()])

    def after_reading(self, tensors: dict[str, Tensor]) -> None:
        """Bring the engine in line with what was read into `tensors()`: step counts and the model's own weights."""
        counts = {int(tensor) for name, tensor in tensors.items() if name.endswith(".step")}
        assert len(counts) == 1, f"parameters have taken different numbers of steps: {sorted(counts)}"
        for count in self._step_counts():
            count.fill_(min(counts))
        # Reading filled the fp32 master weights. The forward pass uses others, made from them: bf16 copies at stages 1
        # and 2, partitions at stage 3, and there also the parameters that stay whole on every rank.
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero.empty_partition_cache()  # a forward pass without a backward pass leaves weights gathered
        for number in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if persistent := self.zero.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _held_ranges(self, parameter: nn.Parameter, moment: str | None) -> Iterator[tuple[int, Tensor]]:
        """(First element, values [n]) that this rank holds of the flattened parameter, or of one of its moments."""
        if self.stage < 3:
            held = parameter._hp_mapping  # type: ignore[attr-defined]
            if held is not None:
                yield held.lp_fragment_address.start, held.get_hp_fragment(moment)
            return
        # Every rank has an equal partition of each parameter; the last ones are padded.
        flat, _ = self.zero._get_fp32_opt_state_partition(parameter, False, moment)
        start = flat.numel() * self.zero._get_param_partition_rank(parameter)
        count = min(flat.numel(), parameter.ds_numel - start)  # type: ignore[attr-defined]
        if count > 0:
            yield start, flat[:count]

    def _step_counts(self) -> list[Tensor]:
        return [state["step"] for state in self.torch_optimizer.state.values()]

    def _allocate_moments(self) -> None:
        """Create zero moments at once, as the other backends do, and let parameters refer to them."""
        if self.stage < 3:
            allocate_optimizer_state(self.torch_optimizer)
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        else:  # the optimizer has the fp32 partitions as its parameters only during a step
            self.zero._set_fp32_optimizer_param_groups()
            allocate_optimizer_state(self.torch_optimizer)
            self.zero._clear_fp32_optimizer_param_groups()


def import_deepspeed(device: torch.device) -> Any:
    """The package, without its log messages and without its shared-memory collectives, which compile for minutes."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.comm

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
