"""Scaled dot-product attention over flat rows [N, ...], for dense, routed and cached tokens.

Blocks work on flat rows; only attention needs to know which sequence a row belongs to. An `AttentionLayout` holds that
knowledge. It is built once per call of a stack of blocks and used by every block: it brings queries and keys into
[batch, heads, length, head_dim], calls SDPA and flattens the result. Selected tokens keep their original order, so
attention among them is causal in row order and needs no mask. A mask is needed only where queries meet the keys of
other tokens (shared or cached keys), or where documents must not see each other.

Ragged sequences and packed documents take a faster path where there is one. On GPUs with a variable-length kernel
(`has_packed_kernel`) the rows stay flat and the kernel gets the boundaries of the segments; on a CPU, segments of
similar length are computed together (`megamor/model/buckets.py`). Neither pads to the longest sequence nor builds a
mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.attention as kernels
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from megamor.config import ModelConfig
from megamor.model.buckets import Buckets
from megamor.model.multi_scale import Pool
from megamor.routing import TokenSet

# cuDNN takes a mask too, but plans anew for each shape, which can cost more than the attention itself.
MASKED_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Grid:
    """Flat rows [N] seen as [batch, length].

    `slots` [N] gives each row's index in the flattened grid where sequences have different lengths; None means that the
    rows fill the grid exactly (N = batch · length), so that padding is a view and costs nothing.
    """

    batch: int
    length: int
    slots: Tensor | None = None

    @staticmethod
    def of(tokens: TokenSet, multiple: int = 1) -> Grid:
        """The grid of a token set; sequences shorter than the longest are padded at the end.

        The length of a ragged grid is rounded up to a multiple of `multiple`.
        """
        if tokens.lengths is None:
            return Grid(tokens.batch, tokens.max_length)
        # Ragged: a row's cell is given by its sequence and the number of the set's tokens before it there.
        device, length = tokens.lengths.device, -(-tokens.max_length // multiple) * multiple
        cells = tokens.sequences(device) * length + tokens.rank_of(tokens, device)
        return Grid(tokens.batch, length, cells)

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
    """Flat rows cut into segments that cannot see each other; attention is causal inside each.

    Segment i holds rows bounds[i] to bounds[i + 1]. `bounds` [segments + 1] is int32 and ascending; a segment may be
    empty. `longest` is an upper bound of the lengths and need not be tight. `buckets` is set on a CPU only. A query's
    first key is at most `reach` rows before it (None: any number), in the kernel only.
    """

    bounds: Tensor
    longest: int
    buckets: Buckets | None = None
    reach: int | None = None


Ranges = tuple[tuple[int, int], ...]


class Chunk(NamedTuple):
    """Neighbouring queries, which need only the keys in the ranges (first, end) `keys`.

    `mask` [batch or 1, 1, queries, keys] is added to their scores.
    """

    keys: Ranges
    mask: Tensor


@dataclass(frozen=True)
class AttentionLayout:
    """Which rows see which keys.

    With `segments`, the rows attend to each other inside each segment and the other fields are unused. Otherwise
    `chunks` cut the queries into ranges; without any, attention is causal among the rows themselves. `keys` is None
    where keys and values arrive as [batch, length, kv_heads, head_dim] already (from a cache). With a `pool`, the means
    of blocks are keys too, and precede the others. `score` [batch, length] collects what the keys of a cache receive.
    """

    queries: Grid
    keys: Grid | None
    chunks: tuple[Chunk, ...] = ()
    segments: Segments | None = None
    pool: Pool | None = None
    score: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim], k and v [M, kv_heads, head_dim] to [N, heads · head_dim]."""
        if self.segments is not None:
            return packed_attention(q, k, v, self.segments).flatten(1)
        q_BHTD = self.queries.pad(q).transpose(1, 2)
        k_BHTD, v_BHTD = (self._keys(x).transpose(1, 2) for x in (k, v))
        if not self.chunks:
            grouped = q.shape[1] != k.shape[-2]
            out = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, enable_gqa=grouped)
        else:
            out = self._attend_masked(q_BHTD, k_BHTD, v_BHTD)
        if self.score is not None:
            self.score.add_(self._received(q_BHTD, k_BHTD, self.queries.pad(torch.ones(len(q), device=q.device))))
        return self.queries.unpad(out.transpose(1, 2).flatten(2))

    def _keys(self, x: Tensor) -> Tensor:
        """Keys or values as attention sees them, [batch, keys, kv_heads, head_dim]."""
        each = x if self.keys is None else self.keys.pad(x)
        if self.pool is None:
            return each
        return torch.cat((self.pool.mean(x.flatten(0, 1) if self.keys is None else x), each), dim=1)

    def _received(self, q: Tensor, k: Tensor, real: Tensor) -> Tensor:
        """Attention that each key of a cache receives, over all heads and `real` [batch, queries], [batch, length]."""
        # SDPA doesn't return weights. Decoding has few queries, so computing them again costs little.
        scores = q.float() @ one_per_head(k.float(), q.shape[1], dim=1).mT / q.shape[-1] ** 0.5
        weights = (scores + self.chunks[0].mask).softmax(-1).sum(1)
        received = (weights * real.unsqueeze(2)).sum(1)
        return received if self.pool is None else self.pool.spread(received)

    def _attend_masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [batch, heads, length, head_dim], one chunk of queries at a time."""
        # SDPA computes all scores under a mask and cannot know which are -inf. Chunks leave out keys that are certainly
        # masked for all their queries.
        grouped = q.shape[1] != k.shape[1]
        if q.is_cuda:
            if grouped:
                # On CUDA the only kernel that takes both a mask and grouped heads is the one that stores all scores.
                k, v = (one_per_head(x, q.shape[1], dim=1) for x in (k, v))
            with sdpa_kernel(MASKED_KERNELS):
                return self._attend_chunks(q, k, v, grouped=False)
        return self._attend_chunks(q, k, v, grouped)

    def _attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
        found = [chunk.keys for chunk in self.chunks]
        outputs = [
            F.scaled_dot_product_attention(query, key, value, attn_mask=chunk.mask.to(q.dtype), enable_gqa=grouped)
            for chunk, query, key, value in zip(
                self.chunks,
                torch.split(q, [chunk.mask.shape[2] for chunk in self.chunks], dim=2),
                chosen(k, found),
                chosen(v, found),
                strict=True,
            )
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


class _Slices(torch.autograd.Function):
    """Slices whose gradients are summed in one tensor; plain slicing would allocate a full-size tensor for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: Ranges) -> tuple[Tensor, ...]:
        # Views, not copies: SDPA takes any strides, and the shape is all that the backward pass needs.
        ctx.shape, ctx.ranges = x.shape, ranges
        return tuple(x[:, :, first:end] for first, end in ranges)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for (first, end), grad in zip(ctx.ranges, grads, strict=True):
            total[:, :, first:end] += grad
        return total, None


