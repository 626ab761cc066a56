"""FLOPs that a model executes, from its configuration and from what routing selected.

One multiply-add counts as two. Attention counts only pairs of a query and a key that is not after it (the causal half).
Training costs three forward passes. Recomputation under activation checkpointing is reported separately, as MFU leaves
it out and HFU includes it. docs/numbers.md compares this with the paper's accounting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import islice

from megamor.config import (
    Config,
    ExpertChoiceConfig,
    FixedDepthConfig,
    HaltingConfig,
    ModelConfig,
    ScoredConfig,
    TokenChoiceConfig,
    TrainConfig,
)
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.config.derive import Consumed, router_head_parameters, total_steps
from megamor.config.segments import Segment, segments, stages
from megamor.routing.scored import default_capacity

Work = Sequence[tuple[float, float]]
"""Per recursion of each stage: tokens that it processed, and their visible query-key pairs (`StageOutput.work`)."""


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
        return 3 * self.forward

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
        return (0.0 if "mm" in kept else self.projections - ends) + (0.0 if "sdpa" in kept else self.attention)


def executed_flops(
    config: Config,
    num_sequences: float,
    work: Work,
    seq_len: int | None = None,
    pairs: float | None = None,
    tokens: float | None = None,
) -> Flops:
    """FLOPs of `num_sequences` sequences of `seq_len` (default `data.seq_len`) tokens, given each recursion's work.

    `pairs` are those of a block that sees every token (`ModelOutput.pairs`); by default each sequence is one document.
    `tokens` are those of all sequences where some are padded, since padding isn't computed.
    """
    model, found = config.model, segments(config)
    seq_len = seq_len or config.data.seq_len
    tokens = num_sequences * seq_len if tokens is None else tokens
    num_unshared = sum(segment.num_blocks for segment in found if not segment.schedule)
    projections = num_unshared * tokens * projection_flops(model)
    if pairs is None:
        pairs = num_sequences * seq_len * (seq_len + 1) / 2
    attention = num_unshared * attention_flops(model, pairs)
    ends = num_unshared * tokens * end_flops(model)
    head = 2 * tokens * model.dim * model.vocab_size
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
    # A router scores the candidates of a recursion, which are the tokens selected in the recursion before.
    candidates = tokens
    for recursion, (selected, pairs) in enumerate(work):
        fresh = recursion == 0 or config.recursion.kv_policy != "share_first"
        projections += num_blocks * selected * projection_flops(model, fresh, lora_rank)
        attention += num_blocks * attention_flops(model, pairs)
        block_ends += num_blocks * selected * end_flops(model, lora_rank)
        recursion_ends += selected * end_flops(model, lora_rank)
        routers += router_flops(config, recursion, candidates, selected)
        candidates = selected
    return Flops(projections, attention, routers, 0.0, block_ends, recursion_ends)


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
    """A router's scores for one recursion: of its candidates or, for halting, of the tokens that took it.

    A recursion that no token took counts as not scored, since it may not have been run at all.
    """
    router, heads = config.router, 1 if selected else 0
    if isinstance(router, TokenChoiceConfig) and recursion > 0:
        heads = 0
    elif isinstance(router, ExpertChoiceConfig) and router.sampling == "aux_router":
        heads = 2
    decided = selected if isinstance(router, HaltingConfig) else candidates
    return 2 * heads * decided * router_head_parameters(config)


def nominal_work(config: Config, num_sequences: float) -> list[tuple[float, float]]:
    """Work at the configured capacities; routers without one are assumed to spread tokens evenly over the depths."""
    return [row for stage in stages(config) for row in nominal_stage_work(stage.config, num_sequences)]


def nominal_stage_work(config: Config, num_sequences: float) -> Work:
    """`nominal_work` of the only stage of `config`."""
    num_recursions, seq_len = config.recursion.num_recursions, config.data.seq_len
    fractions = default_capacity(num_recursions)
    if isinstance(config.router, FixedDepthConfig):
        depth = config.router.depth or num_recursions
        fractions = (1.0,) * depth + (0.0,) * (num_recursions - depth)
    elif isinstance(config.router, HaltingConfig) and config.router.mode == "soft":
        fractions = (1.0,) * num_recursions
    elif isinstance(config.router, ScoredConfig):
        fractions = config.router.capacity or fractions
    work = []
    for recursion, fraction in enumerate(fractions):
        length = max(1, int(fraction * seq_len)) if fraction else 0
        keys = length if recursion == 0 or config.recursion.kv_policy == "recursion_wise" else seq_len
        work.append((num_sequences * length, num_sequences * length * (keys + 1) / 2))
    return work


def nominal_flops(config: Config, num_sequences: float = 1.0) -> Flops:
    """FLOPs at the configured capacities."""
    return executed_flops(config, num_sequences, nominal_work(config, num_sequences))


def expected_steps(config: Config, done: Consumed | None = None) -> int:
    """Steps of a run that has `done` so much; with `train.max_flops` an estimate at the configured capacities."""
    done = done or Consumed()
    steps = total_steps(config, done)
    if steps is not None:
        return steps

    def cost(shape: BatchShape) -> float:
        lengths = replace(config, data=replace(config.data, seq_len=shape.seq_len))
        return nominal_flops(lengths, shape.global_batch_size).training

    assert config.train.max_flops is not None, "validate() accepts exactly one limit"
    return BatchSchedule.of(config).steps_for(config.train.max_flops - done.flops, done.step, cost)
