"""Paged attention: grids of gathered pages and the kernel's arguments give what a loop over the rows gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.serve import paged_attention
from megamor.serve.paged_attention import KernelLayout, PagedLayout, Reading

PAGE, HEADS, KV_HEADS, DIM = 4, 6, 2, 8
CPU = torch.device("cpu")
READINGS = [
    Reading([3], [2]),
    Reading([5, 1, 7], [9, 10, 11]),
    Reading([2, 8], [5]),
    Reading([0, 9, 4], [3, 7, 12]),
    Reading([6], [4]),
    Reading([11, 10, 12], [12]),
]


def by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Row by row, head by head of the keys."""
    outs, row = [], 0
    for reading in READINGS:
        for end in reading.ends:
            keys, values = (pages[reading.pages].flatten(0, 1)[:end] for pages in (k, v))
            heads = [
                F.scaled_dot_product_attention(q[row, head : head + 1], keys[:, head // 3], values[:, head // 3])
                for head in range(HEADS)
            ]
            outs.append(torch.cat(heads).flatten())
            row += 1
    return torch.stack(outs)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((10, HEADS, DIM), (13, PAGE, KV_HEADS, DIM), (13, PAGE, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def kernel_by_the_book(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, other: None, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """What torch documents of `varlen_attn` with a block table, as a loop."""
    assert options["window_size"] == (-1, 0)
    assert options["enable_gqa"]
    outs = []
    for piece, (table, used) in enumerate(zip(options["block_table"], options["seqused_k"].tolist(), strict=True)):
        first, end = bounds[piece : piece + 2].tolist()
        assert end - first <= max_q
        assert used <= max_k
        keys, values = (pages[table.long()].flatten(0, 1)[:used].transpose(0, 1) for pages in (k, v))
        mask = torch.arange(used) <= torch.arange(used - (end - first), used).unsqueeze(1)
        query = q[first:end].transpose(0, 1).unsqueeze(0)
        out = F.scaled_dot_product_attention(query, keys.unsqueeze(0), values.unsqueeze(0), mask, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def test_gathered_pages() -> None:
    q, k, v = tensors()
    layout = PagedLayout.of(READINGS, PAGE, torch.float64, CPU)
    assert len(layout.groups) == 5
    torch.testing.assert_close(layout.attend(q, k, v), by_row(q, k, v), atol=1e-12, rtol=0)


def test_one_group_keeps_the_order() -> None:
    q, k, v = tensors()
    readings = [Reading([3], [2]), Reading([6], [4])]
    both = PagedLayout.of(readings, PAGE, torch.float64, CPU).attend(q[:2], k, v)
    alone = [
        PagedLayout.of([one], PAGE, torch.float64, CPU).attend(q[i : i + 1], k, v) for i, one in enumerate(readings)
    ]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-12, rtol=0)


def test_what_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    monkeypatch.setattr(paged_attention, "varlen_attn", kernel_by_the_book)
    layout = KernelLayout.of(READINGS, PAGE, CPU)
    assert len(layout.used) == 8
    torch.testing.assert_close(layout.attend(q, k, v), by_row(q, k, v), atol=1e-12, rtol=0)
