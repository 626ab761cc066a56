"""Cross-entropy and its gradient with respect to the logits in one Triton kernel, which overwrites the logits.

A program handles one row. Its first pass over the row finds the log-sum-exp with a running maximum and sum in each lane
(online softmax, arXiv 1805.02867); the second replaces each logit by its gradient. Logits stay in their own type;
everything in registers is fp32. The second pass reads what the first has just read: an H100 runs one or two rows on
each of its 132 processors, 13 to 26 MB of a 49k vocabulary in bf16, and its L2 cache holds 50 MB. So each logit crosses
the memory bus five times: written by the projection, read and written here, read by the two products that follow; 10
bytes in 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# Logits of a program in registers: 8 for each thread, which is one 16-byte load in 16 bits.
BLOCK, WARPS = 8192, 32


def in_place_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, ignore: int, z_coeff: float, gradients: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Summed cross-entropy and z-loss of the logits hidden · weightᵀ, and gradients of both with respect to hidden and
    weight, `chunk` rows at a time.

    hidden [N, dim], weight [vocab, dim], labels [N] with `ignore` where nothing is predicted. The gradient of the
    weight is summed over chunks in fp32 and rounded once. If there is one chunk, its product is the gradient.
    """
    num_rows, several = hidden.shape[0], hidden.shape[0] > chunk
    total_type = torch.promote_types(hidden.dtype, torch.float32)
    nll, z_loss = hidden.new_zeros(2, num_rows, dtype=total_type).unbind()
    grad_hidden = torch.empty_like(hidden) if gradients else None
    grad_weight = torch.empty_like(weight, dtype=total_type if several else weight.dtype) if gradients else None
    if grad_weight is not None and num_rows == 0:
        grad_weight.zero_()  # no chunk writes it
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        logits = F.linear(hidden[rows], weight)
        cross_entropy_(logits, labels[rows], nll[rows], z_loss[rows], ignore, z_coeff, gradients)
        if grad_hidden is not None and grad_weight is not None:
            torch.mm(logits, weight, out=grad_hidden[rows])
            if several:
                add_product_(grad_weight, logits.t(), hidden[rows], start == 0)
            else:
                torch.mm(logits.t(), hidden, out=grad_weight)
        del logits  # or the next chunk's would exist beside them
    return nll.sum(), z_loss.sum(), grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


@torch.library.custom_op("megamor::cross_entropy_", mutates_args=("logits", "nll", "z_loss"))
def cross_entropy_(
    logits: Tensor, labels: Tensor, nll: Tensor, z_loss: Tensor, ignore: int, z_coeff: float, gradients: bool
) -> None:
    """Write the cross-entropy and z-loss of each row of contiguous logits [n, vocab]; replace logits by gradients.

    Rows whose label is `ignore` get zeros, whatever their logits are. A label outside the vocabulary gives NaN.
    """
    vocab = logits.shape[1]
    block = min(BLOCK, triton.next_power_of_2(vocab))
    with torch.cuda.device(logits.device if logits.is_cuda else -1):
        softmax_row[(logits.shape[0],)](
            logits, labels, nll, z_loss, ignore, vocab, z_coeff, gradients, block,
            SUM=tl.float64 if logits.dtype == torch.float64 else tl.float32, num_warps=min(WARPS, max(1, block // 256)),
        )  # fmt: skip


@torch.library.custom_op("megamor::add_product_", mutates_args=("total",), device_types="cuda")
def add_product_(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [m, n] += left [m, k] · right [k, n], added in `total`'s type by the product itself; = if `first`.

    An operator of its own because torch has no shape function for `addmm` with these arguments.
    """
    torch.addmm(total, left, right, total.dtype, beta=0 if first else 1, out=total)


cross_entropy_.register_fake(lambda *_: None)
add_product_.register_fake(lambda *_: None)


@triton.jit  # type: ignore[untyped-decorator]
def softmax_row(
    logits: tl.tensor, labels: tl.tensor, nll: tl.tensor, z_loss: tl.tensor,
    ignore: tl.constexpr, vocab: tl.constexpr, z_coeff: tl.constexpr, gradients: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr,
) -> None:  # fmt: skip
    """One row. `SUM` is the type of the arithmetic."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    line = logits + row * vocab
    label = tl.load(labels + row)
    if label == ignore:
        tl.store(nll + row, 0.0)
        tl.store(z_loss + row, 0.0)
        if gradients:
            for start in range(0, vocab, BLOCK):
                column = start + lane
                tl.store(line + column, tl.zeros([BLOCK], SUM).to(logits.dtype.element_ty), mask=column < vocab)
    else:
        # Read before the reductions below, which all threads wait for: afterwards another thread overwrites it.
        target = tl.load(line + label, mask=(label >= 0) & (label < vocab), other=float("nan")).to(SUM)
        highest = tl.full([BLOCK], float("-inf"), SUM)
        total = tl.zeros([BLOCK], SUM)
        for start in range(0, vocab, BLOCK):
            column = start + lane
            found = tl.load(
                line + column, mask=column < vocab, other=float("-inf"), eviction_policy="evict_last"
            ).to(SUM)  # fmt: skip
            # One exponential is enough: either the new term or the sum so far is relative to the maximum already. Equal
            # values are told apart because -inf, also that behind the row's end, has no difference to itself.
            ratio = tl.exp(tl.where(found == highest, 0.0, -tl.abs(found - highest)))
            total = tl.where(found > highest, total * ratio + 1.0, total + ratio)
            highest = tl.maximum(highest, found)
        top = tl.max(highest, axis=0)
        scale = tl.exp(tl.where(highest == top, 0.0, highest - top))
        log_z = top + tl.log(tl.sum(total * scale, axis=0))
        tl.store(nll + row, log_z - target)
        tl.store(z_loss + row, z_coeff * log_z * log_z)
        if gradients:
            factor = 1.0 + 2.0 * z_coeff * log_z  # d log_z² / d logits = 2 · log_z · softmax
            for start in range(0, vocab, BLOCK):
                column = start + lane
                found = tl.load(line + column, mask=column < vocab, other=0.0, eviction_policy="evict_first").to(SUM)
                gradient = tl.exp(found - log_z) * factor - tl.where(column == label, 1.0, 0.0)
                tl.store(line + column, gradient.to(logits.dtype.element_ty), mask=column < vocab)
