"""Distributed data parallel: every rank holds all the weights and averages gradients with the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megamor.config import Config
from megamor.parallel.backend import Backend, ModelStructure


class DdpBackend(Backend):
    """`Backend` with DistributedDataParallel. All ranks start with rank 0's weights and buffers."""

    def wrap(self, model: nn.Module, plan: ModelStructure, config: Config) -> nn.Module:
        """Wrap `model` so that its gradients are averaged over ranks."""
        with warnings.catch_warnings():
            # Not every supported release of torch has the new name of `broadcast_buffers`.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return DistributedDataParallel(
                model.to(self.device),
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # Lets a step leave parameters out. It also stops DDP from rearranging its buckets after the first
                # step: a resumed run would add up gradients in another order than the uninterrupted one, and from
                # three ranks on the sums would differ in the last bit.
                find_unused_parameters=True,
            )

    @contextmanager
    def forward_context(self, *, last_micro_batch: bool = True) -> Iterator[None]:
        # DDP decides in the forward pass whether the backward pass will communicate.
        assert isinstance(self.model, DistributedDataParallel)
        communication = nullcontext() if last_micro_batch else self.model.no_sync()
        with communication, super().forward_context():
            yield
