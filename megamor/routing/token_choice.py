"""Token-choice routing: each token picks its depth once, before the first recursion (paper section 2.2.1).

A token's depth depends on its own scores only, so the rule is causal. Load is balanced by a loss (Switch Transformer's
f·P) or by a bias that is adjusted without gradients (loss-free balancing, arXiv 2408.15664).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import TokenChoiceConfig
from megamor.routing.control import DepthControl
from megamor.routing.heads import build_head
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Router, RoutingContext, RoutingSession
from megamor.routing.scored import capacity_of


class TokenChoiceRouter(Router):
    """One head with a logit per depth. Under loss-free balancing `bias` [Nr] shifts the choice, but not the gate."""

    causal_in_training = True
    inference_rule = InferenceRule("argmax_depth", score="router")
    bias: Tensor

    def __init__(self, config: TokenChoiceConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions, DepthControl.of(config, num_recursions))
        self.config = config
        self.head = build_head(config.head, dim, num_recursions)
        self.register_buffer("bias", torch.zeros(num_recursions))

    def begin(self, rows: Tensor, context: RoutingContext) -> TokenChoiceSession:
        """A session with every token's depth chosen."""
        return TokenChoiceSession(self, rows, context)

    def balanced(self, like: Tensor) -> Tensor:
        """[Nr], with mean 1: how often each depth should be chosen, relative to the others. All equal without a target.

        With one, the loads are balanced when the shares of the recursions are those of the default capacities.
        """
        if self.control is None:
            return torch.ones_like(like)
        capacity = capacity_of(self.config, self.full_depth)[: len(like)]
        shares = [a - b for a, b in zip(capacity, (*capacity[1:], 0.0), strict=True)]
        return torch.stack([torch.full_like(like[0], max(share, 0.01) * len(shares)) for share in shares])

    @torch.no_grad()
    def update(self, totals: dict[str, Tensor]) -> None:
        """Loss-free balancing: raise the bias of depths below the mean load, lower the others."""
        super().update(totals)
        # During the balance warm-up nothing is counted: all tokens take full depth, whatever they would choose.
        if self.config.balancing == "loss_free" and "depth_choices" in totals:
            load = totals["depth_choices"] / self.balanced(totals["depth_choices"])
            self.bias[: len(load)] += self.config.bias_update_rate * torch.sign(load.mean() - load).to(self.bias)


class TokenChoiceSession(RoutingSession):
    """Token-choice during one forward pass.

    `depth` [T] is the last recursion (0-based) of each token, `gate` [T] its weight.
    """

    per_row = ("depth", "gate")

    def __init__(self, router: TokenChoiceRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(context)
        config = router.config
        self.z = router.head(rows / config.temperature)[:, : router.num_recursions]
        scores = self.z.softmax(-1) if config.activation == "softmax" else self.z.sigmoid()
        scores = config.alpha * scores
        biased = scores + router.bias[: router.num_recursions] if config.balancing == "loss_free" else scores
        if router.control is not None:
            biased = router.steered(biased, torch.arange(router.num_recursions, device=biased.device))
        # The bias balances the choice of depths. The gate is the unbiased score, so the bias does not scale the output.
        self.depth = self.allowed(biased.detach()).argmax(-1)
        warming_up = context.mode == "train" and context.step < config.balance_warmup_steps
        if warming_up:
            self.depth = torch.full_like(self.depth, router.num_recursions - 1)
        # A token that an exit rule stops keeps the gate of its choice: for depths that it didn't choose, gates are low.
        gated = biased.detach().argmax(-1) if context.exits else self.depth
        self.gate = scores.gather(-1, gated.unsqueeze(-1)).squeeze(-1)
        if config.gating == "additive":
            self.gate = torch.ones_like(self.gate)
        reaching = self.depth.unsqueeze(-1) >= torch.arange(router.num_recursions, device=self.depth.device)
        # All sizes are known now: the tokens of each recursion, in total and at most in one sequence. Their copy to the
        # host starts before the device is given recursion 0, which hides the wait that selecting for recursion 1 would
        # otherwise cause.
        self.sizes = context.everything.sizes(reaching)
        if context.mode == "train" and config.z_coeff:
            self.add_loss("z_loss", config.z_coeff * torch.logsumexp(self.z, dim=-1).square().mean())
        if not warming_up:
            self.add_margins(router, 0, (biased[:, -1] - biased[:, 0]) / max(1, router.num_recursions - 1))
            self.add_balance(router, scores, reaching)

    def allowed(self, scores: Tensor) -> Tensor:
        """`scores` [N, Nr] with -inf at depths out of bounds."""
        bounds = self.context.bounds
        if bounds is None:
            return scores
        depth = torch.arange(1, scores.shape[1] + 1, device=scores.device)
        inside = (depth >= bounds.least.unsqueeze(1)) & (depth <= bounds.most.unsqueeze(1))
        return scores.masked_fill(~inside, float("-inf"))

    def regrouped(self, context: RoutingContext, state: Mapping[str, Tensor]) -> RoutingSession:
        """As in `RoutingSession`; the sizes were those of the rows that began together and no longer hold."""
        session = super().regrouped(context, state)
        assert isinstance(session, TokenChoiceSession)
        session.sizes = None
        return session

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Tokens of depth >= recursion."""
        tokens, indices = candidates, None
        if recursion > 0:
            size = None if self.sizes is None else self.sizes.tolist()[recursion]
            tokens, indices = candidates.where(candidates.gather(self.depth) >= recursion, size)
        return RoutingPlan(tokens, indices, Mix())

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """Tokens that leave become x_in + gate·y, the others y."""
        # Ungated until the last recursion: a token of depth i leaves with x_in + gate · f^(i+1)(x_in).
        gate = plan.tokens.gather(self.gate)
        leaving = (plan.tokens.gather(self.depth) == recursion).to(gate.dtype)
        self.add_ratio(f"gate_{recursion + 1}", (leaving * gate).sum(), leaving.sum())
        return Mix(from_input=leaving, from_core=leaving * gate + (1 - leaving))

    def leaving_mix(self, recursion: int, tokens: TokenSet) -> Mix:
        """x_in + gate·y."""
        return Mix(from_input=1.0, from_core=tokens.gather(self.gate))

    def stop_after(self, recursion: int, tokens: TokenSet, stops: Tensor) -> None:
        """Lower the chosen depth; the sizes of later recursions are no longer those of the choice."""
        self.depth = tokens.scatter(self.depth, torch.where(stops, recursion, tokens.gather(self.depth)))
        self.sizes = None

    def add_balance(self, router: TokenChoiceRouter, scores: Tensor, reaching: Tensor) -> None:
        """Balance loss and load statistics."""
        config, num_depths = router.config, router.num_recursions
        counts = reaching.sum(0)
        load = (counts - F.pad(counts[1:], (0, 1))).to(scores.dtype)
        self.totals["depth_choices"] = load
        if config.balancing == "loss" and self.context.mode == "train":
            # The counts have no gradient; it flows through the mean scores alone.
            frequency = num_depths * load / self.depth.numel() / router.balanced(load)
            self.add_loss("balance_loss", config.balance_coeff * (frequency * scores.mean(0)).sum())
