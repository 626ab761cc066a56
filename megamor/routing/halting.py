"""Adaptive computation time: each token halts once its halting probabilities add up to one (arXiv 1603.08983).

After recursion n, a token in state s_n gets a halting probability h_n = sigmoid(w·s_n + b). Its weight p_n is h_n until
the sum would exceed 1 - epsilon or no recursion is left; then p_n is the remainder, so that a token's weights sum to 1.
The output is the sum of p_n·s_n. The ponder cost is the number of updates plus the remainder; minimising it pushes
halting probabilities up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamor.config import HaltingConfig
from megamor.routing.heads import RouterLinear, full_precision
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Router, RoutingContext, RoutingSession

INITIAL_BIAS = 1.0


class HaltingRouter(Router):
    """One halting unit for all recursions. Its bias starts positive, so that tokens halt early at first."""

    causal_in_training = True

    def __init__(self, config: HaltingConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
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

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """All tokens in soft mode; in hard mode those that have not halted. Weights follow in `mix`."""
        if self.router.config.mode == "soft" or recursion == 0:
            return RoutingPlan(*self.take_all(recursion, candidates), Mix())
        tokens, indices = candidates.where(~candidates.gather(self.halted))
        return RoutingPlan(tokens, indices, Mix())

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """Emit p_n·s_n, once the core's output s_n is known."""
        tokens = plan.tokens
        halting = torch.sigmoid(
            self.router.head(core_output).squeeze(-1) + full_precision(self.router, "bias", self.spent.dtype)
        )
        spent, halted = tokens.gather(self.spent), tokens.gather(self.halted)
        last = recursion == self.router.num_recursions - 1
        ends = ~halted & (~self.continues(recursion, spent + halting, tokens) | last)
        weight = torch.where(halted, 0.0, torch.where(ends, 1 - spent, halting))
        self.spent = tokens.scatter(self.spent, spent + weight)
        self.halted = tokens.scatter(self.halted, halted | ends)
        # The mean over all tokens of the number of updates (a constant) plus the remainder.
        self.ponder = self.ponder + ((~halted).sum() + (weight * ends).sum()) / len(self.spent)
        if last:
            self.add_ratio("ponder_cost", self.ponder * self.context.fill, self.context.fill)
            if self.context.mode == "train":
                self.add_loss("ponder_loss", self.router.config.ponder_coeff * self.ponder)
        return Mix(from_core=1.0, emit=weight)

    def leaving_mix(self, recursion: int, tokens: TokenSet) -> Mix:
        """The state itself; `mix` gives the remainder to it."""
        return Mix()

    def continues(self, recursion: int, total: Tensor, tokens: TokenSet) -> Tensor:
        """Whether each of `tokens`, with weights summing to `total` [N], continues to the next recursion."""
        # In soft mode a token passes through all recursions whether it has halted or not, so a lower bound on its depth
        # says nothing about where it halts: only the upper bound counts.
        below = total < 1 - self.router.config.epsilon
        if self.router.config.mode == "hard":
            return self.bounded(recursion + 1, below, tokens)
        return below & self.bounded(recursion + 1, torch.ones_like(below), tokens)
