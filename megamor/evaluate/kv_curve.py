"""Loss of a model that decodes with a bounded cache of keys and values, and the bytes that the cache holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megamor.evaluate.sampling import cache_for
from megamor.model import CacheBound, Transformer

if TYPE_CHECKING:
    from megamor.data.loader import MicroBatch


@torch.no_grad()
def bounded_loss(model: Transformer, batches: Iterable[MicroBatch], bound: CacheBound | None) -> dict[str, float]:
    """Read the documents of `batches` through a cache, as if they were being generated.

    Returns:
        `loss` in nats per token, and `kv_bytes`, those that the cache holds at the end of a document, in the mean.
    """
    loss = tokens = held = documents = 0.0
    for batch in batches:
        # Documents that have been read leave the batch: the longest comes first, the shortest leaves first.
        rows = sorted(documents_of(batch), key=lambda row: -row.shape[1])
        documents += len(rows)
        cache = cache_for(model, len(rows), rows[0].shape[1], bound)
        while rows:
            first, last = cache.num_tokens, min(cache.num_tokens + cache.chunk, rows[-1].shape[1])
            inputs, labels = torch.stack([row[:, first:last] for row in rows], 1).to(model.embed.weight.device)
            out = model(inputs, labels, mode="causal", cache=cache)
            assert out.loss_sum is not None
            assert out.num_tokens is not None
            loss, tokens = loss + out.loss_sum.item(), tokens + out.num_tokens.item()
            rows = [row for row in rows if row.shape[1] > last]
            held += cache.bytes_held()[len(rows) :].sum().item()
            if len(rows) < cache.batch:
                cache.select(torch.arange(len(rows), device=inputs.device))
    return {"loss": loss / tokens, "kv_bytes": held / documents}


def documents_of(batch: MicroBatch) -> list[Tensor]:
    """Inputs and labels [2, n] of each document, or of each sequence where documents aren't kept apart."""
    found: list[Tensor] = []
    lengths = [batch.inputs.shape[1]] * len(batch.inputs) if batch.lengths is None else batch.lengths.tolist()
    for row, length in enumerate(lengths):
        pair = torch.stack((batch.inputs[row], batch.labels[row]))[:, :length]
        sizes = [length]
        if batch.documents is not None:
            sizes = batch.documents[row, :length].unique_consecutive(return_counts=True)[1].tolist()  # type: ignore[no-untyped-call]
        found += [document for document in torch.split(pair, sizes, dim=1) if document.shape[1]]
    return found
