"""Loss of a model over a validation set, under the routing of training and under the inference rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from megamor.model import ModelOutput, Transformer
from megamor.routing import Mode


class Batch(Protocol):
    """Token ids [B, S], ids to predict [B, S] (-100 where none is), document numbers [B, S] if masked."""

    @property
    def inputs(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def documents(self) -> Tensor | None: ...


def modes_of(model: Transformer) -> tuple[Mode, ...]:
    """The ways of routing worth measuring: only routers that look ahead in training have two."""
    looks_ahead = model.stage is not None and not model.stage.router.causal_in_training
    return ("topk", "causal") if looks_ahead else ("causal",)


@torch.no_grad()
def summed_loss(
    model: Callable[..., ModelOutput],
    batches: Iterable[Batch],
    mode: Mode,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """[3] in fp64 on `device`: summed negative log-likelihood (nats), tokens counted, recursions taken by all tokens.

    Sums rather than means, so that ranks and batches can be added up.
    """
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        with context():
            documents = None if batch.documents is None else batch.documents.to(device)
            out = model(batch.inputs.to(device), batch.labels.to(device), mode=mode, documents=documents)
        assert out.loss_sum is not None
        assert out.num_tokens is not None
        total[0] += out.loss_sum
        total[1] += out.num_tokens
        if out.depth is not None:
            total[2] += (out.depth * (batch.labels.to(device) != -100)).sum()
    return total


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that is beyond floating point, as early in a bad run."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
