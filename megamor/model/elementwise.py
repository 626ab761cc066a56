"""RMSNorm and RoPE with hand-written gradients for the CPU, where torch runs them as many passes over memory.

Measured there in fp32 (2,048 rows of width 192, forward and backward): norm 2.07 to 1.05 ms, rotation 1.41 to 1.11 ms.
On GPUs, and under torch.compile, the plain formulas are as fast or faster and are used instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension of x [N, dim]; statistics in at least fp32."""
    if _by_hand(x, weight):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """RoPE in half-split layout: x [N, heads, head_dim], cos and signed_sin [N, 1, head_dim] (first half negative)."""
    if _by_hand(x, cos):
        if torch.is_inference_mode_enabled():  # bookkeeping for the gradient takes as long as rotating a few rows
            return (x * cos).addcmul_(swap_halves(x), signed_sin)
        return _Rotation.apply(x, cos, signed_sin)  # type: ignore[no-any-return, no-untyped-call]
    return (x * cos + swap_halves(x) * signed_sin).to(x.dtype)


def swap_halves(x: Tensor) -> Tensor:
    """Second half of the last dimension, then the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def _by_hand(x: Tensor, other: Tensor) -> bool:
    """Whether the hand-written version applies: mixed types (autocast) and compiled code take torch's formulas."""
    same = x.dtype == other.dtype and x.dtype in (torch.float32, torch.float64)
    return same and x.device.type == "cpu" and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        # With n = x·scale the gradient is scale · (g·w − n · mean(g·w·n)). Buffers are reused: this is bound by memory.
        normed = x * scale
        product = grads[0] * normed
        grad_weight = product.flatten(0, -2).sum(0)
        projection = (product @ weight).div_(-x.shape[-1]).unsqueeze(-1)
        grad_x = torch.mul(grads[0], weight, out=product)
        return grad_x.addcmul_(normed, projection).mul_(scale), grad_weight, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return (x * cos).addcmul_(swap_halves(x), signed_sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, signed_sin = ctx.saved_tensors
        # The inverse rotation: swapping halves turns the sign of the sines around, hence the minus.
        return (grads[0] * cos).addcmul_(swap_halves(grads[0]), signed_sin, value=-1), None, None
