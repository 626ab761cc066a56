"""Efficiency control: holds what the inference rule executes at a target, for every router with something to adjust.

The knob is a number added to the scores that decide (`Router.shift`, a buffer). After each optimizer step it moves in
proportion to the error of the step: the target minus what the inference rule would have executed on the step's tokens,
over all micro-batches and ranks. Scores have no natural scale, so the unit is the mean size of the margins by which
scores exceed what they are compared with or fall below it, in the recursion where it is smallest. Steps are long where
no token is near its decision, and short where many are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megamor.config import RouterConfig, ScoredConfig, TargetConfig

if TYPE_CHECKING:
    from megamor.routing.router import RoutingSession

RATE = 0.6
"""Change of a shift, in units of the margins, for a depth that is wrong by 1."""


@dataclass
class DepthControl:
    """A target and how it is measured: in recursions per token or, with `costs`, as a fraction of FLOPs.

    `costs` are FLOPs for each token and for each query-key pair of each recursion, all recursions together the whole.
    The stage, which knows them, sets them.
    """

    target: float
    num_recursions: int
    in_flops: bool = False
    costs: Sequence[tuple[float, float]] = ()

    @staticmethod
    def of(router: RouterConfig | ScoredConfig, num_recursions: int) -> DepthControl | None:
        """The control that a router's settings ask for; None without a target."""
        if isinstance(router, TargetConfig) and router.target_flops is not None:
            return DepthControl(router.target_flops, num_recursions, in_flops=True)
        if isinstance(router, TargetConfig) and router.target_depth is not None:
            return DepthControl(router.target_depth, num_recursions)
        return None

    def report(self, session: RoutingSession, work: Tensor) -> None:
        """Add `work` [Nr + 1, 2] to the totals of a session in training, and the error to its statistics."""
        session.totals["work"] = work
        error = self.measured(session.totals) - self.target
        session.add_ratio("target_error", error * session.context.fill, session.context.fill)

    def measured(self, totals: dict[str, Tensor], shares: Sequence[Tensor] | None = None) -> Tensor:
        """Depth or fraction of FLOPs at `shares` of the tokens in each recursion; by default the inference rule's.

        `totals["work"]` [Nr + 1, 2] are tokens and visible query-key pairs of each recursion and of one that all tokens
        take.
        """
        shares = rule_shares(totals) if shares is None else shares
        if not self.in_flops:
            return sum(shares, torch.zeros_like(shares[0]))
        # The rule's tokens are taken to see as many keys each as those that took the recursion in training.
        tokens, pairs = totals["work"].unbind(1)
        keys = pairs / tokens.clamp_min(1)
        spent = torch.stack([s * (a + b * k) for s, k, (a, b) in zip(shares, keys[:-1], self.costs, strict=True)])
        return spent.sum() / torch.stack([a + b * keys[-1] for a, b in self.costs]).sum()

    def move(self, error: Tensor, scale: Tensor) -> Tensor:
        """The change of a shift for `error` (of `measured`), in units of `scale`."""
        return RATE * (self.num_recursions if self.in_flops else 1) * scale * error


def rule_shares(totals: dict[str, Tensor]) -> list[Tensor]:
    """Fraction of the tokens that take each recursion under the inference rule.

    Where training follows another rule, `causal_choices` [Nr, 3] say of the tokens whose path has been the inference
    rule's: how many there are before each recursion, how many it sends into it, and how many of these decide again.
    """
    if "causal_choices" not in totals:
        return taken_shares(totals)
    shares, reach = [], torch.ones_like(totals["causal_choices"][0, 0])
    for deciding, taking, recursing in totals["causal_choices"].unbind():
        # Where no token has followed the rule, those that arrive are taken to stop after one more recursion.
        known = deciding > 0
        shares.append(reach * torch.where(known, taking / deciding, 1.0))
        reach = reach * torch.where(known, recursing / deciding, 0.0)
    return shares


def taken_shares(totals: dict[str, Tensor]) -> list[Tensor]:
    """Fraction of the tokens that took each recursion in training."""
    tokens = totals["work"][:, 0]
    return [*(tokens[:-1] / tokens[-1])]
