"""Paged attention: grids of gathered pages give what a loop over the rows gives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.serve.engine.paged_attention import PagedLayout, Reading

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
