"""Attention that reads keys and values in their pages, as one Triton kernel for pages of any size.

A program handles one row and one key head. It goes through the row's page table a block of entries at a time, with a
running maximum and sum (online softmax, arXiv 1805.02867). It serves all query heads that share the key head, so the
keys are read once. Everything that differs between batches of one width is in tensors, so a CUDA graph can replay it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Products of a query, an entry and a dimension that a program keeps in registers at a time.
PROGRAM_VALUES = 4096


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, owners: Tensor, ends: Tensor, begins: Tensor | None = None
) -> Tensor:
    """Row i of q [N, heads, head_dim] sees the first ends[i] entries of the pages in tables[owners[i]].

    With `begins` [N], it sees only those from begins[i] on, of which there must be one.
    k and v are contiguous [pages, page_size, kv_heads, head_dim]; tables [M, P], owners [N] and ends [N] are int64. The
    result has q's shape and type; sums are in fp32, or in fp64 for fp64.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group, dims = triton.next_power_of_2(heads // kv_heads), triton.next_power_of_2(head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with torch.cuda.device(q.device if q.is_cuda else -1):
        attend_row[rows, kv_heads](
            q.contiguous(), k, v, out, tables, owners, ends, ends if begins is None else begins,
            tables.stride(0), tables.stride(1), kv_heads, heads // kv_heads, head_dim, k.shape[1], begins is not None,
            GROUP=group, DIMS=dims, ENTRIES=max(16, PROGRAM_VALUES // (group * dims)),
            SUM=tl.float64 if q.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def attend_row(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, tables: tl.tensor, owners: tl.tensor, ends: tl.tensor,
    begins: tl.tensor, table_stride: tl.tensor, page_stride: tl.tensor,
    kv_heads: tl.constexpr, num_queries: tl.constexpr, head_dim: tl.constexpr, page_size: tl.constexpr,
    slides: tl.constexpr, GROUP: tl.constexpr, DIMS: tl.constexpr, ENTRIES: tl.constexpr, SUM: tl.constexpr,
) -> None:  # fmt: skip
    """One row, one key head and its `num_queries` query heads. Upper case: block sizes, powers of two."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query, dim = tl.arange(0, GROUP), tl.arange(0, DIMS)
    offset = ((row * kv_heads + head) * num_queries + query[:, None]) * head_dim + dim[None, :]
    exists = (query[:, None] < num_queries) & (dim[None, :] < head_dim)
    # The scale is computed here because Triton would round a Python float argument to fp32.
    queries = tl.load(q + offset, mask=exists, other=0.0).to(SUM) / tl.sqrt(tl.full([GROUP, DIMS], head_dim, SUM))

    table = tables + tl.load(owners + row) * table_stride
    end = tl.load(ends + row)
    begin = tl.load(begins + row) if slides else 0
    highest = tl.full([GROUP], float("-inf"), SUM)
    total = tl.zeros([GROUP], SUM)
    mean = tl.zeros([GROUP, DIMS], SUM)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        seen = entry < end
        page = tl.load(table + (entry // page_size) * page_stride, mask=seen, other=0)
        first = ((page * page_size + entry % page_size) * kv_heads + head) * head_dim
        inside = seen[:, None] & (dim[None, :] < head_dim)
        keys = tl.load(k + first[:, None] + dim[None, :], mask=inside, other=0.0).to(SUM)
        values = tl.load(v + first[:, None] + dim[None, :], mask=inside, other=0.0).to(SUM)
        scores = tl.sum(queries[:, None, :] * keys[None, :, :], axis=2)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # What was summed so far is relative to the old maximum.
        kept = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        mean = mean * kept[:, None] + tl.sum(weights[:, :, None] * values[None, :, :], axis=1)
        highest = new_highest
    tl.store(out + offset, (mean / total[:, None]).to(out.dtype.element_ty), mask=exists)
