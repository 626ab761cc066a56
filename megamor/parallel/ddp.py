"""Distributed data parallel: every rank holds all the weights and averages gradients with the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
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
            wrapped = DistributedDataParallel(
                model.to(self.device),
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=not plan.uses_everything,  # the search walks the whole graph in every pass
            )
        if plan.uses_everything:
            arrange_buckets(wrapped)
        return wrapped

    @contextmanager
    def forward_context(self, *, last_micro_batch: bool = True) -> Iterator[None]:
        # DDP decides in the forward pass whether the backward pass will communicate.
        assert isinstance(self.model, DistributedDataParallel)
        communication = nullcontext() if last_micro_batch else self.model.no_sync()
        with communication, super().forward_context():
            yield


def arrange_buckets(wrapped: DistributedDataParallel) -> None:
    """Let DDP arrange its buckets now, by a backward pass of zeros, instead of after the first step. Collective.

    It arranges them once, in the order in which gradients appear. In a resumed run the first step would then add up
    gradients in another order than in the uninterrupted one, and from three ranks on sums would differ in the last bit.
    """
    # DDP has no public interface for this; its own forward pass calls the same three.
    wrapped.reducer.prepare_for_forward()
    wrapped.reducer.prepare_for_backward([])
    zeros = [parameter.flatten()[:1] * 0.0 for parameter in wrapped.parameters() if parameter.requires_grad]
    torch.cat(zeros).sum().backward()  # type: ignore[no-untyped-call]
    wrapped.reducer._rebuild_buckets()
    wrapped.zero_grad(set_to_none=True)
