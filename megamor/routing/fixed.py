"""Fixed depth: the recursive baseline (paper section 2.1) and, with a smaller depth, a control for comparisons."""

from __future__ import annotations

from torch import Tensor

from megamor.config import FixedDepthConfig
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Router, RoutingContext, RoutingSession


class FixedDepthSession(RoutingSession):
    """Every token takes every recursion; the core's output replaces the stream."""

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        return RoutingPlan(*self.take_all(recursion, candidates), Mix(from_core=1.0))


class FixedDepthRouter(Router):
    """Sends every token through the same number of recursions. Has no parameters."""

    causal_in_training = True
    inference_rule = InferenceRule("fixed_depth")

    def __init__(self, config: FixedDepthConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config.depth or num_recursions)

    def begin(self, rows: Tensor, context: RoutingContext) -> FixedDepthSession:
        return FixedDepthSession(context)
