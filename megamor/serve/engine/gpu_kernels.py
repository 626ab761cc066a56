"""The parts of a block that are neither products nor attention, as Triton kernels: norms, SwiGLU, and the rotation of
queries and keys, which also stores keys and values in their pages.

torch takes about fifteen small kernels a layer for them, which together run longer than the products of a few rows.
Arithmetic is in fp32 (fp64 for fp64) and rounded once. Launches depend on shapes alone, so that a CUDA graph can replay
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamor.model.blocks import RotaryAngles
from megamor.serve.engine.attention import KernelLayout, PagedKeysValues

# Hidden units of one program of SwiGLU.
HIDDEN = 512
# Values of a norm's row for each warp: 8 for a thread, which is one 16-byte load in 16 bits.
WARP_VALUES, MOST_WARPS = 256, 16


class GpuKernels:
    """Kernels for a `PackedBlock` on a GPU, in any type."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, dim] normalised, times weight [dim]."""
        (rows, dim), x = x.shape, x.contiguous()
        out, block = torch.empty_like(x), triton.next_power_of_2(dim)
        warps = min(MOST_WARPS, max(1, block // WARP_VALUES))
        with on_device_of(x):
            norm_row[rows,](x, weight, out, dim, eps, BLOCK=block, SUM=sum_type(x), num_warps=warps)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """gate_up [N, 2 · dim] to SiLU(gate) · up, [N, dim]."""
        rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
        gate_up, out = gate_up.contiguous(), gate_up.new_empty(rows, dim)
        with on_device_of(out):
            gate_row[rows, triton.cdiv(dim, HIDDEN)](gate_up, out, dim, BLOCK=HIDDEN, SUM=sum_type(out), num_warps=2)
        return out

    def attend(self, qkv: Tensor, angles: RotaryAngles, layout: KernelLayout, pages: PagedKeysValues) -> Tensor:
        """Rotate queries and keys in qkv [N, heads + 2 · kv_heads, head_dim], store, attend: [N, heads · head_dim]."""
        (rows, width, head_dim), kv_heads = qkv.shape, pages.v.shape[2]
        heads, qkv = width - 2 * kv_heads, qkv.contiguous()
        q = qkv.new_empty(rows, heads, head_dim)
        half, k, v = head_dim // 2, pages.k, pages.v
        # If only some rows write, their keys and values are chosen among those of all.
        chosen = pages.needs_fresh and pages.rows is not None
        if chosen:
            k, v = qkv.new_empty(2, rows, kv_heads, head_dim).unbind()
        with on_device_of(q):
            # Without anything to write, programs for queries alone.
            rotate_and_store[rows, width if pages.needs_fresh else heads](
                qkv, angles.cos, angles.signed_sin, q, k, v, pages.addresses, heads, kv_heads, half, not chosen,
                HALF=triton.next_power_of_2(half), SUM=sum_type(q), num_warps=1,
            )  # fmt: skip
        if chosen:
            pages.resolve((k, v))
        return layout.attend(q, pages.k, pages.v)


def on_device_of(x: Tensor) -> torch.cuda.device:
    """The context in which Triton launches on x's device; on a CPU, for the interpreter, it does nothing."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def sum_type(x: Tensor) -> tl.dtype:
    """The type of arithmetic on x."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit  # type: ignore[untyped-decorator]
def norm_row(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, dim: tl.constexpr, eps: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr,
) -> None:  # fmt: skip
    """One row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < dim
    found = tl.load(x + row * dim + column, mask=inside, other=0.0).to(SUM)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(SUM)
    mean = tl.sum(found * found, axis=0) / dim
    # `eps` becomes a number of SUM here; a Python float beside a scalar of fp64 would be one of fp32.
    root = tl.sqrt(mean + tl.full([], eps, SUM))
    tl.store(out + row * dim + column, (found * (1.0 / root) * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def gate_row(gate_up: tl.tensor, out: tl.tensor, dim: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr) -> None:
    """A block of hidden units of one row."""
    row, unit = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < dim
    line = gate_up + row * (2 * dim) + unit
    gate = tl.load(line, mask=inside, other=0.0).to(SUM)
    up = tl.load(line + dim, mask=inside, other=0.0).to(SUM)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * dim + unit, hidden.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def rotate_and_store(
    qkv: tl.tensor, cos: tl.tensor, signed_sin: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor,
    addresses: tl.tensor, heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr, placed: tl.constexpr,
    HALF: tl.constexpr, SUM: tl.constexpr,
) -> None:  # fmt: skip
    """One head of one row: a query, a key or a value, of twice `half` numbers.

    Keys and values go to the row's address if they are `placed`, and otherwise to the row itself.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, HALF)
    inside = lane < half
    source = qkv + (row * (heads + 2 * kv_heads) + head) * (2 * half) + lane
    first = tl.load(source, mask=inside, other=0.0).to(SUM)
    second = tl.load(source + half, mask=inside, other=0.0).to(SUM)
    if head < heads + kv_heads:
        angle = row * (2 * half) + lane
        new_first = first * tl.load(cos + angle, mask=inside, other=0.0).to(SUM)
        new_first += second * tl.load(signed_sin + angle, mask=inside, other=0.0).to(SUM)
        new_second = second * tl.load(cos + angle + half, mask=inside, other=0.0).to(SUM)
        new_second += first * tl.load(signed_sin + angle + half, mask=inside, other=0.0).to(SUM)
        first, second = new_first, new_second
    if head < heads:
        target = q + (row * heads + head) * (2 * half) + lane
    else:
        place = row
        if placed:
            place = tl.load(addresses + row).to(tl.int64)
        if head < heads + kv_heads:
            target = k + (place * kv_heads + head - heads) * (2 * half) + lane
        else:
            target = v + (place * kv_heads + head - heads - kv_heads) * (2 * half) + lane
    tl.store(target, first.to(q.dtype.element_ty), mask=inside)
    tl.store(target + half, second.to(q.dtype.element_ty), mask=inside)
