"""Gradients of shared weights, added up over the recursions in fp32.

Left to itself, autograd adds the recursions' gradients in the type of the weights that they used: bf16 in mixed
precision, where sums of many terms lose bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class _FanOut(torch.autograd.Function):
    """A weight as `count` views of itself, whose gradients are added in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        there = [grad for grad in grads if grad is not None]
        if not there:
            return None, None
        total = there[0].to(torch.promote_types(there[0].dtype, torch.float32), copy=True)
        for grad in there[1:]:
            total += grad
        return total.to(there[0].dtype), None


def fan_out(blocks: nn.ModuleList, count: int) -> list[list[Callable[..., Any]]]:
    """[recursion][block]: the blocks, each recursion with views of its own of all their weights."""
    views = [{name: _FanOut.apply(weight, count) for name, weight in block.named_parameters()} for block in blocks]
    return [
        [
            partial(_call, block, {name: weights[recursion] for name, weights in own.items()})
            for block, own in zip(blocks, views, strict=True)
        ]
        for recursion in range(count)
    ]


def _call(block: nn.Module, weights: dict[str, Tensor], *args: Any) -> Any:
    return functional_call(block, weights, args)
