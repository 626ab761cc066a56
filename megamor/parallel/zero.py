"""DeepSpeed ZeRO, stages 0 to 3, through its engine. The only file that imports deepspeed.

The engine owns master weights, moments, communication and clipping; `optim` supplies the optimizer, the loop decides
when a step is complete. Stage 0 keeps everything on every rank and leaves clipping to this file.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamor.config import Config
from megamor.errors import CheckpointError
from megamor.parallel.backend import BuildOptimizer, ModelStructure
from megamor.parallel.mesh import World
from megamor.parallel.single import allocate_optimizer_state, clip_gradients, set_group_lr
from megamor.parallel.slices import copied_to_host
from megamor.parallel.state import StateCopy, collect_state, load_state, read_tensors, write_tensors
from megamor.parallel.zero_state import ZeroState

# Stage 3 leaves parameters below this many elements on every rank: norms, whose gathers would cost more than they save.
PERSIST_BELOW = 10_000


class ZeroBackend:
    """Fulfils `Backend` with a DeepSpeed engine. bf16 means a bf16 model with fp32 master weights (stage 0: autocast).

    Gradients are reduced in fp32; from stage 2 on in every micro-batch, so that no rank holds a whole gradient.
    """

    def __init__(
        self, model: nn.Module, plan: ModelStructure, config: Config, world: World, build_optimizer: BuildOptimizer
    ) -> None:
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self.stage = config.parallel.zero_stage
        deepspeed = import_deepspeed(world.device)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # the engine insists on it
        if not deepspeed.comm.is_initialized():
            deepspeed.comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        if self.stage == 3 and plan.shared_core is not None:
            # Ranks may stop at different depths: the core is gathered once, around its loop, not block by block.
            deepspeed.utils.set_z3_leaf_module(plan.shared_core, True)
        self.module = model.to(world.device)
        optimizer = build_optimizer(self.module)
        with redirect_stdout(io.StringIO()):  # stage 1 in bf16 prints a dozen lines on memory
            self.model, self.optimizer, _, _ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=engine_config(config), dist_init_required=False
            )
        if self.stage == 0:
            allocate_optimizer_state(self.optimizer)
        self.state = ZeroState(self.module, self.optimizer, self.stage) if self.stage > 0 else None

    def forward_context(self, *, last_micro_batch: bool = True) -> AbstractContextManager[object]:
        self.model.set_gradient_accumulation_boundary(last_micro_batch)
        return nullcontext()

    def set_lr(self, lr: float) -> None:
        set_group_lr(self.optimizer, lr)

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last_micro_batch)
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, max_grad_norm: float) -> Tensor:
        if self.stage == 0:
            norm = clip_gradients(self.optimizer, max_grad_norm)
            if norm.isfinite():
                self.model.step()
            self.model.zero_grad()
            return norm
        self.optimizer.clip_grad = max_grad_norm
        self.model.step()
        if self.stage == 3:
            # A parameter that the next step leaves out would otherwise be updated with this step's gradient once more.
            self.optimizer.grad_partitions_flat_buffer.zero_()
        norm = self.model.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def save(self, directory: Path) -> None:
        write_tensors(directory / "state", self.tensors())

    def copy_state(self) -> StateCopy:
        return StateCopy(copied_to_host(self.tensors(), self.rank, self.world_size))

    def tensors(self) -> dict[str, Tensor]:
        """All state by stored name: the engine's own memory."""
        return collect_state(self.module, self.optimizer) if self.state is None else self.state.tensors()

    def load(self, directory: Path) -> None:
        if self.state is None:
            load_state(directory / "state", self.module, self.optimizer)
            return
        tensors = self.tensors()
        read_tensors(directory / "state", tensors)
        self.state.after_reading(tensors)

    def save_engine(self, directory: Path, tag: str) -> None:
        """Write DeepSpeed's own layout, bound to the number of processes, the stage and the precision."""
        self.model.save_checkpoint(str(directory), tag=tag, save_latest=False)

    def load_engine(self, directory: Path, tag: str) -> None:
        """Read DeepSpeed's own layout.

        Raises:
            CheckpointError: it's not there, or of another layout.
        """
        try:
            path, _ = self.model.load_checkpoint(str(directory), tag=tag)
        except (AssertionError, RuntimeError, ValueError, OSError) as error:  # whatever the engine stumbles over
            raise CheckpointError(f"DeepSpeed can't load {directory / tag}: {error}") from error
        if path is None:
            raise CheckpointError(f"DeepSpeed finds nothing to load in {directory / tag}")
        if self.state is not None:
            self.state.link_moments()


def engine_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings for a run. Accumulation is the loop's affair: to the engine every step has one micro-batch,
    and losses arrive scaled."""
    stage, bf16 = config.parallel.zero_stage, config.train.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip if stage > 0 else 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": PERSIST_BELOW},
        "bf16": {"enabled": bf16 and stage > 0, "check_grad_overflow": True},
        "torch_autocast": {"enabled": bf16 and stage == 0, "dtype": "bfloat16"},
        "checkpoint": {"tag_validation": "Ignore"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import deepspeed without its chatter and without compiling its shared-memory collectives, which takes minutes."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.comm

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
