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
from megamor.routing.plan import Incoming, Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Router, RoutingContext, RoutingSession

INITIAL_BIAS = 1.0


class HaltingRouter(Router):
    """One halting unit for all recursions. Its bias starts positive, so that tokens halt early at first, or at the
    `prior` of PonderNet (else None)."""

    causal_in_training = True

    def __init__(self, config: HaltingConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions, DepthControl.of(config, num_recursions))
        self.config = config
        self.prior = config.prior if isinstance(config, PonderNetConfig) else None
        self.head = RouterLinear(dim, 1)
        self.bias = nn.Parameter(torch.empty(1))

    def reset(self) -> None:
        """Set the bias to its initial value."""
        nn.init.constant_(self.bias, INITIAL_BIAS if self.prior is None else math.log(self.prior / (1 - self.prior)))

    @property
    def inference_rule(self) -> InferenceRule:
        """As in training: halt once the halting probabilities add up to 1 - epsilon."""
        return InferenceRule("halting", score="router", threshold=1 - self.config.epsilon)

    @property
    def quantile(self) -> Tensor | float:
        """PonderNet's probability of having halted at which a token does halt; a target shifts its logit."""
        limit = 1 - self.config.epsilon
        return limit if self.control is None else torch.sigmoid(torch.logit(self.shift * 0 + limit) + self.shift)

    def begin(self, rows: Tensor, context: RoutingContext) -> HaltingSession:
        return HaltingSession(self, rows, context)


class HaltingSession(RoutingSession):
    """Halting during one forward pass. `spent` [T] is the sum of each token's weights so far."""

    per_row = ("spent", "halted")

    def __init__(self, router: HaltingRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(context)
        self.router = router
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.spent = torch.zeros(len(rows), dtype=dtype, device=rows.device)
        self.halted = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        self.ponder = torch.zeros((), dtype=dtype, device=rows.device)
        self.sizes: Incoming | None = None

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """All tokens in soft mode; in hard mode those that have not halted. Weights follow in `mix`."""
        if self.router.config.mode == "soft" or recursion == 0:
            return RoutingPlan(*self.take_all(recursion, candidates), Mix())
        size = self.sizes.tolist()[0] if self.sizes is not None and candidates is self.took else None
        tokens, indices = candidates.where(~candidates.gather(self.halted), size)
        return RoutingPlan(tokens, indices, Mix())

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """Emit p_n·s_n, once the core's output s_n is known."""
        tokens, prior = plan.tokens, self.router.prior
        logits = self.router.head(core_output).squeeze(-1) + full_precision(self.router, "bias", self.spent.dtype)
        spent, halted = tokens.gather(self.spent), tokens.gather(self.halted)
        limit = 1 - self.router.config.epsilon
        # A target shifts the probability of halting or, where a prior shapes that, the limit.
        if prior is None:
            halting = torch.sigmoid(self.router.steered(logits, -1.0))
            below = spent + halting < limit
        else:
            halting = torch.sigmoid(logits) * (1 - spent)
            below = spent + halting < self.router.quantile
        if self.router.control is not None:
            reached, needed = (halting, limit - spent) if prior is None else (spent + halting, self.router.quantile)
            margins = torch.logit(reached, eps=1e-7) - torch.logit(torch.as_tensor(needed), eps=1e-7)
            self.add_margins(self.router, recursion, margins)
        last = recursion == self.router.num_recursions - 1
        ends = ~halted & (~self.continues(recursion, below, tokens) | last)
        weight = torch.where(halted, 0.0, torch.where(ends, 1 - spent, halting))
        self.spent = tokens.scatter(self.spent, spent + weight)
        self.halted = tokens.scatter(self.halted, halted | ends)
        if self.router.config.mode == "hard" and not last:
            # On its way to the host while the device combines the output with the stream.
            self.took, self.sizes = tokens, tokens.sizes(~(halted | ends).unsqueeze(1))
        if prior is None:
            # The sum over all tokens of the number of updates (a constant) plus the remainder.
            cost = (~halted).sum() + (weight * ends).sum()
        else:
            step = torch.where(halted, 0.0, 1 - spent if last else halting)
            cost = self.divergence(recursion, step, (1 - spent - step) * ends)
        self.ponder = self.ponder + cost / len(self.spent)
        if last:
            name = "ponder_cost" if prior is None else "prior_kl"
            self.add_ratio(name, self.ponder * self.context.fill, self.context.fill)
            # The cost would push halting probabilities up against the shift without end.
            if self.context.mode == "train" and (prior is not None or self.router.control is None):
                self.add_loss("ponder_loss", self.router.config.ponder_coeff * self.ponder)
        return Mix(from_core=1.0, emit=weight)

    def divergence(self, recursion: int, p: Tensor, later: Tensor) -> Tensor:
        """Sum of p·log(p / q), p [N] being the probability of halting now; for tokens that do, also of `later`.

        `later` [N] is the probability of halting after this recursion, 0 for tokens that continue.
        """
        # All later outcomes of a token that has halted are lumped together, which makes this a lower bound. Lumped with
        # this one too, they would say nothing: halting at once would cost nothing, and every token would do it.
        assert self.router.prior is not None
        stay, num_recursions = 1 - self.router.prior, self.router.num_recursions
        q = [stay**n * (1 - stay) / (1 - stay**num_recursions) for n in range(num_recursions)]
        terms = ((p, q[recursion]), (later, sum(q[recursion + 1 :]) or 1.0))
        return torch.stack([(x * (x.clamp_min(1e-12).log() - math.log(mass))).sum() for x, mass in terms]).sum()

    def leaving_mix(self, recursion: int, tokens: TokenSet) -> Mix:
        """The state itself; `mix` gives the remainder to it."""
        return Mix()

    def continues(self, recursion: int, below: Tensor, tokens: TokenSet) -> Tensor:
        """Whether each of `tokens` continues to the next recursion, if its weights sum to `below` [N] the limit."""
        # In soft mode a token passes through all recursions whether it has halted or not, so a lower bound on its depth
        # says nothing about where it halts: only the upper bound counts.
        if self.router.config.mode == "hard":
            return self.bounded(recursion + 1, below, tokens)
        return below & self.bounded(recursion + 1, torch.ones_like(below), tokens)
