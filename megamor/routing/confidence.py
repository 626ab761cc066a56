"""Confidence exits: a session that stops tokens earlier than their router does, once the model is confident.

After recursion r a token's state s_r is the row with which it would leave the stage; s_0 is its row before the stage.
Its prediction p_r is the head's for the final norm of s_r, without the coda. The rules compare with their thresholds

    max_probability     max p_r
    entropy             -sum p_r log p_r
    kl                  sum p_r log (p_r / p_{r-1})
    acceleration        |(s_r - s_{r-1}) - (s_{r-1} - s_{r-2})| / |s_r|

A token that stops after recursion r gets the result that an upper bound of r (`DepthBounds.most`) would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megamor.config.exits import ExitRule
from megamor.errors import ConfigError
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import RoutingContext, RoutingSession

PROBES = "exit_probes"
"""The statistic whose numerator is how many rows the head has predicted for the rule."""
ROWS_AT_ONCE = 1024
"""Rows whose logits are in memory at the same time."""


class ConfidenceSession(RoutingSession):
    """The router's session `inner` under an exit rule; `readout` maps states [N, d] to logits [N, V].

    `exit_input` [T, d] is s_0. `exit_memory` [T, ...] is what the rule compares with: log p_{r-1} [T, V], or [T, 2, d]
    s_{r-1} and the step that led to it, or nothing [T, 0].
    """

    per_row = ("exit_input", "exit_memory")

    def __init__(
        self, rule: ExitRule, readout: Callable[[Tensor], Tensor], inner: RoutingSession, rows: Tensor, deepest: int
    ) -> None:
        super().__init__(inner.context)
        self.losses, self.ratios, self.totals = inner.losses, inner.ratios, inner.totals
        self.rule, self.readout, self.inner, self.deepest = rule, readout, inner, deepest
        self.exit_input = rows
        # Whether `mix` has decided already who takes the next recursion, and has told the router.
        self.decided = False
        # Differences of bf16 states would have hardly a digit.
        state = rows.to(torch.promote_types(rows.dtype, torch.float32))
        width = readout(rows[:0]).shape[1] if rule.name == "kl" else 0
        self.exit_memory = state.new_zeros(len(rows), width)
        if rule.name == "acceleration":
            self.exit_memory = torch.stack((state, torch.zeros_like(state)), 1)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """The router's plan without the tokens that are confident already."""
        plan = self.inner.route(recursion, rows, candidates)
        if recursion == 0 or self.decided:
            return plan
        x = rows if plan.indices is None else rows[plan.indices]
        tokens, kept = plan.tokens.where(~self.stops(recursion, x, plan.tokens))
        mix = Mix(**{name: w[kept] if isinstance(w, Tensor) else w for name, w in vars(plan.mix).items()})
        return RoutingPlan(tokens, kept if plan.indices is None else plan.indices[kept], mix)

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """The router's weights, after it has been told which tokens stop."""
        leaving = self.inner.leaving_mix(recursion, plan.tokens)
        self.decided = leaving is not None
        if leaving is not None and recursion + 1 < self.deepest:
            state = core_output
            if isinstance(leaving.from_core, Tensor):
                added = leaving.from_core.unsqueeze(-1) * core_output
                state = (plan.tokens.gather(self.exit_input) + added).to(core_output.dtype)
            self.inner.stop_after(recursion, plan.tokens, self.stops(recursion + 1, state, plan.tokens))
        mix = self.inner.mix(recursion, plan, core_output)
        if mix.emit is not None and leaving is None:
            raise ConfigError(
                f"exit = {self.rule.name}: {type(self.inner).__name__} emits a weighted sum and has no `leaving_mix`, "
                "which says how a token leaves early (docs/routers.md); add it, or leave --exit out"
            )
        return mix

    def stops(self, taken: int, states: Tensor, tokens: TokenSet) -> Tensor:
        """Whether each of `tokens`, in states [N, d] after `taken` recursions, stops there, [N]."""
        figure, threshold = self.figure(states, tokens), self.rule.threshold
        confident = figure >= threshold if self.rule.name == "max_probability" else figure <= threshold
        # What serving demands of a token's depth comes first.
        return ~self.bounded(taken, ~confident, tokens) & (taken >= self.rule.first)

    def figure(self, states: Tensor, tokens: TokenSet) -> Tensor:
        """What the rule compares with its threshold, [N]; remembers what the next recursion compares with."""
        before, name = tokens.gather(self.exit_memory), self.rule.name
        if name == "acceleration":
            now = states.to(before.dtype)
            step = now - before[:, 0]
            self.exit_memory = tokens.scatter(self.exit_memory, torch.stack((now, step), 1))
            return (step - before[:, 1]).square().sum(-1).sqrt() / now.square().sum(-1).sqrt()
        self.add_ratio(PROBES, torch.full((), len(states), device=states.device), 1.0)
        if name == "kl":
            logprobs = self.readout(states).log_softmax(-1)
            self.exit_memory = tokens.scatter(self.exit_memory, logprobs)
            return (logprobs.exp() * (logprobs - before)).sum(-1)
        parts = (self.readout(rows).log_softmax(-1) for rows in torch.split(states, ROWS_AT_ONCE))
        return torch.cat([p.amax(-1).exp() if name == "max_probability" else -(p.exp() * p).sum(-1) for p in parts])

    def finish(self, result: Tensor) -> Tensor:
        return self.inner.finish(result)

    def state(self) -> dict[str, Tensor]:
        """Its own and the router's."""
        return {**self.inner.state(), **super().state()}

    def regrouped(self, context: RoutingContext, state: Mapping[str, Tensor]) -> RoutingSession:
        session = super().regrouped(context, state)
        assert isinstance(session, ConfidenceSession)
        session.inner = self.inner.regrouped(context, state)
        return session
