"""Random routing: the control that shows whether a router has learned anything (paper, ablation of routing).

Gates are learned as in expert-choice, but tokens are selected at random, so that each recursion's capacity holds on
average. The random number is a hash of the token's position (in training also of step and sequence). It needs no
generator state, is the same under any chunking of a decode or recomputation, and never looks ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamor.config import RandomConfig
from megamor.routing.plan import RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, RoutingContext
from megamor.routing.scored import ScoredRouter, ScoredSession


class RandomRouter(ScoredRouter):
    """Scores are used for the gates only."""

    causal_in_training = True
    inference_rule = InferenceRule("random")
    config: RandomConfig

    def begin(self, rows: Tensor, context: RoutingContext) -> RandomSession:
        """Draw one number per token; recursion r takes the tokens whose number is below its capacity."""
        return RandomSession(self, rows, context)


class RandomSession(ScoredSession):
    """Random routing during one forward pass. `draw` [T] is each token's number in [0, 1)."""

    per_row = ("draw",)

    def __init__(self, router: RandomRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(router, context)
        key = context.positions_of(rows.device)
        if context.mode == "train":
            # Different sequences and steps need different draws, or the same positions would always go deep.
            sequence = context.everything.sequences(rows.device)
            key = key + (sequence + 1) * 1_000_003 + (context.step + 1) * 998_244_353
        self.draw = uniform_hash(key)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Candidates whose number is below the capacity."""
        z = self.router.score(recursion, rows)
        self.add_z_loss(z, candidates)
        if self.router.capacity[recursion] >= 1.0:
            return self.router.plan(z, *self.take_all(recursion, candidates))
        chosen = candidates.gather(self.draw) < self.router.capacity[recursion]
        return self.router.plan(z, *candidates.where(self.bounded(recursion, chosen, candidates)))


def uniform_hash(keys: Tensor) -> Tensor:
    """Pseudo-random numbers in [0, 1), one for each int64 key: a multiply-xorshift mixer with wrap-around."""
    x = keys.to(torch.int64)
    for multiplier, shift in ((-7046029254386353131, 31), (-4417276706812531889, 29), (-8663945395140668459, 32)):
        x = (x + 1) * multiplier
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
    return ((x >> 11) & ((1 << 53) - 1)).to(torch.float64) / (1 << 53)
