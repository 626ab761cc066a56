"""What routers share that score tokens at every recursion and gate the core's output with the score.

z = head_r(x / temperature) in fp32 on the un-normalised stream, gate = alpha · activation(z), x + gate · f(x) for the
selected tokens (paper section 2.2.1). They differ in how the scores select.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamor.config import ScoredConfig
from megamor.routing.heads import build_head
from megamor.routing.plan import Mix
from megamor.routing.router import Router, RoutingContext, RoutingSession

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda z: z}


def default_capacity(num_recursions: int) -> tuple[float, ...]:
    """Share of the sequence at each recursion: (Nr - r) / Nr (paper section 2.2.1)."""
    return tuple((num_recursions - r) / num_recursions for r in range(num_recursions))


class ScoredRouter(Router):
    """One scoring head for each recursion."""

    def __init__(self, config: ScoredConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        self.capacity = config.capacity or default_capacity(num_recursions)
        self.heads = nn.ModuleList(build_head(config.head, dim, 1) for _ in range(num_recursions))

    def score(self, recursion: int, rows: Tensor) -> Tensor:
        """z [N] of rows [N, dim]."""
        return self.heads[recursion](rows / self.config.temperature).squeeze(-1)

    def mix(self, z: Tensor, indices: Tensor | None) -> Mix:
        """How the selected ones of the scored tokens are combined."""
        if self.config.gating == "additive":
            return Mix(from_stream=1.0, from_core=1.0)
        selected = z if indices is None else z[indices]
        return Mix(from_stream=1.0, from_core=self.config.alpha * ACTIVATIONS[self.config.activation](selected))


class ScoredSession(RoutingSession):
    """A scored router on one batch."""

    def __init__(self, context: RoutingContext, z_coeff: float) -> None:
        super().__init__(context)
        self.z_coeff = z_coeff

    def add_z_loss(self, z: Tensor) -> None:
        """Mean of z² over the candidates (keeps scores from growing); off unless it has a coefficient."""
        if self.z_coeff and self.context.mode == "train" and z.numel():
            self.add_loss("z_loss", self.z_coeff * z.square().mean())
