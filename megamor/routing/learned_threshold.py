"""Learned thresholds: a token takes a recursion if its own score is above a threshold that is trained like a weight.

z_r = head_r(x / temperature) is the score at recursion r and t_r the threshold. From the second recursion on, a token
that took the one before continues iff z_r > t_r. Score and threshold concern one token, so the same rule holds in
training and at inference. The gate is a function of z_r - t_r, through which the threshold gets a gradient from the
language-model loss. That loss alone never asks for less depth, so something else must: a target, or the depth loss on
the mean soft depth, 1 + the sum of sigmoid(z_r - t_r) over the later recursions that a token takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamor.config import LearnedThresholdConfig
from megamor.routing.heads import full_precision
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, RoutingContext
from megamor.routing.scored import ACTIVATIONS, ScoredRouter, ScoredSession


class LearnedThresholdRouter(ScoredRouter):
    """`thresholds` [Nr]; the first one only takes part in the gate, since every token takes the first recursion."""

    causal_in_training = True
    inference_rule = InferenceRule("learned_threshold", score="router")
    config: LearnedThresholdConfig

    def __init__(self, config: LearnedThresholdConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.thresholds = nn.Parameter(torch.empty(num_recursions))

    def reset(self) -> None:
        """Set the thresholds to 0."""
        nn.init.zeros_(self.thresholds)

    def score(self, recursion: int, rows: Tensor) -> Tensor:
        """The margin z - threshold, [N]."""
        z = super().score(recursion, rows)
        return z - full_precision(self, "thresholds", z.dtype)[recursion]

    def begin(self, rows: Tensor, context: RoutingContext) -> LearnedThresholdSession:
        return LearnedThresholdSession(self, rows, context)

    def plan(self, z: Tensor, tokens: TokenSet, indices: Tensor | None) -> RoutingPlan:
        """As for all scored routers; an additive gate has the gradient of a weighted one."""
        if self.config.gating == "weighted":
            return super().plan(z, tokens, indices)
        gate = self.config.alpha * ACTIVATIONS[self.config.activation](z if indices is None else z[indices])
        return RoutingPlan(tokens, indices, Mix(from_stream=1.0, from_core=1.0 + (gate - gate.detach())))


class LearnedThresholdSession(ScoredSession):
    """Learned thresholds during one forward pass."""

    router: LearnedThresholdRouter

    def __init__(self, router: LearnedThresholdRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(router, context)
        self.num_tokens = len(rows)
        self.soft_depth = torch.ones((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Candidates above the threshold; all of them in the first recursion."""
        z = self.router.score(recursion, rows)
        self.add_z_loss(z, candidates)
        if recursion == 0:
            return self.router.plan(z, *self.take_all(recursion, candidates))
        # The shift holds a target. It isn't part of the gate, or holding the depth would scale the core's output.
        margins = self.router.steered(z.detach())
        self.add_margins(self.router, recursion, margins)
        tokens, indices = candidates.where(self.bounded(recursion, margins > 0, candidates))
        if self.context.mode == "train":
            self.add_depth_loss(recursion, z[indices])
        return self.router.plan(z, tokens, indices)

    def add_depth_loss(self, recursion: int, z: Tensor) -> None:
        """Add recursion r's term of the soft depth, of the tokens that take it; after the last, the loss.

        With a target, the control replaces it: both together would drive scores and shift apart without end.
        """
        # Only tokens that take a recursion have a gradient that says what it is good for. If the others were pushed
        # down as well, all would end below the thresholds, where no gradient brings them back. The z-loss does.
        self.soft_depth = self.soft_depth + torch.sigmoid(z).sum() / self.num_tokens
        if recursion == self.router.num_recursions - 1:
            self.add_ratio("soft_depth", self.soft_depth * self.context.fill, self.context.fill)
            if self.router.control is None:
                self.add_loss("depth_loss", self.router.config.depth_coeff * self.soft_depth)
