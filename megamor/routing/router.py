"""The Router protocol.

The recursion stage calls `begin` once per forward pass, which returns a session, and the session's `route` once per
recursion. `route` sees the rows of its candidates (the tokens that passed the recursion before; at first, all tokens)
and returns a plan. Routers that decide after the core has run (halting) override `mix`. State that depends on the batch
is in the session; a router module holds parameters and buffers only.

A router declares whether its training-time selection is causal, and which rule it follows at inference. The rule is
data (`InferenceRule`): it follows from the configuration, which every checkpoint contains.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megamor.config import TargetConfig
from megamor.routing.control import DepthControl
from megamor.routing.plan import Mix, RoutingPlan, TokenSet

THRESHOLDS = ("inference_threshold", "threshold", "epsilon")
"""Settings with which routers compare probabilities at inference."""
Mode = Literal["train", "topk", "causal"]
"""train: training-time selection with losses; topk: the same selection without them; causal: the inference rule."""


@dataclass(frozen=True)
class InferenceRule:
    """How tokens are selected at inference. `score` names what is compared with `threshold` in each recursion."""

    name: str
    score: str = ""
    threshold: float | None = None


@dataclass
class Ratio:
    """A mean that can be summed over micro-batches and ranks: numerator and denominator, scalar tensors."""

    numerator: Tensor
    denominator: Tensor


class DepthBounds(NamedTuple):
    """Fewest and most recursions of each token, [T]; the router's rule decides in between.

    An upper bound below Nr is a budget (at least 1); equal bounds replay a known depth.
    """

    least: Tensor
    most: Tensor


@dataclass(frozen=True)
class RoutingContext:
    """What a router may know about the forward pass. `step` is the optimizer step (0-based), which drives warm-ups.

    The stream holds `batch` sequences of `seq_len` tokens or, if `whole` is given, as many of these as are no padding.
    `positions` [T] are the tokens' positions; None means that they count from 0 in each sequence.
    `bounds` apply in the causal mode, and so does an exit rule, of which `exits` tells the router. `seed` is the run's,
    and `first_sequence` the number of the first sequence in the batch of the step, which all ranks and micro-batches
    share. `text` [T] are the keys that `megamor.routing.random.text_keys` makes of the tokens, outside training for
    routers that ask for it (`Router.reads_text`). `stage` counts the recursion stages before this one. `begins` [T] are
    the rows at which the tokens' documents begin; None means that each sequence is one. In cached decoding (not in
    serving), `memory` is where routers keep what they need of earlier tokens.
    """

    batch: int
    seq_len: int
    mode: Mode = "train"
    step: int = 0
    positions: Tensor | None = None
    bounds: DepthBounds | None = None
    whole: TokenSet | None = None
    seed: int = 0
    first_sequence: int = 0
    text: Tensor | None = None
    stage: int = 0
    begins: Tensor | None = None
    memory: dict[nn.Module, Tensor] | None = None
    exits: bool = False

    @property
    def everything(self) -> TokenSet:
        """Every token of the stream."""
        return TokenSet.all(self.batch, self.seq_len) if self.whole is None else self.whole

    @property
    def fill(self) -> float:
        """Fraction of the positions that hold a token: what a statistic of this micro-batch weighs beside others."""
        return len(self.everything) / (self.batch * self.seq_len)

    def positions_of(self, device: torch.device) -> Tensor:
        """Positions of all tokens [T]."""
        if self.positions is not None:
            return self.positions
        everything = self.everything
        return everything.rank_of(everything, device)


class RoutingSession(ABC):
    """A router's state during one forward pass.

    `per_row` names the attributes with one entry for each row of the stream that the inference rule needs.
    """

    per_row: tuple[str, ...] = ()

    def __init__(self, context: RoutingContext) -> None:
        self.context = context
        self.losses: dict[str, Tensor] = {}
        self.ratios: dict[str, Ratio] = {}
        self.totals: dict[str, Tensor] = {}

    @abstractmethod
    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Select among `candidates`, whose hidden states are `rows` [N, d]. `recursion` counts from 0."""

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """Combination weights, once the core's output [N, d] for `plan.tokens` is known."""
        return plan.mix

    def finish(self, result: Tensor) -> Tensor:
        """The stage's result [T, d], to which a router may add gradients of its own."""
        return result

    def leaving_mix(self, recursion: int, tokens: TokenSet) -> Mix | None:
        """How `tokens` [N] leave after `recursion`, with y or x_in + gate·y, if `mix` must know of it; else None."""
        return None

    def stop_after(self, recursion: int, tokens: TokenSet, stops: Tensor) -> None:
        """Lower the upper bound of those of `tokens` for which `stops` [N] to `recursion` + 1, before its `mix`."""
        bounds = self.context.bounds
        if bounds is None:
            zeros = torch.zeros(len(self.context.everything), dtype=torch.int64, device=stops.device)
            bounds = DepthBounds(zeros, zeros + torch.iinfo(zeros.dtype).max)
        most = torch.where(stops, recursion + 1, tokens.gather(bounds.most))
        self.context = replace(self.context, bounds=bounds._replace(most=tokens.scatter(bounds.most, most)))

    def state(self) -> dict[str, Tensor]:
        """The `per_row` attributes, by name."""
        return {name: getattr(self, name) for name in self.per_row}

    def regrouped(self, context: RoutingContext, state: Mapping[str, Tensor]) -> RoutingSession:
        """A session for other rows: those of `context`, whose `per_row` attributes are `state`.

        Serving uses it to batch rows that began at different times. This works in the causal mode only, where the
        decision about a row does not depend on other rows.
        """
        # A shallow copy keeps what belongs to the router and replaces everything that belonged to the old rows.
        session = copy.copy(self)
        session.context, session.losses, session.ratios, session.totals = context, {}, {}, {}
        for name in self.per_row:
            setattr(session, name, state[name])
        return session

    def bounded(self, recursion: int, chosen: Tensor, tokens: TokenSet) -> Tensor:
        """`chosen` [N], the rule's selection among `tokens`, corrected by the bounds on their depth."""
        bounds = self.context.bounds
        if bounds is None:
            return chosen
        return (chosen | (tokens.gather(bounds.least) > recursion)) & (tokens.gather(bounds.most) > recursion)

    def take_all(self, recursion: int, candidates: TokenSet) -> tuple[TokenSet, Tensor | None]:
        """All candidates except those at their upper bound, and their indices (None for all)."""
        bounds = self.context.bounds
        if bounds is None:
            return candidates, None
        return candidates.where(candidates.gather(bounds.most) > recursion)

    def weights(self, tokens: TokenSet, dtype: torch.dtype) -> Tensor | None:
        """Weights [N] of `tokens` in a mean over them, in `dtype`; None if all have the same.

        Where sequences have different numbers of tokens, the mean is that of the sequences' own means, each weighted by
        the length of the sequence. It then doesn't depend on which sequences share a micro-batch.
        """
        if tokens.lengths is None:
            return None
        whole = self.context.everything
        lengths = whole.lengths if whole.lengths is not None else torch.full_like(tokens.lengths, whole.max_length)
        shares = lengths.double() / (len(whole) * tokens.lengths.clamp_min(1))
        return shares.to(dtype)[tokens.sequences(shares.device)]

    def add_margins(self, router: Router, recursion: int, margins: Tensor) -> None:
        """Let `margins` [N], those of steered scores, count in the scale of the shift. For routers with a target."""
        if router.control is not None and self.context.mode == "train":
            sizes = margins.detach().double().abs()
            if "margins" not in self.totals:
                self.totals["margins"] = sizes.new_zeros(router.num_recursions, 2)
            self.totals["margins"][recursion] = torch.stack((torch.ones_like(sizes).sum(), sizes.sum()))

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to a loss term: a mean over this micro-batch, with its coefficient applied.

        Micro-batches are weighted by their tokens.
        """
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def add_ratio(self, name: str, numerator: Tensor, denominator: Tensor | float) -> None:
        """Add to a statistic that is reported as the mean numerator / denominator."""
        top = numerator.detach().float()
        # Numbers are filled in on the device: `torch.tensor` would copy from the host, which waits.
        bottom = denominator.detach().float() if isinstance(denominator, Tensor) else torch.full_like(top, denominator)
        old = self.ratios.get(name)
        self.ratios[name] = Ratio(top, bottom) if old is None else Ratio(old.numerator + top, old.denominator + bottom)


class Router(nn.Module, ABC):
    """A router's parameters and rules. Subclasses define `begin`; see the module docstring.

    `num_recursions` is the most that a pass runs now, and `full_depth` the most that it can run. Where training has not
    reached that (`recursion.schedule`), a session behaves as that of a router with `num_recursions`.
    """

    causal_in_training: bool = False
    reads_text: bool = False
    """Whether the inference rule needs `RoutingContext.text`."""
    shift: Tensor
    """With a `control`: the knob that holds its target."""

    def __init__(self, num_recursions: int, control: DepthControl | None = None) -> None:
        super().__init__()
        self.num_recursions = self.full_depth = num_recursions
        self.control = control
        if control is not None:
            self.register_buffer("shift", torch.zeros(()))

    @property
    @abstractmethod
    def inference_rule(self) -> InferenceRule:
        """The rule that evaluation, generation and serving follow; a class attribute will do."""

    @abstractmethod
    def begin(self, rows: Tensor, context: RoutingContext) -> RoutingSession:
        """Start a forward pass over `rows` [T, d], the input of the recursion stage."""

    def reset(self) -> None:
        """Initialise parameters other than weights of `nn.Linear` and `nn.Embedding`."""

    def steered(self, scores: Tensor, by: Tensor | float = 1.0) -> Tensor:
        """`scores` plus the shift times `by`."""
        return scores if self.control is None else scores + self.shift * by

    @property
    def threshold_name(self) -> str | None:
        """What `at_threshold` changes: a setting, or the `shift` of scores that meet learned numbers or each other."""
        config = getattr(self, "config", None)
        named = [name for name in THRESHOLDS if hasattr(config, name)]
        return (named or ["shift"])[0] if isinstance(config, TargetConfig) else None

    @contextmanager
    def at_threshold(self, value: float) -> Iterator[None]:
        """Follow the inference rule with another threshold for a while: `value`, or `value` added to the shift."""
        name, config = self.threshold_name, getattr(self, "config", None)
        new: dict[str, Any] = {}
        if name not in ("shift", None):
            new = {"config": replace(config, **{name: value})}  # type: ignore[type-var]
        elif name is not None:
            own = torch.zeros((), device=next(self.parameters()).device) if self.control is None else self.shift
            new = {"control": self.control or DepthControl(0.0, self.full_depth), "shift": own + value}
        before = {key: getattr(self, key, None) for key in new}
        for key, item in new.items():
            setattr(self, key, item)
        try:
            yield
        finally:
            for key, item in before.items():
                setattr(self, key, item)

    @torch.no_grad()
    def update(self, totals: dict[str, Tensor]) -> None:
        """Adjust buffers, once per optimizer step, from sessions' `totals` summed over micro-batches and ranks."""
        # The target is one of full depth.
        if self.control is not None and "margins" in totals and self.num_recursions == self.full_depth:
            number, sizes = totals["margins"].unbind(1)
            scale = torch.where(number > 0, sizes / number, math.inf).min().clamp_min(1e-4)
            error = self.control.target - self.control.measured(totals)
            # Bounded, so that one batch of unusual text doesn't undo what many have settled.
            self.shift += self.control.move(error, scale).clamp(-0.3 * scale, 0.3 * scale).to(self.shift)
