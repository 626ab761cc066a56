"""One attention function for dense, ragged and cached layouts.

Blocks work on flat rows [N, ...]; only attention cares which sequence a row belongs to. An `AttentionLayout` is built
once per launch of a stack of blocks and used by each of them: it brings queries and keys into [batch, heads, length,
head_dim], calls SDPA and flattens the result. Routed tokens keep their original order, so that attention among them is
causal in the order of the rows; a mask is needed only where queries meet keys of other tokens (shared or cached keys)
or where documents must not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.routing import TokenSet


@dataclass(frozen=True)
class Grid:
    """Flat rows [N] seen as [batch, length]. `slots` [N] places ragged rows; None where N = batch·length exactly."""

    batch: int
    length: int
    slots: Tensor | None = None

    @staticmethod
    def of(tokens: TokenSet) -> Grid:
        """The grid of a token set; sequences shorter than the longest are padded at the end."""
        if tokens.lengths is None:
            return Grid(tokens.batch, tokens.max_length)
        assert tokens.index is not None
        sequence = tokens.index // tokens.seq_len
        rank = tokens.rank_of(tokens, tokens.index.device)
        return Grid(tokens.batch, tokens.max_length, sequence * tokens.max_length + rank)

    def pad(self, rows: Tensor, fill: float = 0) -> Tensor:
        """Rows [N, ...] to [batch, length, ...]."""
        if self.slots is not None:
            padded = rows.new_full((self.batch * self.length, *rows.shape[1:]), fill)
            rows = padded.index_copy(0, self.slots, rows)
        return rows.view(self.batch, self.length, *rows.shape[1:])

    def unpad(self, grid: Tensor) -> Tensor:
        """[batch, length, ...] to rows [N, ...]."""
        flat = grid.reshape(self.batch * self.length, *grid.shape[2:])
        return flat if self.slots is None else flat.index_select(0, self.slots)


@dataclass(frozen=True)
class AttentionLayout:
    """Who sees whom. `mask` [batch, 1, queries, keys] is additive; None means causal among the rows themselves.

    `keys` None means that keys and values arrive as [batch, length, kv_heads, head_dim] already (a cache).
    `num_chunks` cuts the queries into as many parts, each of which is given only the keys that it can possibly see.
    """

    queries: Grid
    keys: Grid | None
    mask: Tensor | None = None
    num_chunks: int = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim], k and v [M, kv_heads, head_dim] to [N, heads · head_dim]."""
        q_BHTD = self.queries.pad(q).transpose(1, 2)
        k_BHTD = (k if self.keys is None else self.keys.pad(k)).transpose(1, 2)
        v_BHTD = (v if self.keys is None else self.keys.pad(v)).transpose(1, 2)
        grouped = q.shape[1] != k.shape[-2]
        if self.mask is None:
            out = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, enable_gqa=grouped)
        else:
            num_queries, num_keys = self.mask.shape[2:]
            parts = []
            for rows in chunks(num_queries, self.num_chunks):
                visible = slice(0, num_keys - num_queries + rows.stop if self.num_chunks > 1 else num_keys)
                parts.append(
                    F.scaled_dot_product_attention(
                        q_BHTD[:, :, rows],
                        k_BHTD[:, :, visible],
                        v_BHTD[:, :, visible],
                        attn_mask=self.mask[:, :, rows, visible].to(q.dtype),
                        enable_gqa=grouped,
                    )
                )
            out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return self.queries.unpad(out.transpose(1, 2).flatten(2))


def chunks(length: int, count: int) -> list[slice]:
    """`count` slices of about equal size that cover range(length)."""
    bounds = [length * number // count for number in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def visibility_mask(
    query_order: Tensor, key_order: Tensor, query_document: Tensor | None = None, key_document: Tensor | None = None
) -> Tensor:
    """Additive fp32 mask [B, 1, Q, K]: a query sees keys of its own document whose order is not above its own.

    Orders are places in the sequence, [B, Q] and [B, K]; keys that don't exist carry an order above every query's.
    Padded queries carry a negative order and see nothing of the real keys; they are given the first key so that their
    row of the softmax stays finite.
    """
    visible = key_order.unsqueeze(1) <= query_order.unsqueeze(2)
    if query_document is not None and key_document is not None:
        visible &= query_document.unsqueeze(2) == key_document.unsqueeze(1)
    nothing = ~visible.any(-1)
    visible[..., 0] |= nothing
    mask = torch.zeros(visible.shape, dtype=torch.float32, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)
