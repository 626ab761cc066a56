"""Fully sharded data parallel (FSDP2): every rank holds a slice of each parameter, its gradient and its moments."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from megamor.config import Config
from megamor.parallel.backend import BuildOptimizer, ModelStructure
from megamor.parallel.mesh import World
from megamor.parallel.precision import fsdp_policy
from megamor.parallel.single import SingleBackend


def shard(model: nn.Module, plan: ModelStructure, mesh: DeviceMesh, precision: str, reshard: bool) -> None:
    """Shard `model` in place over `mesh`: each unit of the plan as one group, the rest as the root's.

    The shared core is gathered once in each direction, however many recursions run, and ranks may stop at different
    depths. The root is the first and the last to compute, so it stays gathered between forward and backward pass.
    Parameters on the meta device stay there, sharded, until `to_empty`.
    """
    policy = fsdp_policy(precision)
    for unit in plan.units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


class Fsdp2Backend(SingleBackend):
    """Fulfils `Backend` with `fully_shard`. Every rank builds the same model and keeps its slice.

    With gradient accumulation the ranks talk in the last micro-batch only. Until then each holds the whole model's
    gradient (fp32), which saves the reductions and costs 4 bytes a parameter.
    """

    def __init__(
        self, model: nn.Module, plan: ModelStructure, config: Config, world: World, build_optimizer: BuildOptimizer
    ) -> None:
        self.plan = plan
        self.reshard, self.shard_degree = config.parallel.reshard_after_forward, config.parallel.shard_degree
        super().__init__(model, config, world, build_optimizer)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shard over all ranks or over groups of them, then move buffers and slices to the device."""
        # Units return keys and values as views, and nobody writes into them.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        shard(model, self.plan, self.mesh(), self.precision, self.reshard)
        return model.to(self.device)

    def mesh(self) -> DeviceMesh:
        """All ranks in a row, or with `shard_degree` in rows: sharded along a row, replicated along a column (HSDP)."""
        if self.shard_degree is None:
            return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        shape = (self.world_size // self.shard_degree, self.shard_degree)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def forward_context(self, *, last_micro_batch: bool = True) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        assert isinstance(self.model, FSDPModule)  # fully_shard changes the class in place
        self.model.set_requires_gradient_sync(last_micro_batch)
        loss.backward()
