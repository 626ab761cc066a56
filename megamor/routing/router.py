"""The Router protocol.

A router is asked once per forward pass to `begin` a session, and the session once per recursion to `route`: it sees the
rows of its candidates (the tokens that passed the recursion before; everything at first) and answers with a plan.
Routers that decide after the core has run (halting) override `mix`. Whatever depends on the batch lives in the session,
so that a router module holds only parameters and buffers.

A router says of itself whether its training-time selection is causal, and which rule it follows at inference; the rule
is data (`InferenceRule`) and travels in the checkpoint's config.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megamor.routing.plan import Mix, RoutingPlan, TokenSet

Mode = Literal["train", "topk", "causal"]
"""train: training-time selection with losses; topk: the same selection for evaluation; causal: the inference rule."""


@dataclass(frozen=True)
class InferenceRule:
    """How tokens are selected at inference. `score` names what is compared with `threshold`, per recursion."""

    name: str
    score: str = ""
    threshold: float | None = None


@dataclass
class Ratio:
    """A mean that can be summed over micro-batches and ranks: numerator and denominator, scalar tensors."""

    numerator: Tensor
    denominator: Tensor


class DepthBounds(NamedTuple):
    """Least and most recursions of each token, [B·S]; the router's rule decides in between.

    A bound below Nr is a budget (at least 1); equal bounds replay a depth that is known.
    """

    least: Tensor
    most: Tensor


@dataclass(frozen=True)
class RoutingContext:
    """What a router may know of the forward pass: mode and optimizer step (0-based; drives warm-ups).

    `positions` [B·S] are the tokens' positions in their documents; None means that they count from 0 in each sequence.
    `bounds` are for the causal mode.
    """

    batch: int
    seq_len: int
    mode: Mode = "train"
    step: int = 0
    positions: Tensor | None = None
    bounds: DepthBounds | None = None

    def positions_of(self, device: torch.device) -> Tensor:
        """Positions of all tokens [B·S]."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.seq_len, device=device).repeat(self.batch)


class RoutingSession(ABC):
    """A router at work on one batch.

    `per_row` names the attributes that hold one entry for each row of the stream, as the inference rule needs them.
    """

    per_row: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: RoutingContext) -> None:
        self.context = context
        self.losses: dict[str, Tensor] = {}
        self.ratios: dict[str, Ratio] = {}
        self.totals: dict[str, Tensor] = {}

    @abstractmethod
    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Select among `candidates`, whose current states are `rows` [N, d]. `recursion` counts from 0."""

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """Combination weights, once the core's output [N, d] for `plan.tokens` is known."""
        return plan.mix

    def regrouped(self, context: RoutingContext, state: Mapping[str, Tensor]) -> RoutingSession:
        """The same router between two recursions of other rows: those of `context`, whose `per_row` is `state`.

        For the causal mode, where rows know nothing of each other: serving brings together rows that began at
        different times.
        """
        session = copy.copy(self)
        session.context, session.losses, session.ratios, session.totals = context, {}, {}, {}
        for name in self.per_row:
            setattr(session, name, state[name])
        return session

    def bounded(self, recursion: int, chosen: Tensor, tokens: TokenSet) -> Tensor:
        """Which of `tokens` take `recursion`, [N], where the rule has `chosen` some and the context bounds depths."""
        bounds = self.context.bounds
        if bounds is None:
            return chosen
        return (chosen | (tokens.gather(bounds.least) > recursion)) & (tokens.gather(bounds.most) > recursion)

    def take_all(self, recursion: int, candidates: TokenSet) -> tuple[TokenSet, Tensor | None]:
        """All candidates (and None for their indices), but for those at their bound."""
        bounds = self.context.bounds
        if bounds is None:
            return candidates, None
        return candidates.where(candidates.gather(bounds.most) > recursion)

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to a loss term (mean over this micro-batch, coefficient already applied)."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def add_ratio(self, name: str, numerator: Tensor, denominator: Tensor | float) -> None:
        """Add to a statistic that is reported as a mean."""
        if isinstance(denominator, Tensor):
            bottom = denominator.detach().float()
        else:
            bottom = torch.full((), denominator, dtype=torch.float32, device=numerator.device)
        top = numerator.detach().float()
        old = self.ratios.get(name)
        self.ratios[name] = Ratio(top, bottom) if old is None else Ratio(old.numerator + top, old.denominator + bottom)


class Router(nn.Module, ABC):
    """Parameters and rules of a router. Subclasses define `begin`; see the module docstring."""

    causal_in_training: bool = False

    def __init__(self, num_recursions: int) -> None:
        super().__init__()
        self.num_recursions = num_recursions

    @property
    @abstractmethod
    def inference_rule(self) -> InferenceRule:
        """The rule that evaluation, generation and serving follow."""

    @abstractmethod
    def begin(self, rows: Tensor, context: RoutingContext) -> RoutingSession:
        """Start a forward pass over `rows` [B·S, d], the input of the recursion stage."""

    def reset(self) -> None:
        """Initialise parameters that are not matrices."""

    def update(self, totals: dict[str, Tensor]) -> None:
        """Adjust buffers once per optimizer step, from the session's `totals` summed over micro-batches and ranks."""
