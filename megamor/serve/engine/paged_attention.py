"""Attention of rows to virtual sequences that lie in pages.

Every row sees the first so many entries of one virtual sequence: entries are in the order of their tokens, so nothing
else is causal about it, and which depths the rows are at makes no difference. Pages are gathered into grids of rows
with similarly many pages, one call of SDPA each; on a GPU a kernel reads the pages where they are (`paged_kernel.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.model.blocks import KeysValues, KeyValue
from megamor.serve.engine.transfer import to_device


@dataclass(frozen=True)
class Reading:
    """Consecutive rows that read the virtual sequence in `pages`: row i sees its first ends[i] entries."""

    pages: list[int]
    ends: list[int]


@dataclass(frozen=True)
class PagedKeysValues(KeysValues):
    """Pages of one layer, [pages, page_size, kv_heads, head_dim]; fresh keys and values of `rows` go to `places` first.

    `places` [n] count through all pages; `rows` None means all, and no places that nothing is projected.
    """

    k: Tensor
    v: Tensor
    places: Tensor
    rows: Tensor | None

    @property
    def needs_fresh(self) -> bool:  # type: ignore[override]
        """Whether anything is written."""
        return len(self.places) > 0

    def resolve(self, fresh: KeyValue | None) -> KeyValue:
        """Write, then return all pages."""
        if fresh is not None:
            for pages, new in zip((self.k, self.v), fresh, strict=True):
                chosen = new if self.rows is None else new.index_select(0, self.rows)
                pages.view(-1, *pages.shape[2:]).index_copy_(0, self.places, chosen.to(pages.dtype))
        return self.k, self.v


@dataclass(frozen=True)
class Group:
    """Readings of equally many rows: `rows` [G·n], their `pages` [G·P] and an additive `mask` [G, 1, n, entries]."""

    rows: Tensor
    pages: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PagedLayout:
    """The rows of a launch and what they read; takes the place of an `AttentionLayout`.

    `back` [N] puts the groups' rows into the order of the launch; None where one group has them all in order.
    """

    groups: list[Group]
    back: Tensor | None

    @staticmethod
    def of(readings: Sequence[Reading], page_size: int, dtype: torch.dtype, device: torch.device) -> PagedLayout:
        """Gather the pages of `readings`."""
        first, members = 0, defaultdict[tuple[int, int], list[tuple[int, Reading]]](list)
        for number, reading in enumerate(readings):
            # Single rows share a grid with those of up to twice as many pages; several rows have one to themselves.
            single = len(reading.ends) == 1
            key = (0, (-(-reading.ends[0] // page_size) - 1).bit_length()) if single else (1, number)
            members[key].append((first, reading))
            first += len(reading.ends)
        groups = [make_group(group, page_size, dtype, device) for group in members.values()]
        back = torch.cat([group.rows for group in groups]).argsort() if len(groups) > 1 else None
        return PagedLayout(groups, back)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim] and pages of keys and values to [N, heads · head_dim]."""
        parts = [attend_group(q, k, v, group, alone=self.back is None) for group in self.groups]
        return parts[0] if self.back is None else torch.cat(parts).index_select(0, self.back)


def make_group(members: list[tuple[int, Reading]], page_size: int, dtype: torch.dtype, device: torch.device) -> Group:
    """The grid of readings of equally many rows, each with the number of its first row."""
    longest = max(max(reading.ends) for _, reading in members)
    num_pages = -(-longest // page_size)
    rows = [first + row for first, reading in members for row in range(len(reading.ends))]
    pages = [page for _, reading in members for page in (reading.pages[:num_pages] + [0] * num_pages)[:num_pages]]
    ends = to_device([reading.ends for _, reading in members], device)
    mask = beginnings(ends, num_pages * page_size, dtype)
    return Group(to_device(rows, device), to_device(pages, device), mask)


def beginnings(ends: Tensor, num_entries: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [G, 1, n, num_entries] of rows that see the first ends [G, n] entries."""
    hidden = torch.arange(num_entries, device=ends.device) >= ends.unsqueeze(-1)
    return torch.zeros(hidden.shape, dtype=dtype, device=ends.device).masked_fill_(hidden, float("-inf")).unsqueeze(1)


def attend_group(q: Tensor, k: Tensor, v: Tensor, group: Group, alone: bool) -> Tensor:
    """Rows of `group` (all of q if it is alone) to [G·n, heads · head_dim]."""
    size, _, length, num_entries = group.mask.shape
    if not alone:
        q = q.index_select(0, group.rows)
    # Query heads that share a head of keys are like queries at one place.
    kv_heads, head_dim = k.shape[-2:]
    q_GKHD = q.view(size, length, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k_GKTD, v_GKTD = (
        pages.index_select(0, group.pages).view(size, num_entries, kv_heads, head_dim).transpose(1, 2)
        for pages in (k, v)
    )
    mask = group.mask if length == 1 else group.mask.repeat(1, 1, q_GKHD.shape[2] // length, 1)
    out = F.scaled_dot_product_attention(q_GKHD, k_GKTD, v_GKTD, attn_mask=mask)
    return out.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).reshape(size * length, -1)


@dataclass(frozen=True)
class KernelLayout:
    """The same for the kernel that reads the pages where they are: row i sees ends[i] entries of tables[owners[i]].

    tables [M, pages], owners and ends [N], all int64.
    """

    tables: Tensor
    owners: Tensor
    ends: Tensor

    @staticmethod
    def of(readings: Sequence[Reading], page_size: int, device: torch.device) -> KernelLayout:
        """Tell the kernel about `readings`."""
        longest = -(-max(max(reading.ends) for reading in readings) // page_size)
        tables = [(reading.pages + [0] * longest)[:longest] for reading in readings]
        owners = [number for number, reading in enumerate(readings) for _ in reading.ends]
        ends = [end for reading in readings for end in reading.ends]
        return KernelLayout(*(to_device(numbers, device) for numbers in (tables, owners, ends)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `PagedLayout.attend`."""
        from megamor.serve.engine.paged_kernel import paged_attention  # needs Triton, which comes with torch for GPUs

        return paged_attention(q, k, v, self.tables, self.owners, self.ends).flatten(1)


def paged_layout(
    readings: Sequence[Reading], page_size: int, dtype: torch.dtype, device: torch.device
) -> PagedLayout | KernelLayout:
    """The layout for a launch."""
    if reads_in_place(device):
        return KernelLayout.of(readings, page_size, device)
    return PagedLayout.of(readings, page_size, dtype, device)


def single_rows_layout(tables: Tensor, ends: Tensor, page_size: int, dtype: torch.dtype) -> PagedLayout | KernelLayout:
    """Row i sees the first ends[i] entries of the pages in tables[i]: ends [N], tables [N, pages], both int64.

    What they hold needn't be known to the host.
    """
    count, num_pages = tables.shape
    rows = torch.arange(count, device=tables.device)
    if reads_in_place(tables.device):
        return KernelLayout(tables, rows, ends)
    mask = beginnings(ends.unsqueeze(1), num_pages * page_size, dtype)
    return PagedLayout([Group(rows, tables.flatten(), mask)], None)


def reads_in_place(device: torch.device) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cuda"
