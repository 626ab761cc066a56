"""Routers: which tokens take which recursion. One file per router; the protocol is in `router.py` and `plan.py`."""

from __future__ import annotations

from collections.abc import Callable

from megamor.config import CustomRouterConfig, RouterConfig, SkipForwardRecurseConfig
from megamor.routing.custom import import_router, refuse_unknown_router
from megamor.routing.ema_threshold import EmaThresholdRouter
from megamor.routing.expert_choice import ExpertChoiceRouter
from megamor.routing.fixed import FixedDepthRouter
from megamor.routing.halting import HaltingRouter, PonderNetRouter
from megamor.routing.learned_threshold import LearnedThresholdRouter
from megamor.routing.monotone import MonotoneRouter
from megamor.routing.plan import MarkedSet, Mix, RoutingPlan, TokenSet
from megamor.routing.random import RandomRouter
from megamor.routing.router import DepthBounds, InferenceRule, Mode, Ratio, Router, RoutingContext, RoutingSession
from megamor.routing.skip_forward_recurse import SkipForwardRecurseRouter
from megamor.routing.token_choice import TokenChoiceRouter

__all__ = [
    "DepthBounds",
    "InferenceRule",
    "MarkedSet",
    "Mix",
    "Mode",
    "Ratio",
    "Router",
    "RoutingContext",
    "RoutingPlan",
    "RoutingSession",
    "TokenSet",
    "build_router",
    "draws_random",
    "refuse_unknown_router",
]


ROUTERS: dict[str, Callable[..., Router]] = {
    "fixed": FixedDepthRouter,
    "expert_choice": ExpertChoiceRouter,
    "token_choice": TokenChoiceRouter,
    "ema_threshold": EmaThresholdRouter,
    "learned_threshold": LearnedThresholdRouter,
    "random": RandomRouter,
    "skip_forward_recurse": SkipForwardRecurseRouter,
    "act": HaltingRouter,
    "monotone": MonotoneRouter,
    "pondernet": PonderNetRouter,
}


def build_router(config: RouterConfig, dim: int, num_recursions: int) -> Router:
    """The router that `config.kind` names, for hidden states of width `dim`.

    Raises:
        ConfigError: a custom router that can't be imported or isn't a `Router`.
    """
    if isinstance(config, CustomRouterConfig):
        return import_router(config.target)(dict(config.options), dim, num_recursions)
    return ROUTERS[config.kind](config, dim, num_recursions)


def draws_random(config: RouterConfig) -> bool:
    """Whether training draws from the random states of the process. A custom router is assumed to.

    No other part of a model does: there is no dropout, and `RandomRouter` hashes positions instead.
    """
    return isinstance(config, SkipForwardRecurseConfig | CustomRouterConfig)
