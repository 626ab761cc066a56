"""Adaptive computation time: each token halts once its halting probabilities add up to one (arXiv 1603.08983).

After recursion n, a token in state s_n gets a halting probability h_n = sigmoid(w·s_n + b). Its weight p_n is h_n until
the sum would exceed 1 - epsilon or no recursion is left; then p_n is the remainder, so that a token's weights sum to 1.
The output is the sum of p_n·s_n. The ponder cost is the number of updates plus the remainder; minimising it pushes
halting probabilities up.

PonderNet (arXiv 2107.05407) makes the weights a distribution over the halting step by construction: p_n is h_n times
the probability 1 - p_1 - … - p_(n-1) of not having halted before. In place of the cost, their divergence from a
geometric prior, truncated at Nr and renormalised, says how deep to go. The original trains the expected loss of all
halting steps, which for a stage inside a network would run coda and head Nr times. Here the loss is that of the
expected state, as with adaptive computation time. The original samples the step at inference; here a token halts at
the quantile 1 - epsilon of its distribution, in training too, so that nothing is computed that is not used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megamor.config import HaltingConfig, PonderNetConfig
from megamor.routing.control import DepthControl
from megamor.routing.heads import RouterLinear, full_precision
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Router, RoutingContext, RoutingSession

INITIAL_BIAS = 1.0


class HaltingRouter(Router):
    """One halting unit for all recursions. Its bias starts positive, so that tokens halt early at first."""

    causal_in_training = True

    def __init__(self, config: HaltingConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions, DepthControl.of(config, num_recursions))
        self.config = config
        self.head = RouterLinear(dim, 1)
        self.bias = nn.Parameter(torch.empty(1))

    def reset(self) -> None:
        """Set the bias to its initial value."""
        nn.init.constant_(self.bias, INITIAL_BIAS)

    @property
    def inference_rule(self) -> InferenceRule:
        """As in training: halt once the halting probabilities add up to 1 - epsilon."""
        return InferenceRule("halting", score="router", threshold=1 - self.config.epsilon)

    def begin(self, rows: Tensor, context: RoutingContext) -> HaltingSession:
        return HaltingSession(self, rows, context)


class PonderNetRouter(HaltingRouter):
    """As above, with weights that are a distribution by construction. The bias starts at the prior."""

    config: PonderNetConfig

    def reset(self) -> None:
        """Set the bias to that of the prior."""
        nn.init.constant_(self.bias, math.log(self.config.prior / (1 - self.config.prior)))

    def begin(self, rows: Tensor, context: RoutingContext) -> PonderNetSession:
        return PonderNetSession(self, rows, context)


class HaltingSession(RoutingSession):
    """Halting during one forward pass. `spent` [T] is the sum of each token's weights so far."""

    per_row = ("spent", "halted")
    cost_name = "ponder_cost"

    def __init__(self, router: HaltingRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(context)
        self.router = router
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.spent = torch.zeros(len(rows), dtype=dtype, device=rows.device)
        self.halted = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        self.ponder = torch.zeros((), dtype=dtype, device=rows.device)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """All tokens in soft mode; in hard mode those that have not halted. Weights follow in `mix`."""
        if self.router.config.mode == "soft" or recursion == 0:
            return RoutingPlan(*self.take_all(recursion, candidates), Mix())
        tokens, indices = candidates.where(~candidates.gather(self.halted))
        return RoutingPlan(tokens, indices, Mix())

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """Emit p_n·s_n, once the core's output s_n is known."""
        tokens = plan.tokens
        logits = self.router.head(core_output).squeeze(-1) + full_precision(self.router, "bias", self.spent.dtype)
        spent, halted = tokens.gather(self.spent), tokens.gather(self.halted)
        halting = self.halting_weight(recursion, logits, spent)
        last = recursion == self.router.num_recursions - 1
        ends = ~halted & (~self.continues(recursion, spent + halting, tokens) | last)
        weight = torch.where(halted, 0.0, torch.where(ends, 1 - spent, halting))
        self.spent = tokens.scatter(self.spent, spent + weight)
        self.halted = tokens.scatter(self.halted, halted | ends)
        self.ponder = self.ponder + self.cost(recursion, weight, halted, ends) / len(self.spent)
        if last:
            self.add_ratio(self.cost_name, self.ponder * self.context.fill, self.context.fill)
            if self.context.mode == "train" and not self.is_replaced_by_target:
                self.add_loss("ponder_loss", self.router.config.ponder_coeff * self.ponder)
        return Mix(from_core=1.0, emit=weight)

    @property
    def is_replaced_by_target(self) -> bool:
        """Whether the ponder loss is left out: it would push halting probabilities up for ever against the shift."""
        return self.router.control is not None

    def halting_weight(self, recursion: int, logits: Tensor, spent: Tensor) -> Tensor:
        """Weight [N] of this recursion's result, unless the token ends here, from `logits` [N] of halting."""
        logits = self.router.steered(logits, -1.0)
        self.add_margins(self.router, recursion, logits - torch.logit(1 - self.router.config.epsilon - spent, eps=1e-7))
        return torch.sigmoid(logits)

    def cost(self, recursion: int, weight: Tensor, halted: Tensor, ends: Tensor) -> Tensor:
        """Sum over the tokens of this recursion's part of the number of updates (a constant) plus the remainder."""
        return (~halted).sum() + (weight * ends).sum()

    def is_below(self, recursion: int, total: Tensor) -> Tensor:
        """Whether weights that sum to `total` [N] let a token continue."""
        return total < 1 - self.router.config.epsilon

    def leaving_mix(self, recursion: int, tokens: TokenSet) -> Mix:
        """The state itself; `mix` gives the remainder to it."""
        return Mix()

    def continues(self, recursion: int, total: Tensor, tokens: TokenSet) -> Tensor:
        """Whether each of `tokens`, with weights summing to `total` [N], continues to the next recursion."""
        # In soft mode a token passes through all recursions whether it has halted or not, so a lower bound on its depth
        # says nothing about where it halts: only the upper bound counts.
        below = self.is_below(recursion, total)
        if self.router.config.mode == "hard":
            return self.bounded(recursion + 1, below, tokens)
        return below & self.bounded(recursion + 1, torch.ones_like(below), tokens)


class PonderNetSession(HaltingSession):
    """PonderNet during one forward pass; the ponder cost is the divergence from the prior."""

    router: PonderNetRouter
    cost_name = "prior_kl"
    is_replaced_by_target = False

    def halting_weight(self, recursion: int, logits: Tensor, spent: Tensor) -> Tensor:
        """The probability of halting now, times that of not having halted before."""
        return torch.sigmoid(logits) * (1 - spent)

    def cost(self, recursion: int, weight: Tensor, halted: Tensor, ends: Tensor) -> Tensor:
        """This recursion's term of the KL divergence, p·log(p / q), with the mass of all later ones where a token ends.

        The divergence of two distributions whose last outcomes are lumped together is a lower bound on their own.
        """
        stay, num_recursions = 1 - self.router.config.prior, self.router.num_recursions
        prior = [stay**n * (1 - stay) / (1 - stay**num_recursions) for n in range(num_recursions)]
        q = torch.where(ends, sum(prior[recursion:]), prior[recursion])
        return torch.where(halted, 0.0, weight * (weight.clamp_min(1e-12).log() - q.log())).sum()

    def is_below(self, recursion: int, total: Tensor) -> Tensor:
        """As before; a target shifts the probability at which tokens halt, which leaves the distribution alone."""
        if self.router.control is None:
            return super().is_below(recursion, total)
        threshold = torch.logit(torch.full_like(total, 1 - self.router.config.epsilon), eps=1e-7)
        margins = self.router.steered(threshold) - torch.logit(total.detach(), eps=1e-7)
        self.add_margins(self.router, recursion, margins)
        return margins > 0
