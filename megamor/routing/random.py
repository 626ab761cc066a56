"""Random routing: the control that tells whether a router has learned anything (paper, ablation of routing).

Gates are learned as under expert-choice; which tokens go on is drawn at random, so that each recursion's capacity holds
on average. The draw is a hash of a token's position (and in training of step and sequence), so that it doesn't depend
on batch, rank or chunking, and never looks ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamor.config import RandomConfig
from megamor.routing.plan import RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, RoutingContext
from megamor.routing.scored import ScoredRouter, ScoredSession


class RandomRouter(ScoredRouter):
    """Scores are used for the gates alone."""

    causal_in_training = True

    def __init__(self, config: RandomConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)

    @property
    def inference_rule(self) -> InferenceRule:
        """A fixed pseudo-random pattern of positions."""
        return InferenceRule("random")

    def begin(self, rows: Tensor, context: RoutingContext) -> RandomSession:
        """Draw one number for each token; recursion r takes the tokens whose number is below its capacity."""
        return RandomSession(self, rows, context)


class RandomSession(ScoredSession):
    """Random routing of one batch. `draw` [B·S] is each token's number."""

    per_row = ("draw",)

    def __init__(self, router: RandomRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(context, router.config.z_coeff)
        self.router = router
        key = context.positions_of(rows.device)
        if context.mode == "train":
            sequence = torch.arange(len(key), device=rows.device) // context.seq_len
            key = key + (sequence + 1) * 1_000_003 + (context.step + 1) * 998_244_353
        self.draw = uniform_hash(key)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Candidates whose number lies below the capacity."""
        z = self.router.score(recursion, rows)
        self.add_z_loss(z)
        if self.router.capacity[recursion] >= 1.0:
            tokens, indices = self.take_all(recursion, candidates)
            return RoutingPlan(tokens, indices, self.router.mix(z, indices))
        chosen = candidates.gather(self.draw) < self.router.capacity[recursion]
        tokens, indices = candidates.where(self.bounded(recursion, chosen, candidates))
        return RoutingPlan(tokens, indices, self.router.mix(z, indices))


def uniform_hash(keys: Tensor) -> Tensor:
    """Numbers in [0, 1) that look independent, one for each int64 key (a multiply-xorshift mixer; wraps around)."""
    x = keys.to(torch.int64)
    for multiplier, shift in ((-7046029254386353131, 31), (-4417276706812531889, 29), (-8663945395140668459, 32)):
        x = (x + 1) * multiplier
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
    return ((x >> 11) & ((1 << 53) - 1)).to(torch.float64) / (1 << 53)