def chosen(x: Tensor, ranges: Sequence[Ranges]) -> Iterator[Tensor]:
    """For each of `ranges`, its keys of x [batch, heads, keys, head_dim], one range after another."""
    if list(ranges) == [((0, x.shape[2]),)]:
        yield x
        return
    slices = iter(_Slices.apply(x, sum(ranges, ())))  # type: ignore[no-untyped-call]
    for each in ranges:
        parts = list(islice(slices, len(each)))
        yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def one_per_head(x: Tensor, num_heads: int, dim: int) -> Tensor:
    """Keys or values with the heads at `dim` repeated, so that each query head has its own."""
    return x.repeat_interleave(num_heads // x.shape[dim], dim=dim)


# `varlen_attn` is experimental: how to ask for causality, and whether heads may be grouped, depends on torch's version.
_VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters
KERNEL_TAKES_WINDOWS = "window_size" in _VARLEN_OPTIONS
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if KERNEL_TAKES_WINDOWS else {"is_causal": True}
_TAKES_GROUPS = "enable_gqa" in _VARLEN_OPTIONS


def has_packed_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the variable-length kernel runs: flash attention in 16 bits, on NVIDIA GPUs from Ampere on."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def describe_kernels(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """The kernels that attention will use on a GPU, for a line at the start of a run."""
    q, k = (
        torch.empty(1, heads, config.max_seq_len, config.head_dim, dtype=dtype, device=device)
        for heads in (config.num_heads, config.num_kv_heads)
    )
    chosen = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=config.num_heads != config.num_kv_heads)
    current = getattr(kernels, "current_flash_attention_impl", lambda: None)() or "FA2"
    causal = SDPBackend(chosen).name.removesuffix("_ATTENTION").replace("FLASH", current).lower()
    packed = f"varlen {current.lower()}" if has_packed_kernel(device, dtype, config.head_dim) else "masked"
    return f"attention kernels: causal {causal}; documents and ragged sequences {packed}; masked efficient"


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention inside each segment: q [N, heads, head_dim], k and v [N, kv_heads, head_dim] to q's shape."""
    if segments.buckets is not None:
        return segments.buckets.attend(q, k, v)  # type: ignore[no-any-return]
    grouped = q.shape[1] != k.shape[1]
    if grouped and not _TAKES_GROUPS:
        k, v = (one_per_head(x, q.shape[1], dim=1) for x in (k, v))
    options = {"enable_gqa": True, **_CAUSAL} if grouped and _TAKES_GROUPS else _CAUSAL
    if segments.reach is not None:
        options = {**options, "window_size": (segments.reach, 0)}
    bounds, longest = segments.bounds, segments.longest
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return out  # type: ignore[no-any-return]


def visibility_mask(
    last: Tensor, keys: Tensor, first: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Additive mask [B, 1, Q, K]: a query sees the keys from `first` to `last`, [B, Q] each (None: from the beginning).

    `keys` [B, K] are their positions, or rows. Empty key slots are beyond every query's last; the last of padded
    queries is negative.
    """
    visible = keys.unsqueeze(1) <= last.unsqueeze(2)
    if first is not None:
        visible &= keys.unsqueeze(1) >= first.unsqueeze(2)
    # A padded query sees no key, and a softmax over -inf alone is NaN, which would reach the gradients of real keys.
    # It gets the first key instead; its result is dropped by `Grid.unpad`.
    visible[..., 0] |= ~visible.any(-1)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)
