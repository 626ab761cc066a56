"""Scoring networks of the routers: hidden states to logits, always computed in fp32 (paper section 2.2.1, table 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.config.derive import HIDDEN_MULTIPLIER
from megamor.config.routers import RouterHead


def full_precision(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """The parameter `name` of `module` in `dtype`, and with the value of its fp32 original where a backend computes in
    bf16 copies. Backends keep originals in the module's attribute `originals`, a dictionary by name."""
    weight: Tensor = getattr(module, name)
    original: Tensor | None = getattr(module, "originals", {}).get(name)
    # The copy adds zero, and the path for the gradient.
    return weight.to(dtype) if original is None else original + (weight - weight.detach()).to(dtype)


class RouterLinear(nn.Linear):
    """Linear layer without bias that always computes in fp32 (fp64 for fp64 inputs)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] of any float type to fp32 (or fp64) [..., out]."""
        # Routing compares scores, and bf16 would flip near ties.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), full_precision(self, "weight", dtype))


class MLPHead(nn.Module):
    """Two projections with exact GELU between them."""

    def __init__(self, in_features: int, out_features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = RouterLinear(in_features, hidden)
        self.fc2 = RouterLinear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to fp32 [..., out]."""
        logits: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return logits


class HistoryAttention(nn.Module):
    """Single-head attention of a token's state to its own states so far, and a projection of the result."""

    def __init__(self, in_features: int, out_features: int, hidden: int) -> None:
        super().__init__()
        self.query = RouterLinear(in_features, hidden)
        self.key_value = RouterLinear(in_features, 2 * hidden)
        self.out = RouterLinear(hidden, out_features)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        """x [N, in] to [N, out]; `history` [N, n, 2 · hidden] is what `key_value` made of the states so far, or 0."""
        # Zeros are keys and values too, so that the first state, which has no others to choose from, is gated at least.
        keys, values = history.chunk(2, dim=-1)
        scores = (self.query(x).unsqueeze(1) * keys).sum(-1) / keys.shape[-1] ** 0.5
        logits: Tensor = self.out((scores.softmax(-1).unsqueeze(-1) * values).sum(1))
        return logits


def build_head(kind: RouterHead, in_features: int, out_features: int) -> nn.Module:
    """The head named by the config: linear, mlp (hidden 2d) or wide_mlp (hidden 4d)."""
    if kind == "linear":
        return RouterLinear(in_features, out_features)
    return MLPHead(in_features, out_features, HIDDEN_MULTIPLIER[kind] * in_features)
