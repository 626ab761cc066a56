"""Confidence exits: a session that stops tokens earlier than their router does, once the model is confident.

After recursion r a token's state s_r is the row with which it would leave the stage; s_0 is its row before the stage.
Its prediction p_r is the head's for the final norm of s_r: the coda is left out. A token stops where

    max_probability     max p_r >= threshold
    entropy             -sum p_r log p_r <= threshold, in nats
    kl                  sum p_r log (p_r / p_{r-1}) <= threshold, in nats; from r = 2
    acceleration        |(s_r - s_{r-1}) - (s_{r-1} - s_{r-2})| / |s_r| <= threshold; from r = 2

so each decision is about one row. A token that stops after recursion r gets the result that it would have if its upper
bound (`DepthBounds.most`) had been r. Most routers leave the stream valid after each recursion; those that must know
which recursion is a token's last before its output is combined say so (`RoutingSession.leaving_mix`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

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
        memory = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if rule.name == "acceleration":
            self.exit_memory = torch.stack((memory, torch.zeros_like(memory)), dim=1)
        else:
            self.exit_memory = memory.new_zeros(len(rows), readout(rows[:0]).shape[1] if rule.name == "kl" else 0)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """The router's plan without the tokens that are confident already."""
        plan = self.inner.route(recursion, rows, candidates)
        if recursion == 0 or self.decided:
            return plan
        x = rows if plan.indices is None else rows.index_select(0, plan.indices)
        tokens, kept = plan.tokens.where(~self.stops(recursion, x, plan.tokens))
        weights = {field.name: getattr(plan.mix, field.name) for field in fields(Mix)}
        mix = Mix(**{name: w.index_select(0, kept) if isinstance(w, Tensor) else w for name, w in weights.items()})
        return RoutingPlan(tokens, kept if plan.indices is None else plan.indices.index_select(0, kept), mix)

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """The router's weights, after it has been told which tokens stop."""
        leaving = self.inner.leaving_mix(recursion, plan.tokens)
        self.decided = leaving is not None
        if leaving is not None and recursion + 1 < self.deepest:
            state = core_output
            if leaving.from_input is not None:
                assert isinstance(leaving.from_core, Tensor)
                state = plan.tokens.gather(self.exit_input) + leaving.from_core.unsqueeze(-1) * core_output
            state = state.to(core_output.dtype)
            self.inner.stop_after(recursion, plan.tokens, self.stops(recursion + 1, state, plan.tokens))
        mix = self.inner.mix(recursion, plan, core_output)
        if mix.emit is not None and leaving is None:
            raise ConfigError(
                f"exit = {self.rule.name}: the router emits a weighted sum, and {type(self.inner).__name__} does not "
                "say how a token leaves early; define its `leaving_mix` (docs/routers.md), or leave --exit out"
            )
        return mix

    def stops(self, taken: int, states: Tensor, tokens: TokenSet) -> Tensor:
        """Whether each of `tokens`, in states [N, d] after `taken` recursions, stops there, [N]."""
        figure = self.figure(states, tokens)
        if self.rule.compares and taken < 2:
            return torch.zeros_like(figure, dtype=torch.bool)
        confident = figure <= self.rule.threshold
        if self.rule.name == "max_probability":
            confident = figure >= self.rule.threshold
        # What serving demands of a token's depth comes first.
        return ~self.bounded(taken, ~confident, tokens)

    def figure(self, states: Tensor, tokens: TokenSet) -> Tensor:
        """What the rule compares with its threshold, [N]."""
        before = tokens.gather(self.exit_memory)
        if self.rule.name == "acceleration":
            now = states.to(before.dtype)
            step = now - before[:, 0]
            self.exit_memory = tokens.scatter(self.exit_memory, torch.stack((now, step), dim=1))
            size: Callable[..., Tensor] = torch.linalg.vector_norm
            return size(step - before[:, 1], dim=-1) / size(now, dim=-1)
        self.add_ratio(PROBES, torch.full((), len(states), device=states.device), 1.0)
        figures, found = [], []
        for rows, old in zip(*(torch.split(rows, ROWS_AT_ONCE) for rows in (states, before)), strict=True):
            logprobs = self.readout(rows).log_softmax(-1)
            if self.rule.name == "max_probability":
                figures.append(logprobs.amax(-1).exp())
                continue
            minus = old if self.rule.name == "kl" else 0.0
            figures.append((logprobs.exp() * (logprobs - minus)).sum(-1))
            found.append(logprobs)
        if self.rule.name == "kl":
            self.exit_memory = tokens.scatter(self.exit_memory, torch.cat(found))
        figure = torch.cat(figures)
        return -figure if self.rule.name == "entropy" else figure

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
