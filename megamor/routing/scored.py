"""The part common to routers that score tokens at every recursion and gate the core's output with the score.

z = head_r(x / temperature) in fp32 on the un-normalised stream, gate = alpha · activation(z), and x + gate · f(x) for
the selected tokens (paper section 2.2.1). The routers differ in how scores select.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamor.config import CapacityConfig, ScoredConfig, TargetConfig
from megamor.routing.control import DepthControl
from megamor.routing.heads import build_head
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import Router, RoutingContext, RoutingSession

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda z: z}


def default_capacity(num_recursions: int, depth: float | None = None) -> tuple[float, ...]:
    """Fraction of the sequence at each recursion: (Nr - r) / Nr (paper section 2.2.1), or its power of sum `depth`."""
    base = [(num_recursions - r) / num_recursions for r in range(num_recursions)]
    if depth is None:
        return tuple(base)
    low, high = 0.0, 64.0  # of the power, whose sum falls from Nr to 1
    for _ in range(64):
        power = (low + high) / 2
        low, high = (power, high) if sum(c**power for c in base) > depth else (low, power)
    return tuple(min(1.0, depth) * c**high for c in base)


def capacity_of(config: object, num_recursions: int) -> tuple[float, ...]:
    """The configured capacities or, for routers without any, those of their target or of evenly spread depths."""
    given = config.capacity if isinstance(config, CapacityConfig) else None
    depth = config.depth(num_recursions) if isinstance(config, TargetConfig) else None
    return given or default_capacity(num_recursions, depth)


class ScoredRouter(Router):
    """One scoring head for each recursion; `capacity` [Nr] are fractions of the sequence."""

    def __init__(self, config: ScoredConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions, DepthControl.of(config, num_recursions))
        self.config = config
        self.capacity = capacity_of(config, num_recursions)
        self.heads = nn.ModuleList(build_head(config.head, dim, 1) for _ in range(num_recursions))

    def score(self, recursion: int, rows: Tensor) -> Tensor:
        """z [N] of rows [N, dim]."""
        z: Tensor = self.heads[recursion](rows / self.config.temperature)
        return z.squeeze(-1)

    def plan(self, z: Tensor, tokens: TokenSet, indices: Tensor | None) -> RoutingPlan:
        """The plan for the selected `tokens`, at `indices` [n] of the scored ones z [N] (None: all)."""
        if self.config.gating == "additive":
            return RoutingPlan(tokens, indices, Mix(from_stream=1.0, from_core=1.0))
        gate = ACTIVATIONS[self.config.activation](z if indices is None else z[indices])
        return RoutingPlan(tokens, indices, Mix(from_stream=1.0, from_core=self.config.alpha * gate))


class ScoredSession(RoutingSession):
    """A scored router during one forward pass."""

    def __init__(self, router: ScoredRouter, context: RoutingContext) -> None:
        super().__init__(context)
        self.router = router

    def add_z_loss(self, z: Tensor, candidates: TokenSet) -> None:
        """Mean of z² over the candidates, which keeps scores small; off unless it has a coefficient."""
        coeff = self.router.config.z_coeff
        if coeff and self.context.mode == "train" and z.numel():
            weights = self.weights(candidates, z.dtype)
            mean = z.square().mean() if weights is None else (weights * z.square()).sum()
            self.add_loss("z_loss", coeff * mean)
