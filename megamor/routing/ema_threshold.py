"""EMA-threshold routing: expert-choice's capacities without looking ahead, in training and inference alike.

Each recursion keeps an exponential moving average of the score that its fraction of the candidates lies above, and
selects the tokens that score higher. A token's selection depends only on its own score and on the history of the run.
The rule is therefore causal and needs no auxiliary loss; the number of selected tokens varies around the capacity
(after arXiv 2603.11535, which proposes it for experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamor.config import EmaThresholdConfig
from megamor.routing.plan import RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, RoutingContext
from megamor.routing.scored import ScoredRouter, ScoredSession


class EmaThresholdRouter(ScoredRouter):
    """`quantiles` [Nr] is the (biased) moving average, `num_updates` [Nr] the number of steps that entered it."""

    causal_in_training = True
    inference_rule = InferenceRule("ema_threshold", score="router")
    config: EmaThresholdConfig
    quantiles: Tensor
    num_updates: Tensor

    def __init__(self, config: EmaThresholdConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.register_buffer("quantiles", torch.zeros(num_recursions))
        self.register_buffer("num_updates", torch.zeros(num_recursions))

    def begin(self, rows: Tensor, context: RoutingContext) -> EmaThresholdSession:
        return EmaThresholdSession(self, context)

    def threshold(self, recursion: int) -> Tensor:
        """The average, corrected for its start at 0 as in Adam; 0 before the first update."""
        seen = 1 - self.config.ema_decay ** self.num_updates[recursion]
        return self.quantiles[recursion] / seen.clamp_min(torch.finfo(seen.dtype).tiny)

    @torch.no_grad()
    def update(self, totals: dict[str, Tensor]) -> None:
        """Move each average towards the mean quantile of the step's micro-batches on all ranks."""
        # A recursion that no token reached in this step has no quantile: its average and count stay.
        found, count = totals["threshold_quantiles"].to(self.quantiles), totals["threshold_batches"].to(self.quantiles)
        decay = torch.where(count > 0, self.config.ema_decay, 1.0)
        self.quantiles.copy_(decay * self.quantiles + (1 - decay) * found / count.clamp_min(1))
        self.num_updates += (count > 0).to(self.num_updates)


class EmaThresholdSession(ScoredSession):
    """EMA-threshold routing during one forward pass."""

    router: EmaThresholdRouter

    def __init__(self, router: EmaThresholdRouter, context: RoutingContext) -> None:
        super().__init__(router, context)
        if context.mode == "train":
            for name in ("threshold_quantiles", "threshold_batches"):
                self.totals[name] = torch.zeros_like(router.quantiles)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Candidates above the threshold; all of them if the capacity is all."""
        z = self.router.score(recursion, rows)
        self.add_z_loss(z, candidates)
        # Capacities are fractions of the whole sequence; the candidates are what the recursion before has left of it.
        capacity = self.router.capacity
        fraction = capacity[recursion] / (capacity[recursion - 1] if recursion else 1.0)
        if fraction >= 1.0:
            return self.router.plan(z, *self.take_all(recursion, candidates))
        if self.context.mode == "train" and z.numel():
            # Gathered for the threshold of the next step; this step selects by the past alone, which keeps it causal.
            rank = min(z.numel(), max(1, round((1 - fraction) * z.numel())))
            self.totals["threshold_quantiles"][recursion] = z.detach().kthvalue(rank).values
            self.totals["threshold_batches"][recursion] = 1
        chosen = z.detach() > self.router.threshold(recursion)
        return self.router.plan(z, *candidates.where(self.bounded(recursion, chosen, candidates)))
