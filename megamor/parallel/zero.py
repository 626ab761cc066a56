"""DeepSpeed ZeRO, stages 0 to 3, through its engine. The only file that imports deepspeed.

The engine owns master weights, moments, communication and clipping; `optim` supplies the optimizer, the loop decides
when a step is complete. Stage 0 keeps everything on every rank and leaves clipping to this file.
"""

from __future__ import annotations

import io
import json
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
from megamor.parallel.mesh import World
from megamor.parallel.protocol import BuildOptimizer, ParallelPlan
from megamor.parallel.single import clip_gradients, set_group_lr
from megamor.parallel.state import prefixed, write_tensors

ENGINE = "engine"
LAYOUT = "layout.json"
# Stage 3 leaves parameters below this many elements on every rank: norms, whose gathers would cost more than they save.
PERSIST_BELOW = 10_000


class ZeroBackend:
    """Fulfils `Backend` with a DeepSpeed engine. bf16 means a bf16 model with fp32 master weights (stage 0: autocast).

    Gradients are reduced in fp32; from stage 2 on in every micro-batch, so that no rank holds a whole gradient.
    """

    def __init__(
        self, model: nn.Module, plan: ParallelPlan, config: Config, world: World, build_optimizer: BuildOptimizer
    ) -> None:
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self.stage = config.parallel.zero_stage
        self.layout = {
            "world_size": world.size,
            "zero_stage": self.stage,
            "precision": config.train.precision,
        }
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
        self.model.save_checkpoint(str(directory), tag=ENGINE, save_latest=False)
        if self.rank == 0:
            (directory / ENGINE / LAYOUT).write_text(json.dumps(self.layout, indent=2))
        write_tensors(directory / "state", prefixed("model", self._weights_to_write()))

    def load(self, directory: Path) -> None:
        self._check_layout(directory / ENGINE / LAYOUT)
        path, _ = self.model.load_checkpoint(str(directory), tag=ENGINE)
        if path is None:
            raise CheckpointError(f"DeepSpeed can't load {directory / ENGINE}: choose another checkpoint")

    def _weights_to_write(self) -> dict[str, Tensor]:
        """This rank's share of the full fp32 weights, and of the buffers. Collective: gathered one by one."""
        from deepspeed.utils import safe_get_full_fp32_param

        mine: dict[str, Tensor] = {}
        for index, (name, parameter) in enumerate(self.module.named_parameters()):
            full = parameter.detach() if self.stage == 0 else safe_get_full_fp32_param(parameter)
            if index % self.world_size == self.rank:
                mine[name] = full.to("cpu", torch.float32, copy=True)
        if self.rank == 0:
            persistent = self.module.state_dict().keys()
            mine |= {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}
        return mine

    def _check_layout(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: the checkpoint wasn't written by DeepSpeed. Resume with the parallel.backend that "
                "wrote it (single, ddp and fsdp2 read each other's)"
            )
        found = json.loads(path.read_text())
        if found != self.layout:
            raise CheckpointError(
                f"DeepSpeed's checkpoints are bound to their layout: {path.parent} was written with {found} and this "
                f"run has {self.layout}. Resume with the former, or train with parallel.backend=fsdp2, whose "
                "checkpoints load on any number of processes"
            )


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
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "checkpoint": {"tag_validation": "Ignore"},
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
