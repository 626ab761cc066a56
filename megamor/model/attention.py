"""One attention function for dense, ragged and cached layouts.

Blocks work on flat rows [N, ...]; only attention cares which sequence a row belongs to. An `AttentionLayout` is built
once per launch of a stack of blocks and used by each of them: it brings queries and keys into [batch, heads, length,
head_dim], calls SDPA and flattens the result. Routed tokens keep their original order, so that attention among them is
causal in the order of the rows; a mask is needed only where queries meet keys of other tokens (shared or cached keys)
or where documents must not see each other.

Where there is a kernel for it (`has_packed_kernel`), sequences of different lengths and documents are neither padded
nor masked: the rows stay flat, and the kernel is told at which of them each piece begins. On a CPU, buckets of pieces
of similar length do the same (`megamor/model/buckets.py`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from megamor.model.buckets import Buckets
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
class Segments:
    """Flat rows as pieces that don't see each other: piece i is rows bounds[i] to bounds[i + 1], causal inside.

    `bounds` [pieces + 1] is int32 and ascending, pieces may be empty; `longest` is an upper bound of their lengths,
    which needn't be tight. `buckets` are there where no kernel is.
    """

    bounds: Tensor
    longest: int
    buckets: Buckets | None = None


@dataclass(frozen=True)
class AttentionLayout:
    """Who sees whom. `mask` [batch, 1, queries, keys] is additive; None means causal among the rows themselves.

    `keys` None means that keys and values arrive as [batch, length, kv_heads, head_dim] already (a cache).
    `pieces` cut the queries into parts (first, end, keys), each of which is given only the first so many keys.
    With `segments` the rows attend to each other inside each piece, and nothing else counts.
    """

    queries: Grid
    keys: Grid | None
    mask: Tensor | None = None
    pieces: tuple[tuple[int, int, int], ...] = ()
    segments: Segments | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim], k and v [M, kv_heads, head_dim] to [N, heads · head_dim]."""
        if self.segments is not None:
            return packed_attention(q, k, v, self.segments).flatten(1)
        q_BHTD = self.queries.pad(q).transpose(1, 2)
        k_BHTD = (k if self.keys is None else self.keys.pad(k)).transpose(1, 2)
        v_BHTD = (v if self.keys is None else self.keys.pad(v)).transpose(1, 2)
        grouped = q.shape[1] != k.shape[-2]
        if self.mask is None:
            out = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, enable_gqa=grouped)
        else:
            if grouped and q.is_cuda:
                # On CUDA the only kernel that takes both a mask and grouped heads is the one that stores all scores.
                k_BHTD, v_BHTD = (one_per_head(x, q.shape[1], dim=1) for x in (k_BHTD, v_BHTD))
                grouped = False
            pieces = self.pieces or ((0, *self.mask.shape[2:]),)
            num_keys = [keys for _, _, keys in pieces]
            rows = q_BHTD.split([end - first for first, end, _ in pieces], dim=2)
            parts = []
            for (first, end, keys), query, key, value in zip(
                pieces, rows, prefixes(k_BHTD, num_keys), prefixes(v_BHTD, num_keys), strict=True
            ):
                mask = self.mask[:, :, first:end, :keys].to(q.dtype)
                parts.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped))
            out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return self.queries.unpad(out.transpose(1, 2).flatten(2))


class _Prefixes(torch.autograd.Function):
    """Adds up the gradients in one tensor, where slicing would give each slice a tensor of full size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_keys: list[int]) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        return tuple(x[:, :, :count] for count in num_keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for grad in grads:
            total[:, :, : grad.shape[2]] += grad
        return total, None


def prefixes(x: Tensor, num_keys: list[int]) -> tuple[Tensor, ...]:
    """x [batch, heads, keys, head_dim] cut to its first keys, once for each of `num_keys`."""
    return (x,) if num_keys == [x.shape[2]] else _Prefixes.apply(x, num_keys)


def one_per_head(x: Tensor, num_heads: int, dim: int) -> Tensor:
    """Keys or values whose heads, at `dim`, are repeated so that each query head has its own."""
    return x.repeat_interleave(num_heads // x.shape[dim], dim=dim)


_VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
_TAKES_GROUPS = "enable_gqa" in _VARLEN_OPTIONS


def has_packed_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `packed_attention` runs: flash attention, in 16 bits, on GPUs since NVIDIA's Ampere."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention inside each piece: q [N, heads, head_dim], k and v [N, kv_heads, head_dim] to q's shape."""
    if segments.buckets is not None:
        return segments.buckets.attend(q, k, v)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not _TAKES_GROUPS:
        k, v = (one_per_head(x, q.shape[1], dim=1) for x in (k, v))
    options = {"enable_gqa": True, **_CAUSAL} if grouped and _TAKES_GROUPS else _CAUSAL
    bounds, longest = segments.bounds, segments.longest
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return out


def visibility_mask(
    query_order: Tensor,
    key_order: Tensor,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Additive mask [B, 1, Q, K]: a query sees keys of its own document whose order is not above its own.

    Orders are places in the sequence, [B, Q] and [B, K]; keys that don't exist carry an order above every query's.
    Padded queries carry a negative order and see nothing of the real keys; they are given the first key so that their
    row of the softmax stays finite.
    """
    visible = key_order.unsqueeze(1) <= query_order.unsqueeze(2)
    if query_document is not None and key_document is not None:
        visible &= query_document.unsqueeze(2) == key_document.unsqueeze(1)
    nothing = ~visible.any(-1)
    visible[..., 0] |= nothing
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)
