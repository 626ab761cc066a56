"""Attention over the KV cache: every row of a batch reads one virtual sequence, whose entries are in pages.

Entries are in the order of their tokens, so "the first so many entries" is all there is to causality, and the
recursions of the rows don't matter. On a GPU a Triton kernel reads the pages in place (`paged_kernel.py`). Elsewhere
the pages are gathered into dense tensors for torch's scaled dot-product attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.model.blocks import KeysValues, KeyValue
from megamor.routing.plan import to_device
from megamor.serve.engine.flight import Ints, PageIds

TRITON = find_spec("triton") is not None
# Pages up to which the texts of single rows are padded to the longest.
FEW_PAGES = 4
# Rows of a prompt's chunk in one program of a GPU. (FlashAttention 2 reads pages too, but of multiples of 256 entries.)
CHUNK_ROWS = 16


@dataclass(frozen=True)
class PagedKeysValues(KeysValues):
    """The pages of one layer, k and v [pages, page_size, kv_heads, head_dim], and where the batch writes to them.

    The fresh keys and values of `rows` (None: all) are written to `addresses` [n] before anything is read. Without
    addresses nothing is written, and the block doesn't project keys at all.
    """

    k: Tensor
    v: Tensor
    addresses: Tensor
    rows: Tensor | None

    @property
    def needs_fresh(self) -> bool:  # type: ignore[override]
        """Whether anything is written."""
        return len(self.addresses) > 0

    def resolve(self, merged: KeyValue | None) -> KeyValue:
        """Write, then return all pages."""
        if merged is not None:
            for pages, new in zip((self.k, self.v), merged, strict=True):
                chosen = new if self.rows is None else new.index_select(0, self.rows)
                pages.view(-1, *pages.shape[2:]).index_copy_(0, self.addresses, chosen.to(pages.dtype))
        return self.k, self.v


@dataclass(frozen=True)
class GatherGroup:
    """G runs of n rows each: `rows` [G·n] (None: all, in order), `pages` [G·P], additive `mask` [G, 1, n, entries].

    `foreign` lists those of the G·entries that no row of their run sees and that another text may have left there.
    """

    rows: Tensor | None
    pages: Tensor
    mask: Tensor
    foreign: Tensor


@dataclass(frozen=True)
class GatherLayout:
    """An `AttentionLayout` that gathers pages, one call of attention for each group of similar runs.

    `back` [N] puts the rows of all groups into the order of the batch; None if one group has them all in order.
    """

    groups: list[GatherGroup]
    back: Tensor | None

    @staticmethod
    def of(
        tables: PageIds,
        owners: Ints,
        ends: Ints,
        begins: Ints | None = None,
        *,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> GatherLayout:
        """Row i sees the first ends[i] entries of the pages in tables[owners[i]], with `begins` only those from there.

        tables [M, P]; owners, ends and begins [N]. Pages have `size` entries. Rows of one owner are neighbours.
        """

        def group(rows: Ints | slice, runs: Ints | slice, count: int, own: Tensor | None) -> GatherGroup:
            first = None if begins is None else to_device(begins[rows], device)
            last = to_device(ends[rows], device)
            if isinstance(rows, slice):
                first, last = None if first is None else first.unsqueeze(1), last.unsqueeze(1)
            seen = (ends[rows] if isinstance(rows, slice) else ends[rows[:, -1]])[:, None]
            pages = tables[owners[runs], :count]
            # Instead of pages that it doesn't see, which may be those of others by now, a run gathers its first again.
            pages = np.where(np.arange(count) * size < seen, pages, pages[:, :1]).ravel()
            places, until = np.arange(count * size), np.where(seen < size, count * size, seen + -seen % size)
            foreign = np.flatnonzero((places >= seen) & (places < until))
            mask = entry_mask(first, last, count * size, dtype)
            return GatherGroup(own, to_device(pages, device), mask, to_device(foreign, device))

        borders = owners[1:] != owners[:-1]
        count = -(-int(ends.max()) // size)
        if count <= FEW_PAGES and borders.all():
            # Short texts that are all being decoded: the usual batch of a small machine, built in half the time.
            return GatherLayout([group(slice(None), slice(None), count, None)], None)
        starts = np.concatenate(([0], borders.nonzero()[0] + 1))
        lengths = np.concatenate((starts[1:], [len(owners)])) - starts
        num_pages = -(-np.maximum.reduceat(ends, starts) // size)
        # Single rows (decoding) are padded to the longest of their group, so a group spans a factor of two in pages at
        # most: for texts of 20 to 2,000 tokens that halves the time. For few pages another group costs more than it
        # saves. The rows of a prompt chunk read the same pages and are a group of their own: as single rows, each would
        # gather its own copy of the whole prompt (128 rows of a 512-token prompt: 240 ms instead of 6). One call per
        # run takes 3.6 times as long for 32 short texts. (Measured on one x86 core, fp32, 8 heads of 64.)
        keys = np.where(lengths == 1, np.frexp(np.maximum(num_pages, FEW_PAGES) - 1)[1], -starts - 1)
        groups, order = [], []
        different = dict.fromkeys(keys.tolist())
        for key in different:
            chosen = np.flatnonzero(keys == key)
            rows = starts[chosen, None] + np.arange(lengths[chosen[0]])
            order.append(rows.ravel())
            own = None if len(different) == 1 else to_device(order[-1], device)
            groups.append(group(rows, rows[:, 0], int(num_pages[chosen].max()), own))
        return GatherLayout(groups, None if len(groups) == 1 else to_device(np.concatenate(order).argsort(), device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim] and pages of keys and values to [N, heads · head_dim]."""
        if self.back is None:
            return attend_group(q, k, v, self.groups[0])
        outs = [
            attend_group(q if group.rows is None else q.index_select(0, group.rows), k, v, group)
            for group in self.groups
        ]
        return torch.cat(outs).index_select(0, self.back)


