"""Routers: which tokens take part in which recursion. One file per router, one protocol (`router.py`, `plan.py`)."""

from __future__ import annotations

from megamor.config import ExpertChoiceConfig, FixedDepthConfig, RouterConfig, TokenChoiceConfig
from megamor.routing.expert_choice import ExpertChoiceRouter
from megamor.routing.fixed import FixedDepthRouter
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Mode, Ratio, Router, RoutingContext, RoutingSession
from megamor.routing.token_choice import TokenChoiceRouter

__all__ = [
    "InferenceRule",
    "Mix",
    "Mode",
    "Ratio",
    "Router",
    "RoutingContext",
    "RoutingPlan",
    "RoutingSession",
    "TokenSet",
    "build_router",
]


def build_router(config: RouterConfig, dim: int, num_recursions: int) -> Router:
    """The router that `config.kind` names, for hidden states of width `dim`."""
    match config:
        case FixedDepthConfig():
            return FixedDepthRouter(config, num_recursions)
        case ExpertChoiceConfig():
            return ExpertChoiceRouter(config, dim, num_recursions)
        case TokenChoiceConfig():
            return TokenChoiceRouter(config, dim, num_recursions)
