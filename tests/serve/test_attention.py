"""Paged attention: grids of gathered pages agree with a loop over the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.serve.engine.attention import GatherLayout, KVView

PAGE, HEADS, KV_HEADS, DIM = 4, 6, 2, 8
CPU = torch.device("cpu")
VIEWS = [
    KVView([3], [2], [0]),
    KVView([5, 1, 7], [9, 10, 11], [3, 6, 10]),
    KVView([2, 8], [5], [4]),
    KVView([0, 9, 4], [3, 7, 12], [0, 1, 5]),
    KVView([6], [4], [1]),
    KVView([11, 10, 12], [12], [8]),
]


def by_row(q: Tensor, k: Tensor, v: Tensor, slides: bool) -> Tensor:
    """Attention row by row and key head by key head."""
    outs, row = [], 0
    for view in VIEWS:
        for begin, end in zip(view.begins, view.ends, strict=True):
            seen = slice(begin if slides else 0, end)
            keys, values = (pages[view.pages].flatten(0, 1)[seen] for pages in (k, v))
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


@pytest.mark.parametrize("slides", [False, True])
def test_gathered_pages(slides: bool) -> None:
    q, k, v = tensors()
    layout = GatherLayout.of(VIEWS, PAGE, torch.float64, CPU, slides)
    assert len(layout.groups) == 5
    torch.testing.assert_close(layout.attend(q, k, v), by_row(q, k, v, slides), atol=1e-12, rtol=0)


def test_one_group_keeps_the_order() -> None:
    q, k, v = tensors()
    views = [KVView([3], [2]), KVView([6], [4])]
    both = GatherLayout.of(views, PAGE, torch.float64, CPU).attend(q[:2], k, v)
    alone = [GatherLayout.of([one], PAGE, torch.float64, CPU).attend(q[i : i + 1], k, v) for i, one in enumerate(views)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-12, rtol=0)