def entry_mask(begins: Tensor | None, ends: Tensor, num_entries: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [G, 1, n, num_entries] of rows that see the entries from `begins` (None: 0) to `ends`, [G, n]."""
    # Additive, as attention adds it in the same kernel.
    length = 1 << num_entries.bit_length()
    steps = hiding_steps(length, dtype, ends.device)
    # Row i of these windows [length, num_entries] shows the first length - i entries.
    mask = steps.unfold(0, num_entries, 1)[length - ends]
    if begins is not None:
        mask = mask + steps.flip(0).unfold(0, num_entries, 1)[length - begins]
    return mask.unsqueeze(1)


@cache
def hiding_steps(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2 · length]: first zeros, then -inf."""
    return torch.tensor([0.0, float("-inf")], dtype=dtype, device=device).repeat_interleave(length)


def attend_group(q: Tensor, k: Tensor, v: Tensor, group: GatherGroup) -> Tensor:
    """q [G·n, heads, head_dim], the rows of `group`, to [G·n, heads · head_dim]."""
    size, _, length, num_entries = group.mask.shape
    kv_heads, head_dim = k.shape[-2:]
    # Grouped-query attention: query heads that share a key head are treated as further queries of the same row, which
    # costs nothing; repeating keys and values for each of them would copy the gathered cache several times.
    q_GKHD = q.view(size, length, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    # What other texts have left may be NaN, which no mask hides: 0 · NaN is NaN.
    k_GKTD, v_GKTD = (
        pages.index_select(0, group.pages)
        .view(size * num_entries, -1)
        .index_fill_(0, group.foreign, 0)
        .view(size, num_entries, kv_heads, head_dim)
        .transpose(1, 2)
        for pages in (k, v)
    )
    # One query head's mask for all those that share a key head, which are further queries here.
    mask = group.mask if length == 1 else group.mask.repeat(1, 1, q_GKHD.shape[2] // length, 1)
    out = F.scaled_dot_product_attention(q_GKHD, k_GKTD, v_GKTD, attn_mask=mask)
    return out.view(size, kv_heads, -1, length, head_dim).permute(0, 3, 1, 2, 4).reshape(size * length, -1)


@dataclass(frozen=True)
class KernelLayout:
    """An `AttentionLayout` for the kernel that reads pages in place: row i sees ends[i] entries of tables[owners[i]].

    tables [M, pages], owners and ends [N] are int64. With `begins` [N] it sees only those from begins[i] on. `starts`
    as in `paged_attention`.
    """

    tables: Tensor
    owners: Tensor
    ends: Tensor
    begins: Tensor | None = None
    starts: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `GatherLayout.attend`."""
        # Here, because it needs Triton, which torch brings along for GPUs only.
        from megamor.serve.engine.paged_kernel import paged_attention

        return paged_attention(q, k, v, self.tables, self.owners, self.ends, self.begins, None, self.starts).flatten(1)


Layout = GatherLayout | KernelLayout


def chunk_starts(owners: Ints, most: int) -> Ints | None:
    """Where up to `most` neighbours of one owner begin, and the end of all; None if no row has such a neighbour."""
    borders = np.flatnonzero(owners[1:] != owners[:-1]) + 1
    if len(borders) + 1 == len(owners):
        return None
    firsts, ends = np.append(0, borders), np.append(borders, len(owners))
    starts = [np.arange(first, end, most) for first, end in zip(firsts, ends, strict=True)]
    return np.append(np.concatenate(starts), len(owners))


def fixed_layout(
    tables: Tensor,
    owners: Tensor,
    ends: Tensor,
    begins: Tensor | None = None,
    *,
    size: int,
    dtype: torch.dtype,
    known: Ints | None = None,
) -> Layout:
    """As `GatherLayout.of`, for tensors of any order whose values are on the device and may change between calls.

    `known` are the owners on the host, if they stay as they are.
    """
    if reads_in_place(tables.device):
        # With 32 bits there are no tensor cores, for which several rows make a wider matrix.
        wide = None if known is None or dtype.itemsize > 2 else chunk_starts(known, CHUNK_ROWS)
        starts = None if wide is None else to_device(wide, tables.device)
        return KernelLayout(tables, owners, ends, begins, starts)
    # What a graph of the CPU would be, if there were any: tests run it in place of one.
    first, last = None if begins is None else begins.unsqueeze(1), ends.unsqueeze(1)
    mask = entry_mask(first, last, tables.shape[1] * size, dtype)
    foreign = (torch.arange(mask.shape[-1], device=ends.device) >= last).flatten().nonzero().squeeze(1)
    return GatherLayout([GatherGroup(None, tables.index_select(0, owners).flatten(), mask, foreign)], None)


def reads_in_place(device: torch.device) -> bool:
    """Whether `device` runs the kernel: a GPU for which Triton is installed, as it is with torch for Linux."""
    return device.type == "cuda" and TRITON
