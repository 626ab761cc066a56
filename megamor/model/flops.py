"""FLOPs that a model executes, from its configuration and from what routing selected.

One multiply-add counts as two. Attention counts only pairs of a query and a key that is not after it (the causal half);
under multi-scale attention a block that is seen as a mean is one key. Training costs three forward passes.
Recomputation under activation checkpointing is reported separately, as MFU leaves it out and HFU includes it.
docs/numbers.md compares this with the paper's accounting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from itertools import islice, pairwise
from statistics import fmean

import numpy as np

from megamor.config import (
    Config,
    DepthStep,
    ExpertChoiceConfig,
    FixedDepthConfig,
    HaltingConfig,
    ModelConfig,
    TokenChoiceConfig,
    TrainConfig,
)
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.config.depth import depth_steps
from megamor.config.derive import Consumed, router_head_parameters, total_steps
from megamor.config.segments import Segment, segments, stages
from megamor.routing.scored import capacity_of

Work = Sequence[tuple[float, float]]
"""Per recursion of each stage: tokens that it processed, and their visible query-key pairs (`StageOutput.work`)."""


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of the blocks' projections, attention, routers and head.

    `block_ends` and `recursion_ends` are the last product of each block and of each recursion's last block. The
    backward pass does not need their results. `untracked_projections` and `untracked_attention` are those of recursions
    that truncated backpropagation leaves out; the ends of these don't count.
    """

    projections: float
    attention: float
    routers: float
    head: float
    block_ends: float
    recursion_ends: float
    untracked_projections: float = 0.0
    untracked_attention: float = 0.0

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
        return 3 * self.forward - 2 * (self.untracked_projections + self.untracked_attention)

    def recomputed(self, train: TrainConfig) -> float:
        """What activation checkpointing recomputes in the backward pass."""
        # Recomputation stops once it has what the backward pass needs, so the last product is left out. A compiled
        # block always runs to its end.
        policy = train.activation_checkpointing
        if policy == "none":
            return 0.0
        ends = self.recursion_ends if policy == "recursion" else self.block_ends
        ends = 0.0 if train.compile else ends
        kept = train.selective_ops if policy == "selective" else ()
        projections = self.projections - self.untracked_projections - ends
        attention = self.attention - self.untracked_attention
        return (0.0 if "mm" in kept else projections) + (0.0 if "sdpa" in kept else attention)


def executed_flops(
    config: Config,
    num_sequences: float,
    work: Work,
    seq_len: int | None = None,
    pairs: float | None = None,
    tokens: float | None = None,
    probes: float = 0.0,
) -> Flops:
    """FLOPs of `num_sequences` sequences of `seq_len` (default `data.seq_len`) tokens, given each recursion's work.

    `pairs` are those of an unshared block (`ModelOutput.pairs`); by default each sequence is one document.
    `tokens` are those of all sequences where some are padded, since padding isn't computed. `probes` are rows that the
    head predicted for an exit rule (`ModelOutput.probes`).
    """
    model, found = config.model, segments(config)
    seq_len = seq_len or config.data.seq_len
    tokens = num_sequences * seq_len if tokens is None else tokens
    num_unshared = sum(segment.num_blocks for segment in found if not segment.schedule)
    projections = num_unshared * tokens * projection_flops(model)
    if pairs is None:
        pairs = num_sequences * dense_pairs(model, seq_len, unshared_sliding(config))
    attention = num_unshared * attention_flops(model, pairs)
    ends = num_unshared * tokens * end_flops(model)
    head = 2 * (tokens + probes) * model.dim * model.vocab_size
    total = Flops(projections, attention, 0.0, head, ends, ends)
    remaining = iter(work)
    for stage in stages(config):
        own = stage_flops(stage, tokens, [*islice(remaining, len(stage.schedule))])
        total = Flops(*(ours + theirs for ours, theirs in zip(astuple(total), astuple(own), strict=True)))
    return total


def stage_flops(stage: Segment, tokens: float, work: Work) -> Flops:
    """FLOPs of a recursion stage that `tokens` enter, given its recursions' work."""
    config, num_blocks = stage.config, stage.num_blocks
    model, lora_rank = config.model, config.recursion.lora_rank
    projections = attention = routers = block_ends = recursion_ends = 0.0
    untracked = untracked_recursions(config, work)
    # A router scores the candidates of a recursion, which are the tokens selected in the recursion before.
    candidates = tokens
    first_projections = first_attention = 0.0
    for recursion, (selected, pairs) in enumerate(work):
        fresh = recursion == 0 or config.recursion.kv_policy != "share_first"
        projections += num_blocks * selected * projection_flops(model, fresh, lora_rank)
        attention += num_blocks * attention_flops(model, pairs)
        if recursion < untracked:
            first_projections, first_attention = projections, attention
        else:
            block_ends += num_blocks * selected * end_flops(model, lora_rank)
            recursion_ends += selected * end_flops(model, lora_rank)
        routers += router_flops(config, recursion, candidates, selected)
        candidates = selected
    return Flops(projections, attention, routers, 0.0, block_ends, recursion_ends, first_projections, first_attention)


def untracked_recursions(config: Config, work: Work) -> int:
    """How many of a stage's first recursions `recursion.backprop_recursions` leaves without gradients."""
    ran = sum(selected > 0 for selected, _ in work)
    return max(0, ran - (config.recursion.backprop_recursions or ran))


