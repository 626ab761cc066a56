"""FLOPs of a model: the paper's accounting, and an honest one of what was executed.

One multiply-add counts two. Attention counts only the pairs of a query and a key that is not after it (causal half).
Training costs three forward passes; recomputation under activation checkpointing is reported apart (MFU against HFU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megamor.config import (
    Config,
    EmaThresholdConfig,
    ExpertChoiceConfig,
    FixedDepthConfig,
    HaltingConfig,
    ModelConfig,
    RandomConfig,
    TokenChoiceConfig,
    TrainConfig,
)
from megamor.config.derive import router_head_parameters
from megamor.model.sharing import layer_stack
from megamor.routing.scored import default_capacity

Work = Sequence[tuple[float, float]]
"""Per recursion: tokens that the core has seen, and their causal query-key pairs (`StageOutput.work`)."""


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs by part: the blocks' projections, attention, routers, head.

    `block_ends` and `recursion_ends` are the products whose results the backward pass doesn't need: the last one of
    each block, and of each recursion's last block.
    """

    projections: float
    attention: float
    routers: float
    head: float
    block_ends: float
    recursion_ends: float

    @property
    def blocks(self) -> float:
        """All blocks, each as often as it was run."""
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
        """What activation checkpointing computes again in backward.

        Recomputation stops when it has what the backward pass needs, so the last product is left out; a compiled
        block has no place to stop at.
        """
        policy = train.activation_checkpointing
        if policy == "none":
            return 0.0
        if train.compile:
            ends = 0.0
        else:
            ends = self.recursion_ends if policy == "recursion" else self.block_ends
        kept = train.selective_ops if policy == "selective" else ()
        return (0.0 if "mm" in kept else self.projections - ends) + (0.0 if "sdpa" in kept else self.attention)


def executed_flops(
    config: Config, num_sequences: float, work: Work, seq_len: int | None = None, pairs: float | None = None
) -> Flops:
    """FLOPs of `num_sequences` sequences of `seq_len` (or `data.seq_len`) tokens, given what routing let through.

    `pairs` are those of a block that sees every token (`ModelOutput.pairs`); by default, each sequence is one document.
    """
    model, plan = config.model, layer_stack(config)
    seq_len = seq_len or config.data.seq_len
    tokens = num_sequences * seq_len
    num_unshared = plan.num_prelude + plan.num_coda
    projections = num_unshared * tokens * projection_flops(model)
    if pairs is None:
        pairs = num_sequences * seq_len * (seq_len + 1) / 2
    attention = num_unshared * attention_flops(model, pairs)
    ends = num_unshared * tokens * end_flops(model)
    routers, block_ends, recursion_ends, candidates = 0.0, ends, ends, tokens
    for recursion, (selected, selected_pairs) in enumerate(work):
        fresh = recursion == 0 or config.recursion.kv_policy != "share_first"
        per_token = projection_flops(model, projects_kv=fresh) + lora_flops(config, projects_kv=fresh)
        projections += plan.num_core * selected * per_token
        attention += plan.num_core * attention_flops(model, selected_pairs)
        block_ends += plan.num_core * selected * end_flops(model, config.recursion.lora_rank)
        recursion_ends += selected * end_flops(model, config.recursion.lora_rank)
        routers += router_flops(config, recursion, candidates, selected)
        candidates = selected
    head = 2 * tokens * model.dim * model.vocab_size
    return Flops(projections, attention, routers, head, block_ends, recursion_ends)


def projection_flops(model: ModelConfig, projects_kv: bool = True) -> float:
    """Projections of one block, for one token."""
    kv_dim = model.num_kv_heads * model.head_dim
    weights = 2 * model.dim**2 + 3 * model.dim * model.ffn_dim
    if projects_kv:
        weights += 2 * model.dim * kv_dim
    return 2.0 * weights


def attention_flops(model: ModelConfig, pairs: float) -> float:
    """Scores and weighted values of one block's `pairs` of a query and a key."""
    return 4 * model.dim * pairs


def end_flops(model: ModelConfig, lora_rank: int = 0) -> float:
    """The last product of a block, for one token: down projection, or the upper half of its low-rank update."""
    return 2.0 * model.dim * (lora_rank or model.ffn_dim)


def lora_flops(config: Config, projects_kv: bool) -> float:
    """Low-rank updates of one shared block, for one token."""
    model = config.model
    sides = 2 * (model.dim + model.dim) + 3 * (model.dim + model.ffn_dim)
    if projects_kv:
        sides += 2 * (model.dim + model.num_kv_heads * model.head_dim)
    return 2.0 * config.recursion.lora_rank * sides


def router_flops(config: Config, recursion: int, candidates: float, selected: float) -> float:
    """Decisions about one recursion: about its candidates, or for halting about those that have taken it."""
    router = config.router
    heads = 1
    if isinstance(router, TokenChoiceConfig) and recursion > 0:
        heads = 0
    if isinstance(router, ExpertChoiceConfig) and router.sampling == "aux_router":
        heads = 2
    decided = selected if isinstance(router, HaltingConfig) else candidates
    return 2 * heads * decided * router_head_parameters(config)


def nominal_work(config: Config, num_sequences: float) -> list[tuple[float, float]]:
    """Work at the configured capacities; routers without one are taken to end evenly at all depths."""
    num_recursions, seq_len = config.recursion.num_recursions, config.data.seq_len
    if num_recursions == 1:
        return []
    shares = default_capacity(num_recursions)
    if isinstance(config.router, FixedDepthConfig):
        shares = (1.0,) * (config.router.depth or num_recursions)
    elif isinstance(config.router, HaltingConfig) and config.router.mode == "soft":
        shares = (1.0,) * num_recursions
    elif isinstance(config.router, ExpertChoiceConfig | EmaThresholdConfig | RandomConfig):
        shares = config.router.capacity or shares
    work = []
    for recursion, share in enumerate(shares):
        length = max(1, int(share * seq_len))
        keys = length if recursion == 0 or config.recursion.kv_policy == "recursion_wise" else seq_len
        work.append((num_sequences * length, num_sequences * length * (keys + 1) / 2))
    return work


def nominal_flops(config: Config, num_sequences: float = 1.0) -> Flops:
    """FLOPs at the configured capacities."""
    return executed_flops(config, num_sequences, nominal_work(config, num_sequences))


def paper_flops(config: Config) -> float:
    """Forward FLOPs of one sequence as the paper counts them (appendix on FLOPs): no embedding, head or router, and
    keys and values at full width. Reproduces its tables; `executed_flops` is the honest count.
    """
    model, plan, seq_len = config.model, layer_stack(config), config.data.seq_len
    dim, ffn = model.dim, 3 * model.dim * model.ffn_dim
    total = (plan.num_prelude + plan.num_coda) * (2.0 * seq_len * (4 * dim**2 + ffn) + 2 * dim * seq_len**2)
    for recursion, (length, _) in enumerate(nominal_work(config, 1)):
        shared = recursion > 0 and config.recursion.kv_policy == "share_first"
        projections, keys = (2, seq_len) if shared else (4, length)
        total += plan.num_core * (2 * length * (projections * dim**2 + ffn) + 2 * dim * length * keys)
    return total
