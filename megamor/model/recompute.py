"""Activation checkpointing: what is kept for the backward pass, and what is recomputed there (arXiv 1604.06174).

`recursion` keeps the input of each recursion (and of each block outside the core), `block` the input of each block.
`selective` keeps in addition the results of chosen operations in each block, so that only the cheap rest is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

OPERATORS: dict[str, tuple[str, ...]] = {
    "sdpa": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    ),
    "mm": ("aten::mm",),
    "silu": ("aten::silu", "aten::gelu"),
}
"""torch's operators by the names of `train.selective_ops`: attention kernels, projections, the gate's activation."""

# Nothing in a block draws random numbers, so generator states need not be saved and restored.
_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Recomputation:
    """A policy of `train.activation_checkpointing`, with the operators whose results `selective` keeps."""

    policy: str = "none"
    keep: frozenset[str] = frozenset()

    @staticmethod
    def of(policy: str, selective_ops: Sequence[str] = ()) -> Recomputation:
        """The policy named `policy`; `selective_ops` are keys of `OPERATORS`."""
        return Recomputation(policy, frozenset(name for op in selective_ops for name in OPERATORS[op]))

    def recursion(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A recursion's `run` (tensors in, tensors out), recomputed if the policy says so."""
        return partial(_recompute, run) if self.policy == "recursion" else run

    def block(self, run: Callable[..., Any], in_core: bool) -> Callable[..., Any]:
        """A block's call, recomputed under `block` and, outside the core, under `recursion`."""
        whole = self.policy == "block" or (self.policy == "recursion" and not in_core)
        return partial(_recompute, run) if whole else run

    def inside_block(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward pass under `selective`; compiled with the block, so that the compiler can plan for it."""
        return partial(self._selective, run) if self.policy == "selective" else run

    def _selective(self, run: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        contexts = partial(create_selective_checkpoint_contexts, partial(_decide, self.keep))
        if torch.compiler.is_compiling():
            return _recompute(run, x, *args, context_fn=contexts)
        # Autocast caches its cast of a weight. The first run may hit a cache that an earlier recursion filled, and the
        # second run would then perform one cast more: the operators would no longer match those that were kept.
        device = x.device.type
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype, enabled=autocast, cache_enabled=False):
            return _recompute(run, x, *args, context_fn=contexts)


def _decide(keep: frozenset[str], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = isinstance(operator, torch._ops.OpOverload) and operator._schema.name in keep
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
