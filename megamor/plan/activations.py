"""What a training step keeps in memory between forward and backward pass: a count of the tensors that autograd saves.

Sizes are those of uncompiled blocks. Compiled ones keep somewhat less: what is cheap is computed again there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamor.config import Config, EmaThresholdConfig, ExpertChoiceConfig, FixedDepthConfig, RandomConfig
from megamor.model.flops import nominal_work
from megamor.model.loss import CHUNK_ELEMENTS
from megamor.model.sharing import layer_stack

INDEX, STATISTIC = 8, 4
"""Bytes of a place in the stream, and of a norm's or a softmax's statistic."""


@dataclass(frozen=True)
class ElementSizes:
    """How the step computes: bytes of an element of the `stream` and of the `products`, and on which device.

    Under autocast the stream is fp32 and each product has its own copy of its input, `copies` of the normed one.
    """

    stream: int
    products: int
    on_gpu: bool

    @property
    def autocast(self) -> bool:
        """Whether weights and stream are fp32 and products bf16."""
        return self.products < self.stream


@dataclass(frozen=True)
class Span:
    """A part of the forward pass, in bytes. It uses a `share` of the parameters of `unit`, one of the parallel plan's.

    `saved` is kept for the backward pass; `recomputed` comes back there under activation checkpointing; `widest` is
    what the backward pass needs beyond that at its busiest moment, the gradients of weights left out.
    """

    unit: str
    share: float
    saved: float
    recomputed: float
    widest: float


def spans(config: Config, sizes: ElementSizes) -> list[Span]:
    """One micro-batch at the configured capacities, in forward order; the loss is apart (`loss_bytes`)."""
    plan = layer_stack(config)
    batch, seq_len = config.train.micro_batch_size, config.data.seq_len
    everything = BlockRows(config, sizes, batch * seq_len, batch * seq_len, uneven=config.data.document_mask)
    found = [_unshared(f"prelude.{number}", everything) for number in range(plan.num_prelude)]
    uneven = config.data.document_mask or not isinstance(config.router, FixedDepthConfig | ExpertChoiceConfig)
    policy = config.recursion.kv_policy
    for recursion, (selected, _) in enumerate(nominal_work(config, batch)):
        later = recursion > 0 and policy != "recursion_wise"
        keys = batch * seq_len if later else selected
        keeps = recursion == 0 and policy != "recursion_wise"
        rows = BlockRows(config, sizes, selected, keys, uneven, policy if later else "", keeps)
        found += _recursion(rows, plan.num_core)
    return found + [_unshared(f"coda.{number}", everything) for number in range(plan.num_coda)]


@dataclass(frozen=True)
class BlockRows:
    """BlockRows that go through blocks together: `count` queries to `keys` keys.

    `uneven`: sequences or documents of different lengths. `shares`: the KV policy by which keys and values come from an
    earlier recursion ("" where they are the rows' own); `keeps`: later ones will use these.
    """

    config: Config
    sizes: ElementSizes
    count: float
    keys: float
    uneven: bool = False
    shares: str = ""
    keeps: bool = False

    @property
    def stream(self) -> float:
        """The rows themselves."""
        return self.count * self.config.model.dim * self.sizes.stream

    @property
    def keys_values(self) -> float:
        """Keys and values of the rows."""
        model = self.config.model
        return 2 * self.count * model.num_kv_heads * model.head_dim * self.sizes.products

    def block_saved(self) -> float:
        """What one block saves: inputs of the norms, of each projection, of attention and of SwiGLU's products."""
        model, size = self.config.model, self.sizes.products
        normed = 5 if self.sizes.autocast else 2  # autocast copies it for each of q, k, v, gate and up
        if self.sizes.autocast and self.shares == "share_first":
            normed = 3
        width = (normed + 2) * model.dim + 4 * model.ffn_dim  # with queries and attention's output
        statistics = (2 + model.num_heads) * STATISTIC
        saved = 2 * self.stream + self.count * (width * size + statistics)
        if not self.shares:
            saved += self.keys_values
        elif self.shares == "hybrid":
            saved += self.keys_values * self.keys / self.count
        if self.shares and self.sizes.on_gpu and model.num_kv_heads < model.num_heads:
            saved += 2 * self.keys * model.dim * size  # a head of keys and values for each of the queries
        if not self.sizes.on_gpu and (self.uneven or self.shares):
            saved += self.count * model.dim * size  # attention's output as its pieces, and put together
        return saved

    def block_kept(self) -> float:
        """What a block keeps under the configured activation checkpointing."""
        train = self.config.train
        if train.activation_checkpointing == "none":
            return self.block_saved()
        kept = self.stream + (self.keys_values if self.keeps else 0.0)
        if train.activation_checkpointing == "selective":
            results = self._results()
            kept += sum(results[op] for op in train.selective_ops)
            if "mm" in train.selective_ops:  # of which the backward pass needs the ends of neither half
                kept += 2 * self.count * self.config.model.dim * self.sizes.products
        return kept

    def block_recomputed(self) -> float:
        """What comes back in a block's backward pass."""
        train = self.config.train
        if train.activation_checkpointing == "none":
            return 0.0
        again = self.block_saved() - self.stream
        if train.activation_checkpointing == "selective":
            again -= sum(self._results()[op] for op in train.selective_ops)
        return again

    def _results(self) -> dict[str, float]:
        """Results of a block's operations that the backward pass needs, by their names in `train.selective_ops`."""
        model, size = self.config.model, self.sizes.products
        fresh = 0.0 if self.shares == "share_first" else self.keys_values
        return {
            "mm": self.count * (model.dim + 2 * model.ffn_dim) * size + fresh,
            "sdpa": self.count * (model.dim * size + model.num_heads * STATISTIC),
            "silu": self.count * model.ffn_dim * size,
        }

    def widest(self) -> float:
        """Gradients in flight in the middle of SwiGLU, and that of the residual stream."""
        return 2 * self.count * self.config.model.ffn_dim * self.sizes.products + 2 * self.stream

    def launch(self) -> float:
        """What a recursion saves around its blocks: its result, the combined rows, what scores them, angles, places."""
        router, model = self.config.router, self.config.model
        if isinstance(router, FixedDepthConfig):
            return 0.0
        streams = 3 if isinstance(router, ExpertChoiceConfig | EmaThresholdConfig | RandomConfig) else 2
        saved = streams * self.stream + self.count * (2 * model.head_dim * STATISTIC + 4 * INDEX)
        if self.shares:  # attention's mask
            saved += self.count * self.config.data.seq_len * self.sizes.products
        return saved


def _unshared(unit: str, rows: BlockRows) -> Span:
    return Span(unit, 1.0, rows.block_kept(), rows.block_recomputed(), rows.widest())


def _recursion(rows: BlockRows, num_blocks: int) -> list[Span]:
    if rows.config.train.activation_checkpointing == "recursion":
        kept = rows.stream + (num_blocks * rows.keys_values if rows.keeps else 0.0)
        again = num_blocks * rows.block_saved() - rows.stream
        return [Span("core", 1.0, kept + rows.launch(), again, rows.widest())]
    block = Span("core", 1 / num_blocks, rows.block_kept(), rows.block_recomputed(), rows.widest())
    return [replace(block, saved=block.saved + rows.launch()), *[block] * (num_blocks - 1)]


def loss_bytes(config: Config, sizes: ElementSizes) -> tuple[float, float]:
    """(kept for backward, beyond that at the busiest moment) of final norm, head and cross-entropy.

    Kept are the norm's input and the finished gradients with respect to the hidden states and the head's weights.
    """
    model, tokens = config.model, config.train.micro_batch_size * config.data.seq_len
    hidden = tokens * model.dim
    weight = model.vocab_size * model.dim
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // model.vocab_size)) * model.vocab_size
    kept = hidden * (sizes.stream + sizes.products) + weight * sizes.products
    logits = chunk * (4 if sizes.products == 4 else 4 + sizes.products)
    return kept, logits + hidden * sizes.products + weight * 4
