"""Settings of the routers, a dataclass per `router.kind`. docs/routers.md explains what each of them does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megamor.config.constraints import (
    BelowOne,
    BetweenZeroAndOne,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveFraction,
    PositiveInt,
)

RouterHead = Literal["linear", "mlp", "wide_mlp"]
Gating = Literal["weighted", "additive"]


@dataclass(frozen=True)
class FixedDepthConfig:
    """No router: every token takes the same number of recursions."""

    kind: Literal["fixed"] = "fixed"
    depth: PositiveInt | None = None
    """Recursions per token; null runs all of them."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Settings shared by the routers whose mean depth can be held at a target, under the inference rule."""

    target_depth: Positive | None = None
    """Mean number of recursions per token that training steers the inference rule to; null: whatever it learns."""
    target_flops: PositiveFraction | None = None
    """Instead of `target_depth`: FLOPs that the stage's blocks execute, as a fraction of those at full depth."""

    def depth(self, num_recursions: int) -> float | None:
        """The depth that the target amounts to if every recursion costs the same; None without a target."""
        return self.target_depth if self.target_flops is None else self.target_flops * num_recursions


@dataclass(frozen=True)
class ScoredConfig:
    """Settings shared by the routers that score the tokens anew at each recursion (paper section 2.2.1)."""

    kind: str
    head: RouterHead = "linear"
    """Network that scores a token. `mlp` and `wide_mlp` have a hidden layer 2 and 4 times as wide as the model."""
    activation: Literal["sigmoid", "tanh", "none"] = "sigmoid"
    """Function that turns a score into a gate."""
    alpha: Positive = 0.1
    """Factor on the gate."""
    temperature: Positive = 1.0
    """The head's input is divided by this."""
    gating: Gating = "weighted"
    """`weighted` multiplies the core's output by the gate before adding it to the stream; `additive` does not."""
    z_coeff: NonNegative = 0.0
    """Weight of the loss that keeps scores small (mean squared score)."""


@dataclass(frozen=True)
class CapacityConfig(ScoredConfig):
    """Settings shared by the scored routers that give each recursion a capacity."""

    capacity: tuple[PositiveFraction, ...] | None = None
    """Fraction of the sequence that each recursion processes, never rising; null means (Nr - r) / Nr at recursion r,
    raised to the power that meets the target if there is one."""


@dataclass(frozen=True)
class ExpertChoiceConfig(TargetConfig, CapacityConfig):
    """Each recursion takes the top-k of the tokens that the recursion before it processed (paper section 2.2.1)."""

    kind: Literal["expert_choice"] = "expert_choice"
    capacity_warmup_steps: NonNegativeInt = 0
    """Steps over which the capacities fall from 1 to their final values."""
    sampling: Literal["aux_loss", "aux_router"] = "aux_loss"
    """What learns to predict the top-k at inference: the scores themselves, or heads of their own (`aux_router`)."""
    aux_coeff: NonNegative = 0.001
    """Weight of the loss that trains that prediction (binary cross-entropy)."""
    inference_threshold: BetweenZeroAndOne = 0.5
    """At inference a token continues if the sigmoid of its score is at least this."""


@dataclass(frozen=True)
class TokenChoiceConfig(TargetConfig):
    """Each token chooses its depth once, before the first recursion (paper section 2.2.1)."""

    kind: Literal["token_choice"] = "token_choice"
    head: RouterHead = "linear"
    """Network that scores the depths. `mlp` and `wide_mlp` have a hidden layer 2 and 4 times as wide as the model."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns scores into gates."""
    alpha: Positive = 1.0
    """Factor on the gate."""
    temperature: Positive = 1.0
    """The head's input is divided by this."""
    gating: Gating = "weighted"
    """`weighted` multiplies the core's output by the gate before adding it to the stream; `additive` does not."""
    balancing: Literal["loss", "loss_free", "none"] = "loss"
    """How the depths are kept equally used: by a loss, by a bias on the choice (`loss_free`), or not at all."""
    balance_coeff: NonNegative = 0.1
    """Weight of the balancing loss; used by `balancing: loss`."""
    bias_update_rate: NonNegative = 0.001
    """Change of a depth's bias per step; used by `balancing: loss_free`."""
    balance_warmup_steps: NonNegativeInt = 0
    """Steps at the start of the run in which every token takes all recursions."""
    z_coeff: NonNegative = 0.0
    """Weight of the loss that keeps scores small (mean squared score)."""


@dataclass(frozen=True)
class EmaThresholdConfig(TargetConfig, CapacityConfig):
    """Expert-choice with a threshold instead of a top-k, so that training is causal too (after arXiv 2603.11535).

    The threshold of a recursion is an exponential moving average of the score above which its capacity lies. Capacities
    therefore hold on average only.
    """

    kind: Literal["ema_threshold"] = "ema_threshold"
    ema_decay: BelowOne = 0.95
    """Decay of the moving average per step."""


