"""How many pairs of a query and a key attention can't leave out: what its FLOPs are counted from."""

from __future__ import annotations

import torch
from torch import Tensor

from megamor.model.layouts import Geometry, document_starts
from megamor.routing import TokenSet


def visible_pairs(queries: TokenSet, keys: TokenSet, geometry: Geometry) -> Tensor:
    """Pairs (query, key) with the key not after the query and, where documents are kept apart, in its document.

    `queries` are among `keys`. A scalar in fp32 on the device, which isn't waited for.
    """
    device = geometry.positions.device
    if geometry.documents is not None:
        return _inside_documents(queries, keys, geometry.documents).float()
    if keys is queries and queries.lengths is None:
        total = queries.batch * queries.max_length * (queries.max_length + 1) / 2
        return torch.full((), total, device=device)
    if keys is queries and queries.lengths is not None:
        lengths = queries.lengths.float()
        return (lengths * (lengths + 1) / 2).sum()
    return (keys.rank_of(queries, device) + 1).sum().float()


def _inside_documents(queries: TokenSet, keys: TokenSet, documents: Tensor) -> Tensor:
    """The same with ids `documents` [B·S]: keys between the row at which a query's document begins and its own."""
    begins = document_starts(documents.view(queries.batch, queries.seq_len))
    offsets = torch.arange(queries.batch, device=documents.device).unsqueeze(1) * queries.seq_len
    rows = queries.rows(documents.device)
    first = (begins + offsets).flatten()[rows]
    if keys.index is None:
        return (rows - first + 1).sum()
    return (torch.searchsorted(keys.index, rows, right=True) - torch.searchsorted(keys.index, first)).sum()
