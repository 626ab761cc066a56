"""FLOPs that a model executes, from its configuration and from what routing selected.

One multiply-add counts as two. Attention counts only pairs of a query and a key that is not after it (the causal half).
Training costs three forward passes. Recomputation under activation checkpointing is reported separately, as MFU leaves
it out and HFU includes it. docs/numbers.md compares this with the paper's accounting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import fmean

from megamor.config import (
    Config,
    DepthStep,
    ExpertChoiceConfig,
    FixedDepthConfig,
    HaltingConfig,
    ModelConfig,
    ScoredConfig,
    TokenChoiceConfig,
    TrainConfig,
)
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.config.depth import depth_steps
from megamor.config.derive import Consumed, router_head_parameters, total_steps
from megamor.model.sharing import layer_stack
from megamor.routing.scored import default_capacity

Work = Sequence[tuple[float, float]]
"""Per recursion: tokens that the core processed, and their visible query-key pairs (`StageOutput.work`)."""


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of the blocks' projections, attention, routers and head.

    `block_ends` and `recursion_ends` are the last product of each block and of each recursion's last block. The
    backward pass does not need their results.
    """

    projections: float
    attention: float
    routers: float
    head: float
    block_ends: float
    recursion_ends: float
    backpropagated: Flops | None = None
    """What the backward pass covers; None: everything."""

    @property
    def blocks(self) -> float:
        """All blocks, each counted as often as it ran."""
        return self.projections + self.attention

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.blocks + self.routers + self.head

    @property
    def training(self) -> float:
        """Forward and backward (which costs twice the forward)."""
        return self.forward + 2 * (self.backpropagated or self).forward

    def recomputed(self, train: TrainConfig) -> float:
        """What activation checkpointing recomputes in the backward pass."""
        # Recomputation stops once it has what the backward pass needs, so the last product is left out. A compiled
        # block always runs to its end.
        policy = train.activation_checkpointing
        if policy == "none":
            return 0.0
        if self.backpropagated is not None:
            return self.backpropagated.recomputed(train)
        ends = self.recursion_ends if policy == "recursion" else self.block_ends
        ends = 0.0 if train.compile else ends
        kept = train.selective_ops if policy == "selective" else ()
        return (0.0 if "mm" in kept else self.projections - ends) + (0.0 if "sdpa" in kept else self.attention)


def executed_flops(
    config: Config,
    num_sequences: float,
    work: Work,
    seq_len: int | None = None,
    pairs: float | None = None,
    tokens: float | None = None,
    recursions: int | None = None,
) -> Flops:
    """FLOPs of `num_sequences` sequences of `seq_len` (default `data.seq_len`) tokens, given each recursion's work.

    `pairs` are those of a block that sees every token (`ModelOutput.pairs`); by default each sequence is one document.
    `tokens` are those of all sequences where some are padded, since padding isn't computed. `recursions` is the most
    that the pass ran, where `work` has more (with zeros).
    """
    model, layers = config.model, layer_stack(config)
    seq_len = seq_len or config.data.seq_len
    tokens = num_sequences * seq_len if tokens is None else tokens
    num_unshared = layers.num_prelude + layers.num_coda
    projections = num_unshared * tokens * projection_flops(model)
    if pairs is None:
        pairs = num_sequences * seq_len * (seq_len + 1) / 2
    attention = num_unshared * attention_flops(model, pairs)
    ends = num_unshared * tokens * end_flops(model)
    # A router scores the candidates of a recursion, which are the tokens selected in the recursion before.
    routers, block_ends, recursion_ends, candidates = 0.0, ends, ends, tokens
    work = work[:recursions]
    for recursion, (selected, selected_pairs) in enumerate(work):
        fresh = recursion == 0 or config.recursion.kv_policy != "share_first"
        projections += layers.num_core * selected * projection_flops(model, fresh, config.recursion.lora_rank)
        attention += layers.num_core * attention_flops(model, selected_pairs)
        block_ends += layers.num_core * selected * end_flops(model, config.recursion.lora_rank)
        recursion_ends += selected * end_flops(model, config.recursion.lora_rank)
        routers += router_flops(config, recursion, candidates, selected)
        candidates = selected
    head = 2 * tokens * model.dim * model.vocab_size
    flops = Flops(projections, attention, routers, head, block_ends, recursion_ends)
    truncated = len(work) - (config.recursion.backprop_recursions or len(work))
    if truncated <= 0:
        return flops
    # Truncated backpropagation is for routers without scores, so `work` is all that the first recursions cost.
    everywhere = replace(config, recursion=replace(config.recursion, backprop_recursions=None))
    tracked = [(0.0, 0.0)] * truncated + [*work[truncated:]]
    return replace(flops, backpropagated=executed_flops(everywhere, num_sequences, tracked, seq_len, pairs, tokens))


