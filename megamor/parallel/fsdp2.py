"""Fully sharded data parallel (FSDP2): every rank holds a slice of each parameter, its gradient and its moments."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megamor.config import Config
from megamor.parallel.backend import Backend, ModelStructure, set_originals
from megamor.parallel.mesh import local_world_size, shard_degree
from megamor.ranks import from_first_rank


def shard(model: nn.Module, plan: ModelStructure, mesh: DeviceMesh, precision: str, reshard: bool) -> None:
    """Shard `model` in place over `mesh`: each unit of `plan` is one group of parameters, the rest is the root's.

    With `reshard` a unit's weights are freed after its forward pass and gathered again for its backward pass.
    Parameters on the meta device stay there, sharded, until `to_empty`.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        # bf16 gathers and compute, fp32 reduction of gradients. The units' inputs are not cast: hidden states are bf16
        # from the embedding on, and rotary angles must stay fp32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # A gather waits for all ranks, and ranks may run different numbers of recursions. So the shared core is one unit:
    # one gather in each direction, whatever happens between. A unit for each block inside it would deadlock.
    for unit in plan.units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The root (embedding, which is the head too) computes last in the forward pass and first in the backward pass:
    # freeing it between them would only gather it twice.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


class Fsdp2Backend(Backend):
    """`Backend` with `fully_shard`. Every rank builds the same model and keeps its slice."""

    def wrap(self, model: nn.Module, plan: ModelStructure, config: Config) -> nn.Module:
        """Shard over all ranks or over groups of them, then move buffers and slices to the device."""
        # Units return keys and values as views, which FSDP2 warns about because writing into them would be lost.
        # Nothing here does.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        mesh = self.mesh(from_first_rank(partial(self.choose_degree, model, config)))
        self.reshard = config.parallel.reshard_after_forward
        shard(model, plan, mesh, self.precision, self.reshard)
        # What FSDP2 gathers for a forward pass is bf16.
        self.routers = nn.ModuleList(plan.routers if self.precision == "bf16" else ())
        model = model.to(self.device)
        self.gather_originals()
        return model

    def gather_originals(self) -> None:
        """Gather the routers' fp32 weights, which are few. Collective."""
        weights = {name: parameter.detach() for name, parameter in self.routers.named_parameters()}
        set_originals(
            self.routers, {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
        )

    def step(self, max_grad_norm: float) -> Tensor:
        norm = super().step(max_grad_norm)
        self.gather_originals()
        return norm

    def load(self, directory: Path) -> None:
        super().load(directory)
        self.refresh()

    def refresh(self) -> None:
        assert isinstance(self.model, FSDPModule)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass without a backward pass, the root is still gathered
        self.gather_originals()

    def choose_degree(self, model: nn.Module, config: Config) -> int:
        """The number of ranks to shard over, as this machine and device suggest; see `shard_degree`."""
        per_node = local_world_size(self.world_size)
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return shard_degree(config.parallel, self.world_size, per_node, parameters, memory)

    def mesh(self, degree: int) -> DeviceMesh:
        """All ranks in one dimension, or groups of `degree` (HSDP): sharded along rows, replicated along columns."""
        if degree == self.world_size:
            return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        shape = (self.world_size // degree, degree)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def forward_context(self, *, last_micro_batch: bool = True) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        assert isinstance(self.model, FSDPModule)  # fully_shard changes the class in place
        # Gradients are reduced in the last micro-batch only. Until then each rank holds the whole model's gradient in
        # fp32 (4 bytes a parameter), which saves a reduction for every other micro-batch.
        self.model.set_requires_gradient_sync(last_micro_batch)
        # Weights that stay gathered between forward and backward pass stay so until the step's last backward pass; the
        # optimizer then changes the slices. The root's always do: its memory is at its peak between the two passes.
        self.model.set_reshard_after_backward(last_micro_batch, recurse=not self.reshard)
        loss.backward()  # type: ignore[no-untyped-call]
