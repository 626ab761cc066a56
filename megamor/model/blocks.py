"""The Llama block on flat rows: RMSNorm, grouped-query attention with RoPE, SwiGLU (paper section 3 and appendix B).

Settings make it that of Qwen3 (normalised queries and keys) or Gemma 3 (also norms behind each branch, and GeGLU).

The caller tells a block which keys and values to attend to (`KeysValues`) and who sees whom (`AttentionLayout`). The
same block code therefore serves every KV policy, activation checkpointing, cached decoding and serving.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.config import ModelConfig
from megamor.model.attention import AttentionLayout
from megamor.model.elementwise import rms_norm, rotate
from megamor.model.recompute import Recomputation

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RotaryAngles:
    """cos and sin (its first half negated) of the rows' positions, fp32 [N, 1, head_dim]."""

    # Not two bare tensors: FSDP2's mixed precision casts every tensor argument of a module to bf16, which is too coarse
    # for the angles of a long context. It does not look into dataclasses.
    cos: Tensor
    signed_sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Apply RoPE (half-split layout, arXiv 2104.09864) to x [N, heads, head_dim]."""
        return rotate(x, self.cos, self.signed_sin)

    def select(self, rows: Tensor | None) -> RotaryAngles:
        """The angles of the given rows [n]; None means all."""
        return self if rows is None else RotaryAngles(self.cos[rows], self.signed_sin[rows])


def rotary_angles(positions: Tensor, config: ModelConfig, dtype: torch.dtype, slides: bool = False) -> RotaryAngles:
    """Angles of `positions` [N], in fp64 for fp64 models and fp32 otherwise; `slides`: in blocks with a window."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if slides and config.sliding_rope_theta is not None:
        theta, scaling = config.sliding_rope_theta, None
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype) / config.head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        # Llama 3: `kept` is 1 for frequencies that turn often in the context of old, 0 for those that hardly do.
        turns = frequencies * (scaling.original_max_seq_len / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = torch.outer(positions.to(dtype), frequencies).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return RotaryAngles(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


class KeysValues:
    """Which keys and values one application of a block attends to; by default those of the rows themselves."""

    needs_fresh = True

    def merge(self, fresh: KeyValue | None) -> KeyValue | None:
        """What the call's keys and values become with the freshly projected ones (None unless `needs_fresh`)."""
        return fresh

    def resolve(self, merged: KeyValue | None) -> KeyValue:
        """The keys and values to attend to, given those that `merge` returned."""
        assert merged is not None
        return merged


@dataclass(frozen=True)
class StoredKeysValues(KeysValues):
    """Those of an earlier application; the rows' own keys and values are not projected at all."""

    needs_fresh = False
    stored: KeyValue

    def resolve(self, merged: KeyValue | None) -> KeyValue:
        return self.stored


@dataclass(frozen=True)
class RefreshedKeysValues(KeysValues):
    """Those of an earlier application, with the current rows replaced by fresh ones.

    `rows` [N] are the current rows' indices among the stored ones (None: the same rows). The stored tensors stay as
    they are.
    """

    stored: KeyValue
    rows: Tensor | None

    def merge(self, fresh: KeyValue | None) -> KeyValue | None:
        if self.rows is None or fresh is None:
            return fresh
        return self.stored[0].index_copy(0, self.rows, fresh[0]), self.stored[1].index_copy(0, self.rows, fresh[1])


@dataclass(frozen=True)
class Differences:
    """What distinguishes a shared block and its recursions; by default nothing (unshared blocks)."""

    num_recursions: int = 1
    separate_norms: bool = False
    lora_rank: int = 0
    residual_scaling: str = "none"

    @property
    def num_norms(self) -> int:
        """Weights of each norm."""
        return self.num_recursions if self.separate_norms else 1

    @property
    def branch_scale(self) -> float:
        """Factor on what attention and feed-forward add to the stream."""
        # The updates of a block that runs N times are correlated, so unlike those of N different blocks they add up to
        # N times one of them, not to sqrt(N) times (arXiv 2606.18524).
        exponent = {"none": 0.0, "inverse_sqrt": -0.5, "inverse": -1.0}[self.residual_scaling]
        return math.pow(self.num_recursions, exponent)


class RMSNorm(nn.Module):
    """Root-mean-square norm, statistics in fp32 (arXiv 1910.07467). `others` are the weights of later recursions."""

    def __init__(self, dim: int, eps: float, num_weights: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.others = nn.ParameterList(torch.ones(dim) for _ in range(num_weights - 1))
        self.eps = eps

    def forward(self, x: Tensor, recursion: int = 0) -> Tensor:
        """x [..., dim] to the same shape and type."""
        return rms_norm(x, self.weight_of(recursion), self.eps)

    def weight_of(self, recursion: int) -> Tensor:
        """The weight [dim] of `recursion`."""
        return self.others[recursion - 1] if recursion and len(self.others) else self.weight


class ZeroLinear(nn.Linear):
    """A projection initialised to zero, so that a low-rank update starts as no update."""


class SharedLinear(nn.Linear):
    """A projection without bias, optionally with a low-rank update for each recursion (arXiv 2410.20672)."""

    def __init__(self, in_features: int, out_features: int, differences: Differences) -> None:
        super().__init__(in_features, out_features, bias=False)
        rank, count = differences.lora_rank, differences.num_recursions if differences.lora_rank else 0
        self.down = nn.ModuleList(nn.Linear(in_features, rank, bias=False) for _ in range(count))
        self.up = nn.ModuleList(ZeroLinear(rank, out_features, bias=False) for _ in range(count))

    def forward(self, x: Tensor, recursion: int = 0) -> Tensor:
        """x [N, in] to [N, out]."""
        y = super().forward(x)
        return y + self.up[recursion](self.down[recursion](x)) if len(self.up) else y


class Attention(nn.Module):
    """Projections of grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, differences: Differences) -> None:
        super().__init__()
        q_dim, kv_dim = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
        self.head_dim = config.head_dim
        self.q_proj = SharedLinear(config.dim, q_dim, differences)
        self.k_proj = SharedLinear(config.dim, kv_dim, differences)
        self.v_proj = SharedLinear(config.dim, kv_dim, differences)
        self.o_proj = SharedLinear(q_dim, config.dim, differences)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.norm_eps, differences.num_norms) if config.qk_norm else None for _ in "qk"
        )

    def forward(
        self, x: Tensor, angles: RotaryAngles, layout: AttentionLayout, keys_values: KeysValues, recursion: int
    ) -> tuple[Tensor, KeyValue | None]:
        """x [N, dim] to [N, dim], and keys and values as merged with fresh ones (None if none were projected)."""
        # Keys are stored rotated: their positions are those of the tokens, whatever later attends to them.
        q = angles.rotate(self.heads(self.q_proj(x, recursion), self.q_norm, recursion))
        fresh = None
        if keys_values.needs_fresh:
            k = angles.rotate(self.heads(self.k_proj(x, recursion), self.k_norm, recursion))
            fresh = k, self.heads(self.v_proj(x, recursion))
        merged = keys_values.merge(fresh)
        k, v = keys_values.resolve(merged)
        return self.o_proj(layout.attend(q, k, v), recursion), merged

    def heads(self, x: Tensor, norm: RMSNorm | None = None, recursion: int = 0) -> Tensor:
        """[N, heads · head_dim] to [N, heads, head_dim], each head normalised by `norm`."""
        x = torch.unflatten(x, -1, (-1, self.head_dim))
        return x if norm is None else norm(x, recursion).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU or GeGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, differences: Differences) -> None:
        super().__init__()
        gelu = partial(F.gelu, approximate="tanh")
        self.activation: Callable[[Tensor], Tensor] = F.silu if config.ffn_activation == "silu" else gelu
        self.gate_proj = SharedLinear(config.dim, config.ffn_dim, differences)
        self.up_proj = SharedLinear(config.dim, config.ffn_dim, differences)
        self.down_proj = SharedLinear(config.ffn_dim, config.dim, differences)

    def forward(self, x: Tensor, recursion: int) -> Tensor:
        """x [N, dim] to [N, dim]."""
        hidden = self.activation(self.gate_proj(x, recursion)) * self.up_proj(x, recursion)
        return self.down_proj(hidden, recursion)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual, and with a norm of what it adds if configured."""

    def __init__(self, config: ModelConfig, differences: Differences | None = None) -> None:
        super().__init__()
        differences = differences or Differences()
        self.branch_scale = differences.branch_scale
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, differences.num_norms)
        self.attention = Attention(config, differences)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, differences.num_norms)
        self.ffn = FeedForward(config, differences)
        self.attention_out_norm, self.ffn_out_norm = (
            RMSNorm(config.dim, config.norm_eps, differences.num_norms) if config.sandwich_norms else None
            for _ in range(2)
        )
        self.recomputation = Recomputation()

    def forward(
        self, x: Tensor, angles: RotaryAngles, layout: AttentionLayout, keys_values: KeysValues, recursion: int = 0
    ) -> tuple[Tensor, KeyValue | None]:
        """x [N, dim] to [N, dim], and keys and values as merged with fresh ones (None if none were projected)."""
        run = self.recomputation.inside_block(self.compute)
        return run(x, angles, layout, keys_values, recursion)  # type: ignore[no-any-return]

    def compute(
        self, x: Tensor, angles: RotaryAngles, layout: AttentionLayout, keys_values: KeysValues, recursion: int
    ) -> tuple[Tensor, KeyValue | None]:
        """The forward pass that `recomputation` may run a second time."""
        normed = self.attention_norm(x, recursion)
        attended, merged = self.attention(normed, angles, layout, keys_values, recursion)
        if self.attention_out_norm is not None:
            attended = self.attention_out_norm(attended, recursion)
        x = torch.add(x, attended, alpha=self.branch_scale)
        hidden = self.ffn(self.ffn_norm(x, recursion), recursion)
        if self.ffn_out_norm is not None:
            hidden = self.ffn_out_norm(hidden, recursion)
        return torch.add(x, hidden, alpha=self.branch_scale), merged