def projection_flops(model: ModelConfig, projects_kv: bool = True, lora_rank: int = 0) -> float:
    """Projections of one block and their low-rank updates, for one token."""
    shapes = [(model.dim, model.num_heads * model.head_dim)] * 2 + [(model.dim, model.ffn_dim)] * 3
    if projects_kv:
        shapes += [(model.dim, model.num_kv_heads * model.head_dim)] * 2
    return 2.0 * sum(inner * outer + lora_rank * (inner + outer) for inner, outer in shapes)


def unshared_sliding(config: Config) -> float:
    """Fraction of the unshared blocks that have a sliding window."""
    found = [segment for segment in segments(config) if not segment.schedule]
    return sum(len(segment.sliding) for segment in found) / max(1, sum(segment.num_blocks for segment in found))


def full_work(config: Config, tokens: float, pairs: float, seq_len: int) -> Work:
    """Work of recursions that all `tokens` take, given the `pairs` of an unshared block."""
    usual = dense_pairs(config.model, seq_len, unshared_sliding(config))
    fractions = [stage.sliding_fraction(r) for stage in stages(config) for r in range(len(stage.schedule))]
    return [(tokens, pairs * (dense_pairs(config.model, seq_len, sliding) / usual)) for sliding in fractions]


@lru_cache
def dense_pairs(model: ModelConfig, seq_len: int, sliding: float = 0.0) -> float:
    """Query-key pairs of one block for a single document of `seq_len` tokens that all take part.

    It is the mean over blocks of which the fraction `sliding` has a sliding window.
    """
    if model.attention == "full":
        hidden = max(0, seq_len - (model.sliding_window or seq_len))
        return seq_len * (seq_len + 1) / 2 - sliding * hidden * (hidden + 1) / 2
    positions, block = np.arange(seq_len), model.attention_block
    fine = np.maximum(0, positions // block * block - model.attention_window)
    return float((positions - fine + 1 + fine // block).sum())


def attention_flops(model: ModelConfig, pairs: float) -> float:
    """Scores and weighted values of one block's `pairs` of a query and a key."""
    return 4 * model.num_heads * model.head_dim * pairs


def end_flops(model: ModelConfig, lora_rank: int = 0) -> float:
    """The last product of a block, for one token: down projection, or the second factor of its low-rank update."""
    return 2.0 * model.dim * (lora_rank or model.ffn_dim)


def recursion_costs(stage: Segment) -> list[tuple[float, float]]:
    """FLOPs of a stage's blocks in each recursion, for each token and for each query-key pair."""
    model, recursion, blocks = stage.config.model, stage.config.recursion, stage.num_blocks
    fresh = [r == 0 or recursion.kv_policy != "share_first" for r in range(recursion.num_recursions)]
    tokens = [blocks * projection_flops(model, own, recursion.lora_rank) for own in fresh]
    return [(of_token, blocks * attention_flops(model, 1)) for of_token in tokens]


def router_flops(config: Config, recursion: int, candidates: float, selected: float) -> float:
    """A router's scores for one recursion: of its candidates or, for halting, of the tokens that took it.

    A recursion that no token took counts as not scored, since it may not have been run at all.
    """
    router, heads = config.router, 1 if selected else 0
    if isinstance(router, TokenChoiceConfig) and recursion > 0:
        heads = 0
    elif isinstance(router, ExpertChoiceConfig) and router.sampling == "aux_router":
        heads *= 2
    decided = selected if isinstance(router, HaltingConfig) else candidates
    return 2 * heads * decided * router_head_parameters(config)


def nominal_work(config: Config, num_sequences: float, most: int | None = None) -> list[tuple[float, float]]:
    """Work at the configured capacities or target; without either, tokens are taken to spread evenly over depths.

    A stage runs at most so many recursions; None: as many as the schedule ever does.
    """
    most = most or max(item.recursions for item in depth_steps(config))
    return [row for stage in stages(config) for row in nominal_stage_work(stage, num_sequences, most)]


def nominal_stage_work(stage: Segment, num_sequences: float, most: int) -> Work:
    """`nominal_work` of one stage."""
    config = stage.config
    num_recursions, seq_len = config.recursion.num_recursions, config.data.seq_len
    fractions = capacity_of(config.router, num_recursions)
    if isinstance(config.router, FixedDepthConfig):
        depth = config.router.depth or num_recursions
        fractions = (1.0,) * depth + (0.0,) * (num_recursions - depth)
    elif isinstance(config.router, HaltingConfig) and config.router.mode == "soft":
        fractions = (1.0,) * num_recursions
    work = []
    for recursion, fraction in enumerate(fractions):
        length = max(1, int(fraction * seq_len)) if fraction and recursion < most else 0
        keys = length if recursion == 0 or config.recursion.kv_policy == "recursion_wise" else seq_len
        # With multi-scale attention or windows, by as much less as where all tokens take part.
        scale = dense_pairs(config.model, seq_len, stage.sliding_fraction(recursion)) / (seq_len * (seq_len + 1) / 2)
        work.append((num_sequences * length, num_sequences * length * (keys + 1) / 2 * scale))
    return work


def nominal_flops(config: Config, num_sequences: float = 1.0, most: int | None = None) -> Flops:
    """FLOPs at the configured capacities; `most` as for `nominal_work`."""
    return executed_flops(config, num_sequences, nominal_work(config, num_sequences, most))


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
    steps, spent = done.step, done.flops
    # Each depth of a growing schedule has a share of the FLOPs.
    for item, after in pairwise([*depth_steps(config), DepthStep(1.0, 1)]):
        first = recursion.schedule_start if recursion.schedule == "sampled" else item.recursions
        if spent < (end := after.at * budget):
            depths = range(first, item.recursions + 1)
            steps, spent = BatchSchedule.of(config).steps_for(end - spent, steps, partial(cost, depths)), end
    return steps
