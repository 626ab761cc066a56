"""Paged attention: grids of gathered pages agree with a loop over the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.serve.engine.attention import GatherLayout, fixed_layout

PAGE, HEADS, KV_HEADS, DIM = 4, 6, 2, 8
CPU = torch.device("cpu")
TABLES = np.array([[3, 0, 0], [5, 1, 7], [2, 8, 0], [0, 9, 4], [6, 0, 0], [11, 10, 12]], np.int32)
OWNERS, ENDS, BEGINS = np.array(
    [[0, 1, 1, 1, 2, 3, 3, 3, 4, 5], [2, 9, 10, 11, 5, 3, 7, 12, 4, 12], [0, 3, 6, 10, 4, 0, 1, 5, 1, 8]]
)


def by_row(q: Tensor, k: Tensor, v: Tensor, slides: bool) -> Tensor:
    """Attention row by row and key head by key head."""
    outs = []
    for row, (owner, end, begin) in enumerate(zip(OWNERS, ENDS, BEGINS, strict=True)):
        keys, values = (pages[TABLES[owner]].flatten(0, 1)[begin if slides else 0 : end] for pages in (k, v))
        heads = [
            F.scaled_dot_product_attention(q[row, head : head + 1], keys[:, head // 3], values[:, head // 3])
            for head in range(HEADS)
        ]
        outs.append(torch.cat(heads).flatten())
    return torch.stack(outs)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((10, HEADS, DIM), (13, PAGE, KV_HEADS, DIM), (13, PAGE, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("slides", [False, True])
def test_gathered_pages(slides: bool) -> None:
    q, k, v = tensors()
    columns = (OWNERS, ENDS, BEGINS) if slides else (OWNERS, ENDS)
    layout = GatherLayout.of(TABLES, *columns, size=PAGE, dtype=torch.float64, device=CPU)
    assert [(*group.mask.shape,) for group in layout.groups] == [(4, 1, 1, 12), (1, 1, 3, 12), (1, 1, 3, 12)]
    wanted = by_row(q, k, v, slides)
    torch.testing.assert_close(layout.attend(q, k, v), wanted, atol=1e-12, rtol=0)
    tensors_of = (torch.from_numpy(numbers) for numbers in (TABLES, *columns))
    fixed = fixed_layout(*tensors_of, size=PAGE, dtype=torch.float64)
    torch.testing.assert_close(fixed.attend(q, k, v), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("slides", [False, True])
def test_nan_that_no_row_sees(slides: bool) -> None:
    """In the rest of a page, in pages beyond it, and in pages of others that a table still names."""
    q, k, v = tensors()
    wanted = by_row(q, k, v, slides)
    seen = torch.zeros(13, PAGE, dtype=torch.bool)
    for owner, end in zip(OWNERS, ENDS, strict=True):
        entries = np.arange(end)
        seen[TABLES[owner][entries // PAGE], entries % PAGE] = True
    k[~seen], v[~seen] = torch.nan, torch.nan
    stale = TABLES.copy()
    stale[:, 1:][TABLES[:, 1:] == 0] = 3
    columns = (OWNERS, ENDS, BEGINS) if slides else (OWNERS, ENDS)
    for rows in (slice(None), [0, 8], [0], [4, 5]):
        chosen = [column[rows] for column in columns]
        layout = GatherLayout.of(stale, *chosen, size=PAGE, dtype=torch.float64, device=CPU)
        torch.testing.assert_close(layout.attend(q[rows], k, v), wanted[rows], atol=1e-12, rtol=0)
        # Here each row is alone and sees less than the last of its text.
        fixed = fixed_layout(*map(torch.from_numpy, (stale, *chosen)), size=PAGE, dtype=torch.float64)
        torch.testing.assert_close(fixed.attend(q[rows], k, v), wanted[rows], atol=1e-12, rtol=0)
    k[3], v[3] = torch.nan, torch.nan  # the page of the first text, which padding of others names
    found = GatherLayout.of(stale, *columns, size=PAGE, dtype=torch.float64, device=CPU).attend(q, k, v)
    assert found.isnan().all(1).tolist() == [True] + 9 * [False]


def test_one_group_keeps_the_order() -> None:
    q, k, v = tensors()
    rows = [0, 8]  # of one page each

    def attended(some: list[int]) -> Tensor:
        layout = GatherLayout.of(TABLES, OWNERS[some], ENDS[some], size=PAGE, dtype=torch.float64, device=CPU)
        assert len(layout.groups) == 1
        return layout.attend(q[some], k, v)

    torch.testing.assert_close(attended(rows), torch.cat([attended([row]) for row in rows]), atol=1e-12, rtol=0)