@dataclass(frozen=True)
class LearnedThresholdConfig(TargetConfig, ScoredConfig):
    """A token continues while its score is above the recursion's threshold, which is trained with the model.

    The gate is that of the score minus the threshold. With `gating: additive` it is 1 in value, and its gradient is
    that of the `weighted` gate (straight-through).
    """

    kind: Literal["learned_threshold"] = "learned_threshold"
    z_coeff: NonNegative = 0.001
    """Weight of the mean squared margin. It brings tokens back to thresholds that they have stayed below."""
    depth_coeff: NonNegative = 0.001
    """Weight of the loss on the soft depth, without which tokens tend to full depth; not used with a target."""


@dataclass(frozen=True)
class RandomConfig(CapacityConfig):
    """A control: tokens are selected at random, with the gates that expert-choice gives to the tokens it selects."""

    kind: Literal["random"] = "random"
    gates: Literal["open", "learned"] = "open"
    """`open`: the gate is `alpha`, as expert-choice's become. `learned`: by scores, as in the paper's ablation; nothing
    holds them open, and they close. `head`, `activation`, `temperature` and `z_coeff` matter for learned gates only."""


@dataclass(frozen=True)
class SkipForwardRecurseConfig(TargetConfig):
    """Before each recursion a token skips it and leaves, takes it and leaves, or takes it and decides again.

    Training samples the decision by straight-through Gumbel-softmax (arXiv 1611.01144); inference takes the likeliest.
    """

    kind: Literal["skip_forward_recurse"] = "skip_forward_recurse"
    hidden: PositiveInt = 128
    """Width of the hidden layer of the network that decides, or of its attention."""
    gate: Literal["mlp", "attention"] = "mlp"
    """Network that decides: an MLP on the token's state, or attention of that state to the token's earlier ones."""
    routers: Literal["shared", "per_recursion"] = "shared"
    """One network for all recursions, or one for each."""
    granularity: Literal["token", "sequence"] = "token"
    """What the network sees: the token's state, or the mean of the stage's input over the document up to the token."""
    recursion_input: bool = False
    """Add a learned vector for the recursion to what the network sees."""
    inference_threshold: BetweenZeroAndOne | None = None
    """At inference a token recurses if its probability is at least this, else takes the likelier of the other two
    actions; null: the likeliest of all three."""
    recursion_rate: PositiveFraction | None = None
    """Fraction of the decisions, such as 0.3, that should be to recurse; a target for the loss instead of the depth."""
    depth_coeff: NonNegative = 0.01
    """Weight of the loss on the expected depth; with a target, on its squared distance from it."""
    temperature_start: Positive = 1.0
    """Gumbel-softmax temperature at the first step."""
    temperature_end: Positive = 0.5
    """Gumbel-softmax temperature after `temperature_steps`."""
    temperature_steps: PositiveInt = 1000
    """Steps over which the temperature changes linearly."""


@dataclass(frozen=True)
class HaltingConfig(TargetConfig):
    """Adaptive computation time (arXiv 1603.08983): the output is the mean of the recursions' outputs, weighted by
    halting probabilities."""

    kind: Literal["act"] = "act"
    mode: Literal["soft", "hard"] = "hard"
    """`soft` runs every token through all recursions; in `hard` mode a halted token leaves, which saves its compute."""
    epsilon: BelowOne = 0.01
    """A token halts once its halting probabilities add up to 1 - epsilon."""
    ponder_coeff: NonNegative = 0.001
    """Weight of the ponder cost (number of updates plus remainder); not used with a target."""


@dataclass(frozen=True)
class PonderNetConfig(HaltingConfig):
    """Halting with a prior instead of a cost (PonderNet, arXiv 2107.05407): the distribution of each token's halting
    step is drawn to a geometric one. The output is the mean of the recursions' outputs under that distribution."""

    kind: Literal["pondernet"] = "pondernet"  # type: ignore[assignment]
    epsilon: BelowOne = 0.5
    """A token halts once it would have halted with probability 1 - epsilon; 0.5 is the median of its distribution."""
    ponder_coeff: NonNegative = 0.1
    """Weight of the KL divergence from the prior."""
    prior: BetweenZeroAndOne = 0.3
    """Probability of halting after each recursion under the prior, which is truncated at Nr and renormalised."""


@dataclass(frozen=True)
class MonotoneConfig(TargetConfig):
    """A token continues while the product of its gates, one per recursion, is above a threshold (after arXiv
    2603.01914). The product can only fall, and is the weight of the recursions' results."""

    kind: Literal["monotone"] = "monotone"
    threshold: BetweenZeroAndOne = 0.5
    """The product of gates at which a token leaves."""
    depth_coeff: NonNegative = 0.01
    """Weight of the loss on the soft depth, the sum of the mean products of gates. With a target, the loss is the
    squared distance of the soft depth from it instead."""


@dataclass(frozen=True)
class CustomRouterConfig:
    """A router of your own; see [Routers](routers.md#bring-your-own-router)."""

    target: str
    """`package.module:Class`, called with (options, dim, num_recursions)."""
    kind: Literal["custom"] = "custom"
    options: Mapping[str, float] = field(default_factory=dict)
    """Numbers passed to the class."""


RouterConfig = (
    FixedDepthConfig
    | ExpertChoiceConfig
    | TokenChoiceConfig
    | EmaThresholdConfig
    | LearnedThresholdConfig
    | RandomConfig
    | SkipForwardRecurseConfig
    | HaltingConfig
    | MonotoneConfig
    | PonderNetConfig
    | CustomRouterConfig
)
