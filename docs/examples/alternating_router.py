"""A custom router: every `stride`-th position takes all recursions, the others only the first, with learned gates.

docs/routers.md explains the interface and how to test a router.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamor.routing import InferenceRule, Mix, Router, RoutingContext, RoutingPlan, RoutingSession, TokenSet
from megamor.routing.heads import build_head


class Alternating(Router):
    """Parameters and rules; state that depends on the batch is in the session."""

    causal_in_training = True
    inference_rule = InferenceRule("every_nth_position")

    def __init__(self, options: dict[str, float], dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.stride = int(options.get("stride", 2))
        self.head = build_head("linear", dim, 1)

    def begin(self, rows: Tensor, context: RoutingContext) -> AlternatingSession:
        return AlternatingSession(self, context)


class AlternatingSession(RoutingSession):
    """The router during one forward pass."""

    def __init__(self, router: Alternating, context: RoutingContext) -> None:
        super().__init__(context)
        self.router = router

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """All candidates in recursion 0, later those at every `stride`-th position; they become x + gate · f(x)."""
        tokens, indices = candidates, None
        if recursion > 0:
            position = candidates.gather(self.context.positions_of(rows.device))
            chosen = position % self.router.stride == 0
            tokens, indices = candidates.where(self.bounded(recursion, chosen, candidates))
            rows = rows.index_select(0, indices)
        gate = torch.sigmoid(self.router.head(rows).squeeze(-1))
        return RoutingPlan(tokens, indices, Mix(from_stream=1.0, from_core=gate))
