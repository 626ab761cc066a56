"""Attention that reads keys and values in their pages, as one Triton kernel for pages of any size.

A program handles one row, one key head and one *split* of the entries that the row sees. Of a prompt's chunk, whose
rows see the same entries up to their own, it handles several rows. It goes through the page table a block of entries at
a time, with a running maximum and sum (online softmax, arXiv 1805.02867). It serves all query heads that share the key
head, so the keys are read once; in 16-bit types their products are those of matrices, on tensor cores. Where rows are
few, several splits keep the GPU busy, and a second kernel combines them (as in Flash-Decoding). Everything that differs
between batches of one width is in tensors, so a CUDA graph can replay it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamor.serve.engine.attention import CHUNK_ROWS

# Products of a query, an entry and a dimension that a program keeps in registers at a time, without tensor cores.
PROGRAM_VALUES = 4096
# With them, entries at a time. A matrix product needs 16 queries at least; missing ones are zeros.
MATRIX_ENTRIES, MATRIX_QUERIES = 64, 16
# Programs that keep a large GPU busy, and most splits of a row.
PROGRAMS, MOST_SPLITS = 512, 32


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    owners: Tensor,
    ends: Tensor,
    begins: Tensor | None = None,
    splits: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Row i of q [N, heads, head_dim] sees the first ends[i] entries of the pages in tables[owners[i]].

    With `begins` [N], it sees only those from begins[i] on, of which there must be one.
    k and v are contiguous [pages, page_size, kv_heads, head_dim]; tables [M, P], owners [N] and ends [N] are integers.
    `splits` is a power of two (None: as many as the shapes suggest). Rows starts[b] to starts[b + 1], at most
    CHUNK_ROWS, have one owner (None: each row is alone). The result has q's shape and type; sums are in fp32, or in
    fp64 for fp64.
    """
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k.shape[1:3]
    matrix = q.dtype in (torch.bfloat16, torch.float16)
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    together, blocks = (1, rows) if starts is None else (CHUNK_ROWS, len(starts) - 1)
    queries, dims = triton.next_power_of_2(together * heads // kv_heads), max(16, triton.next_power_of_2(head_dim))
    if matrix:
        queries = max(queries, MATRIX_QUERIES)
    entries = MATRIX_ENTRIES if matrix else max(16, PROGRAM_VALUES // (queries * dims))
    if splits is None:
        # From shapes alone: a graph is recorded with them, and replayed for texts of any length.
        useful = min(MOST_SPLITS, PROGRAMS // (blocks * kv_heads), tables.shape[1] * page_size // entries)
        splits = 1 << max(1, useful).bit_length() - 1
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Of each split: its result, and the logarithm of its sum of exponentials.
    parts = out if splits == 1 else torch.empty(rows, heads, splits, head_dim, dtype=total, device=q.device)
    sums = torch.empty(rows, heads, splits, dtype=total, device=q.device)
    interpreted = not isinstance(attend_rows, triton.runtime.JITFunction)
    with torch.cuda.device(q.device if q.is_cuda else -1):
        attend_rows[blocks, kv_heads, splits](
            q.contiguous(), k, v, parts, sums, tables, owners, ends, ends if begins is None else begins,
            ends if starts is None else starts,
            tables.stride(0), tables.stride(1), kv_heads, heads // kv_heads, head_dim, page_size, begins is not None,
            ROWS=together, QUERIES=queries, DIMS=dims, ENTRIES=entries, SPLITS=splits, MATRIX=matrix,
            # The interpreter can't multiply matrices of bf16.
            FACTOR=tl.float32 if interpreted else {torch.float16: tl.float16}.get(q.dtype, tl.bfloat16),
            SUM=tl.float64 if total == torch.float64 else tl.float32,
        )  # fmt: skip
        if splits > 1:
            combine_splits[rows * heads,](parts, sums, out, head_dim, DIMS=dims, SPLITS=splits)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def attend_rows(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, sums: tl.tensor, tables: tl.tensor, owners: tl.tensor,
    ends: tl.tensor, begins: tl.tensor, starts: tl.tensor, table_stride: tl.tensor, page_stride: tl.tensor,
    kv_heads: tl.constexpr, num_queries: tl.constexpr, head_dim: tl.constexpr, page_size: tl.constexpr,
    slides: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, DIMS: tl.constexpr, ENTRIES: tl.constexpr,
    SPLITS: tl.constexpr, MATRIX: tl.constexpr, FACTOR: tl.constexpr, SUM: tl.constexpr,
) -> None:  # fmt: skip
    """Up to ROWS rows of one owner, one key head and one split, for the `num_queries` query heads of each row.

    Upper case: block sizes, types and choices.
    """
    first, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    last = first + 1
    if ROWS > 1:
        last = tl.load(starts + first + 1).to(tl.int64)
        first = tl.load(starts + first).to(tl.int64)
    query, dim = tl.arange(0, QUERIES), tl.arange(0, DIMS)
    row = first + query // num_queries
    alive = row < last
    query_head = (row * kv_heads + head) * num_queries + query % num_queries
    offset = query_head[:, None] * head_dim + dim[None, :]
    exists = alive[:, None] & (dim[None, :] < head_dim)
    queries = tl.load(q + offset, mask=exists, other=0.0)
    queries = queries.to(FACTOR) if MATRIX else queries.to(SUM)
    # Computed here because Triton would round a Python float argument to fp32.
    root = tl.sqrt(tl.full([QUERIES, ENTRIES], head_dim, SUM))

    table = tables + tl.load(owners + first) * table_stride
    # What each query sees, and all of them together.
    ends_here = tl.load(ends + row, mask=alive, other=0)
    end = tl.max(ends_here, axis=0)
    begins_here = ends_here * 0
    begin = end * 0
    if slides:
        begins_here = tl.load(begins + row, mask=alive, other=0)
        begin = tl.min(tl.where(alive, begins_here, end), axis=0)
    # Whole blocks of entries: the last splits of a short text have none.
    length = tl.cdiv(tl.cdiv(end - begin, SPLITS), ENTRIES) * ENTRIES
    begin += split * length
    end = tl.minimum(end, begin + length)
    highest = tl.full([QUERIES], float("-inf"), SUM)
    total = tl.zeros([QUERIES], SUM)
    mean = tl.zeros([QUERIES, DIMS], SUM)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        seen = entry < end
        page = tl.load(table + (entry // page_size) * page_stride, mask=seen, other=0).to(tl.int64)
        address = ((page * page_size + entry % page_size) * kv_heads + head) * head_dim
        inside = seen[:, None] & (dim[None, :] < head_dim)
        keys = tl.load(k + address[:, None] + dim[None, :], mask=inside, other=0.0)
        values = tl.load(v + address[:, None] + dim[None, :], mask=inside, other=0.0)
        if MATRIX:
            scores = tl.dot(queries, tl.trans(keys.to(FACTOR)))
        else:
            scores = tl.sum(queries[:, None, :] * keys.to(SUM)[None, :, :], axis=2)
        visible = (entry[None, :] < ends_here[:, None]) & (entry[None, :] >= begins_here[:, None]) & seen[None, :]
        scores = tl.where(visible, scores / root, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A query that has seen nothing yet has no maximum.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        # What was summed so far is relative to the old maximum.
        kept = tl.exp(highest - shift)
        weights = tl.exp(scores - shift[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        if MATRIX:
            mean = mean * kept[:, None] + tl.dot(weights.to(FACTOR), values.to(FACTOR))
        else:
            mean = mean * kept[:, None] + tl.sum(weights[:, :, None] * values.to(SUM)[None, :, :], axis=1)
        highest = new_highest
    # A split without entries has the mean 0 and, as its maximum is -inf, no weight.
    safe = tl.where(total > 0, total, 1.0)
    mean = mean / safe[:, None]
    if SPLITS == 1:
        tl.store(out + offset, mean.to(out.dtype.element_ty), mask=exists)
    else:
        place = query_head * SPLITS + split
        tl.store(out + place[:, None] * head_dim + dim[None, :], mean.to(out.dtype.element_ty), mask=exists)
        tl.store(sums + place, highest + tl.log(safe), mask=alive)


@triton.jit  # type: ignore[untyped-decorator]
def combine_splits(
    parts: tl.tensor, sums: tl.tensor, out: tl.tensor, head_dim: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr
) -> None:
    """One query head of one row: the mean of its splits, weighted by their sums of exponentials."""
    row, split, dim = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, DIMS)
    logs = tl.load(sums + row * SPLITS + split)
    weights = tl.exp(logs - tl.max(logs, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    places = (row * SPLITS + split[:, None]) * head_dim + dim[None, :]
    found = tl.load(parts + places, mask=dim[None, :] < head_dim, other=0.0)
    mean = tl.sum(found * weights[:, None], axis=0)
    tl.store(out + row * head_dim + dim, mean.to(out.dtype.element_ty), mask=dim < head_dim)