def projection_flops(model: ModelConfig, projects_kv: bool = True, lora_rank: int = 0) -> float:
    """Projections of one block and their low-rank updates, for one token."""
    shapes = [(model.dim, model.dim)] * 2 + [(model.dim, model.ffn_dim)] * 3
    if projects_kv:
        shapes += [(model.dim, model.num_kv_heads * model.head_dim)] * 2
    return 2.0 * sum(inner * outer + lora_rank * (inner + outer) for inner, outer in shapes)


def attention_flops(model: ModelConfig, pairs: float) -> float:
    """Scores and weighted values of one block's `pairs` of a query and a key."""
    return 4 * model.dim * pairs


def end_flops(model: ModelConfig, lora_rank: int = 0) -> float:
    """The last product of a block, for one token: down projection, or the second factor of its low-rank update."""
    return 2.0 * model.dim * (lora_rank or model.ffn_dim)


def router_flops(config: Config, recursion: int, candidates: float, selected: float) -> float:
    """A router's scores for one recursion: of its candidates or, for halting, of the tokens that took it."""
    router, heads = config.router, 1
    if isinstance(router, TokenChoiceConfig) and recursion > 0:
        heads = 0
    elif isinstance(router, ExpertChoiceConfig) and router.sampling == "aux_router":
        heads = 2
    decided = selected if isinstance(router, HaltingConfig) else candidates
    return 2 * heads * decided * router_head_parameters(config)


def nominal_work(config: Config, num_sequences: float, recursions: int | None = None) -> list[tuple[float, float]]:
    """Work at the configured capacities; routers without one are assumed to spread tokens evenly over the depths.

    `recursions` is the most that run; None: as many as the schedule reaches.
    """
    num_recursions, seq_len = config.recursion.num_recursions, config.data.seq_len
    if num_recursions == 1:
        return []
    fractions = default_capacity(num_recursions)
    if isinstance(config.router, FixedDepthConfig):
        fractions = (1.0,) * (config.router.depth or num_recursions)
    elif isinstance(config.router, HaltingConfig) and config.router.mode == "soft":
        fractions = (1.0,) * num_recursions
    elif isinstance(config.router, ScoredConfig):
        fractions = config.router.capacity or fractions
    work = []
    most = recursions or max(item.recursions for item in depth_steps(config.recursion))
    for recursion, fraction in enumerate(fractions[:most]):
        length = max(1, int(fraction * seq_len))
        keys = length if recursion == 0 or config.recursion.kv_policy == "recursion_wise" else seq_len
        work.append((num_sequences * length, num_sequences * length * (keys + 1) / 2))
    return work


def nominal_flops(config: Config, num_sequences: float = 1.0, recursions: int | None = None) -> Flops:
    """FLOPs at the configured capacities; `recursions` as for `nominal_work`."""
    return executed_flops(config, num_sequences, nominal_work(config, num_sequences, recursions))


def expected_steps(config: Config, done: Consumed | None = None) -> int:
    """Steps of a run that has `done` so much; with `train.max_flops` an estimate at the configured capacities."""
    done = done or Consumed()
    steps = total_steps(config, done)
    if steps is not None:
        return steps

    def cost(depths: Sequence[int], shape: BatchShape) -> float:
        lengths = replace(config, data=replace(config.data, seq_len=shape.seq_len))
        return fmean(nominal_flops(lengths, shape.global_batch_size, depth).training for depth in depths)

    budget, recursion = config.train.max_flops, config.recursion
    assert budget is not None, "validate() accepts exactly one limit"
    step, spent, batches = done.step, done.flops, BatchSchedule.of(config)
    # Each depth of the schedule has a share of the FLOPs.
    for item, after in pairwise([*depth_steps(recursion), DepthStep(1.0, 1)]):
        end = after.at * budget
        first = recursion.schedule_start if recursion.schedule == "sampled" else item.recursions
        if spent < end:
            step = batches.steps_for(end - spent, step, partial(cost, range(first, item.recursions + 1)))
            spent = end
    return step
