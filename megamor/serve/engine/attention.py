"""Attention over the KV cache: every row of a batch reads one virtual sequence, whose entries are in pages.

Entries are in the order of their tokens, so "the first so many entries" is all there is to causality, and the
recursions of the rows don't matter. On a GPU a Triton kernel reads the pages in place (`paged_kernel.py`). Elsewhere
the pages are gathered into dense tensors for torch's scaled dot-product attention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.model.blocks import KeysValues, KeyValue
from megamor.routing.plan import to_device


@dataclass(frozen=True)
class KVView:
    """What consecutive rows of one sequence see: row i the first ends[i] entries of the virtual sequence in `pages`.

    Blocks with a sliding window see only those from begins[i] on.
    """

    pages: list[int]
    ends: list[int]
    begins: list[int] = field(default_factory=list)


class KVRows(NamedTuple):
    """The rows of a batch: their positions, the addresses they write to (None: nothing), and what they see, in order.

    An address is page · page_size + offset in a pool.
    """

    positions: list[int]
    addresses: list[int | None]
    views: list[KVView]


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
    """G views of n rows each: `rows` [G·n], `pages` [G·P] and an additive `mask` [G, 1, n, entries]."""

    rows: Tensor
    pages: Tensor
    mask: Tensor


@dataclass(frozen=True)
class GatherLayout:
    """An `AttentionLayout` that gathers pages, one call of attention for each group of similar views.

    `back` [N] puts the rows of all groups into the order of the batch; None if one group has them all in order.
    """

    groups: list[GatherGroup]
    back: Tensor | None

    @staticmethod
    def of(
        views: Sequence[KVView], page_size: int, dtype: torch.dtype, device: torch.device, slides: bool = False
    ) -> GatherLayout:
        """As `paged_layout`."""
        first, members = 0, defaultdict[tuple[int, int], list[tuple[int, KVView]]](list)
        for number, view in enumerate(views):
            # Single rows (decoding) are padded to the longest of their group, so a group spans a factor of two in
            # pages at most: for texts of 20 to 2,000 tokens that halves the time. The rows of a prompt chunk read the
            # same pages and are a group of their own: as single rows, each would gather its own copy of the whole
            # prompt (128 rows of a 512-token prompt: 240 ms instead of 6). One call per view takes 3.6 times as long
            # for 32 short texts. (Measured on one x86 core, fp32, 8 heads of 64.)
            single = len(view.ends) == 1
            key = (0, (-(-view.ends[0] // page_size) - 1).bit_length()) if single else (1, number)
            members[key].append((first, view))
            first += len(view.ends)
        groups = [gather_group(group, page_size, dtype, device, slides) for group in members.values()]
        back = torch.cat([group.rows for group in groups]).argsort() if len(groups) > 1 else None
        return GatherLayout(groups, back)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim] and pages of keys and values to [N, heads · head_dim]."""
        if self.back is None:
            return attend_group(q, k, v, self.groups[0])
        outs = [attend_group(q.index_select(0, group.rows), k, v, group) for group in self.groups]
        return torch.cat(outs).index_select(0, self.back)


