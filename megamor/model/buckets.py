"""Causal attention inside segments of flat rows on a CPU, where no kernel takes segments of different lengths.

Segments of similar length go into one bucket, which is one call of SDPA on a [segments, length] grid. However uneven
the lengths, little padding is computed and nothing is masked; the number of calls grows with the logarithm of the
longest segment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RATIO, SHORT = 8 / 7, 16
"""Lengths in one bucket differ by less than this factor; all segments up to the short length go into one."""


@dataclass(frozen=True)
class Buckets:
    """Grids of shape [segments, length] laid side by side; `slots` [N] is each row's index in them."""

    shapes: tuple[tuple[int, int], ...]
    slots: Tensor

    @staticmethod
    def of(bounds: Tensor) -> Buckets:
        """Buckets for segments of rows bounds[i] to bounds[i + 1], some perhaps empty; bounds [segments + 1]."""
        bounds = bounds.long()
        lengths = bounds.diff()
        # Longest first, without the empty ones. A bucket is a run of neighbours in this order, as wide as its first.
        order = lengths.argsort(descending=True, stable=True)[: int(lengths.count_nonzero())]
        descending = lengths[order]
        rungs = (descending.clamp_min(SHORT).double().log() / math.log(RATIO)).floor()
        counts = rungs.unique_consecutive(return_counts=True)[1]  # type: ignore[no-untyped-call]
        widths = descending[counts.cumsum(0) - counts]
        room = widths.repeat_interleave(counts)
        first_slots = torch.zeros_like(lengths).index_copy(0, order, room.cumsum(0) - room)
        rows = torch.arange(int(bounds[-1]), device=bounds.device)
        slots = rows + (first_slots - bounds[:-1]).repeat_interleave(lengths)
        return Buckets(tuple(zip(counts.tolist(), widths.tolist(), strict=True)), slots)

    # Not compiled, because the shapes differ from call to call and each would be compiled anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim], k and v [N, kv_heads, head_dim] to q's shape."""
        sizes = [segments * length for segments, length in self.shapes]
        padded = (x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, self.slots, x) for x in (q, k, v))
        grids = [torch.split(x, sizes) for x in padded]
        outputs = []
        for shape, *rows in zip(self.shapes, *grids, strict=True):
            query, key, value = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in rows)
            grouped = query.shape[1] != key.shape[1]
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.slots)
