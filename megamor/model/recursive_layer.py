"""A layer of one's own, applied as often as a router decides: a recursion stage without a transformer around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from megamor.config import ModelConfig, RouterConfig
from megamor.model.attention import Grid
from megamor.model.kv_policy import KVPolicy
from megamor.model.layouts import Geometry
from megamor.model.recompute import Recomputation
from megamor.model.recursion import Blocks, Combination, RecursionStage, StageOutput
from megamor.routing import Mode, RoutingContext, TokenSet, build_router


class RecursiveLayer(RecursionStage):
    """`layer` [B, n, dim] → [B, n, dim] applied up to `num_recursions` times to the tokens that the router selects.

    Each recursion calls `layer(rows, padding)` with the selected tokens of each sequence, in order and padded at the
    end; `padding` [B, n] is true at padding. A layer that mixes tokens must be causal for the whole to be.
    """

    def __init__(
        self, layer: Callable[[Tensor, Tensor], Tensor], dim: int, num_recursions: int, router: RouterConfig
    ) -> None:
        nn.Module.__init__(self)
        self.layer, self.dim = layer, dim
        self.name, self.kv_policy, self.schedule = "", "recursion_wise", ((0,),) * num_recursions
        self.router = build_router(router, dim, num_recursions)
        if self.router.control is not None:
            self.router.control.costs = [(1.0, 0.0)] * num_recursions  # the layer's own are unknown
        self.blocks, self.recursion_embedding, self.injection, self.exit = nn.ModuleList(), None, None, None
        self.adds_in_fp32, self.recomputation, self.backprop_recursions = False, Recomputation(), num_recursions
        self.combination = Combination()
        for module in self.router.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for buffer in self.router.buffers():
            buffer.zero_()
        self.router.reset()

    def forward(self, x: Tensor, mode: Mode = "train", step: int = 0) -> StageOutput:  # type: ignore[override]
        """x [B, S, dim]; `StageOutput.stream` is [B, S, dim] and `depth` [B, S]. Add `losses` to your own."""
        assert mode in get_args(Mode), f"mode = {mode!r}: give train, topk or causal"
        batch, seq_len, dim = x.shape
        shape = ModelConfig(dim=dim, num_heads=1, num_kv_heads=1)
        geometry = Geometry.of(torch.zeros(batch, seq_len, dtype=torch.int64, device=x.device), shape, x.dtype)
        context = RoutingContext(batch, seq_len, mode, step, geometry.positions)
        out = super().forward(x.flatten(0, 1), geometry, context)
        assert out.depth is not None
        return out._replace(stream=out.stream.view(batch, seq_len, dim), depth=out.depth.view(batch, seq_len))

    def run_recursion(
        self, recursion: int, x: Tensor, tokens: TokenSet, geometry: Geometry, policy: KVPolicy, blocks: Blocks
    ) -> tuple[Tensor, TokenSet]:
        """The layer on the selected rows x [N, dim]."""
        if len(tokens) == 0:
            return x, tokens
        grid = Grid.of(tokens)
        padding = grid.pad(torch.zeros(len(tokens), dtype=torch.bool, device=x.device), True)
        y: Any = self.layer(grid.pad(x), padding)
        return grid.unpad(y), tokens