def gather_group(
    members: list[tuple[int, KVView]], page_size: int, dtype: torch.dtype, device: torch.device, slides: bool
) -> GatherGroup:
    """Views of equally many rows, each given with the index of its first row in the batch."""
    longest = max(max(view.ends) for _, view in members)
    num_pages = -(-longest // page_size)
    rows = [first + row for first, view in members for row in range(len(view.ends))]
    pages = [page for _, view in members for page in (view.pages[:num_pages] + [0] * num_pages)[:num_pages]]
    ends = to_device([view.ends for _, view in members], device)
    begins = to_device([view.begins for _, view in members], device) if slides else None
    mask = entry_mask(begins, ends, num_pages * page_size, dtype)
    return GatherGroup(to_device(rows, device), to_device(pages, device), mask)


def entry_mask(begins: Tensor | None, ends: Tensor, num_entries: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [G, 1, n, num_entries] of rows that see the entries from `begins` (None: 0) to `ends`, [G, n]."""
    # Additive, as attention adds it in the same kernel. Entries of unused pages are zeros or old values, never NaN.
    entries = torch.arange(num_entries, device=ends.device)
    hidden = entries >= ends.unsqueeze(-1)
    if begins is not None:
        hidden |= entries < begins.unsqueeze(-1)
    return torch.zeros(hidden.shape, dtype=dtype, device=ends.device).masked_fill_(hidden, float("-inf")).unsqueeze(1)


def attend_group(q: Tensor, k: Tensor, v: Tensor, group: GatherGroup) -> Tensor:
    """q [G·n, heads, head_dim], the rows of `group`, to [G·n, heads · head_dim]."""
    size, _, length, num_entries = group.mask.shape
    kv_heads, head_dim = k.shape[-2:]
    # Grouped-query attention: query heads that share a key head are treated as further queries of the same row, which
    # costs nothing; repeating keys and values for each of them would copy the gathered cache several times.
    q_GKHD = q.view(size, length, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k_GKTD, v_GKTD = (
        pages.index_select(0, group.pages).view(size, num_entries, kv_heads, head_dim).transpose(1, 2)
        for pages in (k, v)
    )
    # One query head's mask for all those that share a key head, which are further queries here.
    mask = group.mask if length == 1 else group.mask.repeat(1, 1, q_GKHD.shape[2] // length, 1)
    out = F.scaled_dot_product_attention(q_GKHD, k_GKTD, v_GKTD, attn_mask=mask)
    return out.view(size, kv_heads, -1, length, head_dim).permute(0, 3, 1, 2, 4).reshape(size * length, -1)


@dataclass(frozen=True)
class KernelLayout:
    """An `AttentionLayout` for the kernel that reads pages in place: row i sees ends[i] entries of tables[owners[i]].

    tables [M, pages], owners and ends [N], all int64. With `begins` [N] it sees only those from begins[i] on.
    """

    tables: Tensor
    owners: Tensor
    ends: Tensor
    begins: Tensor | None = None

    @staticmethod
    def of(views: Sequence[KVView], page_size: int, device: torch.device, slides: bool = False) -> KernelLayout:
        """As `paged_layout`."""
        longest = -(-max(max(view.ends) for view in views) // page_size)
        tables = [(view.pages + [0] * longest)[:longest] for view in views]
        owners = [number for number, view in enumerate(views) for _ in view.ends]
        ends = [end for view in views for end in view.ends]
        begins = to_device([begin for view in views for begin in view.begins], device) if slides else None
        return KernelLayout(to_device(tables, device), to_device(owners, device), to_device(ends, device), begins)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `GatherLayout.attend`."""
        # Here, because it needs Triton, which torch brings along for GPUs only.
        from megamor.serve.engine.paged_kernel import paged_attention

        return paged_attention(q, k, v, self.tables, self.owners, self.ends, self.begins).flatten(1)


Layout = GatherLayout | KernelLayout


def paged_layout(
    views: Sequence[KVView], page_size: int, dtype: torch.dtype, device: torch.device, slides: bool = False
) -> Layout:
    """The layout of rows that see `views`, for the attention of `device`; `slides`: in blocks with a window."""
    if reads_in_place(device):
        return KernelLayout.of(views, page_size, device, slides)
    return GatherLayout.of(views, page_size, dtype, device, slides)


def single_rows_layout(
    tables: Tensor, ends: Tensor, page_size: int, dtype: torch.dtype, begins: Tensor | None = None
) -> Layout:
    """Row i sees the first ends[i] entries of the pages in tables[i]: ends [N], tables [N, pages], both int64.

    With `begins` [N], it sees only those from begins[i] on.

    Their values stay on the device, so this can be part of a CUDA graph.
    """
    count, num_pages = tables.shape
    rows = torch.arange(count, device=tables.device)
    if reads_in_place(tables.device):
        return KernelLayout(tables, rows, ends, begins)
    mask = entry_mask(None if begins is None else begins.unsqueeze(1), ends.unsqueeze(1), num_pages * page_size, dtype)
    return GatherLayout([GatherGroup(rows, tables.flatten(), mask)], None)


def reads_in_place(device: torch.device) -> bool:
    """Whether `device` runs the kernel."""
    return device.type == "cuda"
