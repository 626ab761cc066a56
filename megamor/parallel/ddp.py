"""Distributed data parallel: every rank holds all the weights and averages gradients with the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megamor.parallel.precision import autocast
from megamor.parallel.single import SingleBackend


class DdpBackend(SingleBackend):
    """Fulfils `Backend` with DistributedDataParallel. Rank 0's initial weights and buffers win."""

    def wrap(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap for gradient averaging.

        `find_unused_parameters` lets a step leave parameters out. It also keeps the buckets as they are from the first
        step on, so that sums over three ranks and more are in the same order after a resume.
        """
        with warnings.catch_warnings():
            # The new name of `broadcast_buffers` isn't known to every supported release.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return DistributedDataParallel(
                model.to(self.device),
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
            )

    @contextmanager
    def forward_context(self, *, last_micro_batch: bool = True) -> Iterator[None]:
        # DDP decides in the forward pass whether the backward pass will communicate.
        assert isinstance(self.model, DistributedDataParallel)
        silence = nullcontext() if last_micro_batch else self.model.no_sync()
        with silence, autocast(self.device, self.precision):
            yield
