"""EMA-threshold routing: expert-choice's capacities without looking ahead, in training and inference alike.

Each recursion keeps an exponential moving average of the score that its fraction of the candidates lies above, and
selects the tokens that score higher. A token's selection depends only on its own score and on the history of the run.
The rule is therefore causal and needs no auxiliary loss; the number of selected tokens varies around the capacity
(after arXiv 2603.11535, which proposes it for experts).

Early in a run, all scores move together, by more in a step than they differ between tokens. The average therefore
follows quickly at first and only reaches its decay after hundreds of steps. What lag remains would make shares too
large while scores rise and too small while they fall. So a step that selected too few tokens reports a lower quantile
than the capacity's, and one that selected too many a higher one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamor.config import EmaThresholdConfig
from megamor.routing.plan import RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, RoutingContext
from megamor.routing.scored import ScoredRouter, ScoredSession

WARM_UP = 24
"""The n-th average is over about the last 1 + n / WARM_UP steps, until `ema_decay` is reached."""
FEEDBACK = 1.5
"""By how much the reported quantile's fraction changes for a share that is wrong by one."""


class EmaThresholdRouter(ScoredRouter):
    """`quantiles` [Nr] is the moving average times 1 - decay^n, where `num_updates` [Nr] is n, the number of steps that
    entered it."""

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
        """The average; 0 before the first update."""
        seen = 1 - self.config.ema_decay ** self.num_updates[recursion]
        return self.quantiles[recursion] / seen.clamp_min(torch.finfo(seen.dtype).tiny)

    @torch.no_grad()
    def update(self, totals: dict[str, Tensor]) -> None:
        """Move each average towards the mean quantile of the step's micro-batches on all ranks, weighted by tokens."""
        # A recursion that no token reached in this step has no quantile: its average and count stay.
        found, count = totals["threshold_quantiles"].to(self.quantiles), totals["threshold_batches"].to(self.quantiles)
        average = torch.stack([self.threshold(recursion) for recursion in range(self.full_depth)])
        decay = (self.num_updates / (self.num_updates + WARM_UP)).clamp_max(self.config.ema_decay)
        mean = found / torch.where(count > 0, count, 1.0)
        super().update(totals)
        average = torch.where(count > 0, decay * average + (1 - decay) * mean, average)
        self.num_updates += (count > 0).to(self.num_updates)
        self.quantiles.copy_(average * (1 - self.config.ema_decay**self.num_updates))


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
        margins = self.router.steered(z.detach()) - self.router.threshold(recursion)
        self.add_margins(self.router, recursion, margins)
        chosen = margins > 0
        if self.context.mode == "train" and z.numel():
            # Gathered for the threshold of the next step; this step selects by the past alone, which keeps it causal.
            lower = (1 - fraction + FEEDBACK * (chosen.double().mean() - fraction)).clamp(0.0, 1.0)
            rank = (lower * len(z)).round().long().clamp(1, len(z))
            # Neither `values[rank - 1]` nor an assigned number: the host would wait to read the one or copy the other.
            quantile = z.detach().sort().values.index_select(0, rank.reshape(1) - 1).squeeze(0)
            self.totals["threshold_quantiles"][recursion] = quantile * self.context.fill
            self.totals["threshold_batches"][recursion].fill_(self.context.fill)
        return self.router.plan(z, *candidates.where(self.bounded(recursion, chosen, candidates)))
