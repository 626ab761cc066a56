"""Causal attention inside pieces of flat rows on a CPU, where no kernel takes pieces of different lengths.

Pieces of similar length share a bucket, one call of SDPA on a [pieces, length] grid: however uneven the pieces, little
is computed for padding, nothing is masked, and the number of calls grows with the logarithm of the longest piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RATIO, SHORT = 8 / 7, 16
"""Pieces of a bucket differ in length by less than this factor; all up to the short length share one."""


@dataclass(frozen=True)
class Buckets:
    """Grids [pieces, length] side by side, and the place `slots` [N] of each row in them."""

    shapes: tuple[tuple[int, int], ...]
    slots: Tensor

    @staticmethod
    def of(bounds: Tensor) -> Buckets:
        """Buckets for the pieces bounds[i] to bounds[i + 1], perhaps empty, of the rows; bounds [pieces + 1]."""
        bounds = bounds.long()
        lengths = bounds.diff()
        order = lengths.argsort(descending=True, stable=True)[: int(lengths.count_nonzero())]
        descending = lengths[order]
        rungs = (descending.clamp_min(SHORT).double().log() / math.log(RATIO)).floor()
        counts = rungs.unique_consecutive(return_counts=True)[1]
        longest = descending[counts.cumsum(0) - counts]
        room = longest.repeat_interleave(counts)
        first_slots = torch.zeros_like(lengths).index_copy(0, order, room.cumsum(0) - room)
        rows = torch.arange(int(bounds[-1]), device=bounds.device)
        slots = rows + (first_slots - bounds[:-1]).repeat_interleave(lengths)
        return Buckets(tuple(zip(counts.tolist(), longest.tolist(), strict=True)), slots)

    @torch.compiler.disable  # the shapes are others at every call
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim], k and v [N, kv_heads, head_dim] to q's shape."""
        sizes = [pieces * length for pieces, length in self.shapes]
        grids = [x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, self.slots, x).split(sizes) for x in (q, k, v)]
        parts = []
        for shape, *rows in zip(self.shapes, *grids, strict=True):
            query, key, value = (x.unflatten(0, shape).transpose(1, 2) for x in rows)
            grouped = query.shape[1] != key.shape[1]
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts).index_select(0, self.slots)
