"""What a training step keeps in memory between forward and backward pass: a count of the tensors that autograd saves.

Sizes are for eager blocks. Compiled blocks keep somewhat less, because the compiler recomputes what is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamor.config import Config, ExpertChoiceConfig, FixedDepthConfig, MonotoneConfig, ScoredConfig
from megamor.config.depth import depth_steps
from megamor.config.segments import Segment, segments
from megamor.model.flops import nominal_stage_work, untracked_recursions
from megamor.model.layouts import fine_chunks
from megamor.model.loss import CHUNK_ELEMENTS, gpu_chunk
from megamor.model.multi_scale import reach

INDEX, STATISTIC = 8, 4
"""Bytes of an int64 token position, and of an fp32 statistic of a norm or softmax."""


@dataclass(frozen=True)
class ElementSizes:
    """Bytes of an element of the residual `stream` and of the matrix `products`; and whether attention is a GPU's.

    Under autocast the stream is fp32, and each product keeps a bf16 copy of its own input.
    """

    stream: int
    products: int
    on_gpu: bool


@dataclass(frozen=True)
class Span:
    """A stretch of the forward pass, in bytes. It uses the fraction `share` of the parameters of `unit`, a unit of the
    parallel plan.

    `saved` is kept for the backward pass; `recomputed` is created again there under activation checkpointing; `widest`
    is what the backward pass needs besides at its busiest moment, gradients of weights not included.
    """

    unit: str
    share: float
    saved: float
    recomputed: float
    widest: float


def spans(config: Config, sizes: ElementSizes) -> list[Span]:
    """The spans of one micro-batch at the configured capacities, in forward order, without the loss (`loss_bytes`)."""
    tokens = config.train.micro_batch_size * config.data.seq_len
    everything = BlockRows(config, sizes, tokens, tokens, uneven=config.data.document_mask)
    kinds = [replace(everything, sliding=sliding) for sliding in (0.0, 1.0)]
    unshared = [Span("", 1.0, *rows.block(), rows.widest()) for rows in kinds]
    found: list[Span] = []
    most = max(item.recursions for item in depth_steps(config))
    for segment in segments(config):
        if segment.schedule:
            found += stage_spans(segment, sizes, most)
        else:
            blocks = range(segment.num_blocks)
            found += [replace(unshared[n in segment.sliding], unit=f"{segment.name}.{n}") for n in blocks]
    return found


def stage_spans(stage: Segment, sizes: ElementSizes, most: int) -> list[Span]:
    """The spans of a recursion stage that runs at most so many recursions."""
    config, found = stage.config, []
    batch, seq_len = config.train.micro_batch_size, config.data.seq_len
    uneven = config.data.document_mask or not isinstance(config.router, FixedDepthConfig | ExpertChoiceConfig)
    policy, work = config.recursion.kv_policy, nominal_stage_work(stage, batch, most)
    untracked = untracked_recursions(config, work)
    for recursion, (selected, _) in enumerate(work):
        if not selected or recursion < untracked:
            continue  # not run, or without gradients, for which nothing is kept
        later = recursion > 0 and policy != "recursion_wise"
        keys = batch * seq_len if later else selected
        last = recursion == config.recursion.num_recursions - 1
        keeps = (policy == "halted_reuse" and not last) or (policy != "recursion_wise" and recursion == 0)
        rows = BlockRows(config, sizes, selected, keys, uneven, policy if later else "", keeps)
        rows = replace(rows, sliding=stage.sliding_fraction(recursion))
        found += _recursion(rows, stage)
    return found


@dataclass(frozen=True)
class BlockRows:
    """Rows that pass through blocks together: `count` queries attend to `keys` keys.

    `uneven`: sequences or documents have different lengths. `shares`: the KV policy under which keys and values come
    from an earlier recursion; "" if the rows compute their own. `keeps`: later recursions will use them. `sliding`: the
    fraction of the blocks that have a sliding window.
    """

    config: Config
    sizes: ElementSizes
    count: float
    keys: float
    uneven: bool = False
    shares: str = ""
    keeps: bool = False
    sliding: float = 0.0

    @property
    def stream(self) -> float:
        """Bytes of the rows themselves."""
        return self.count * self.config.model.dim * self.sizes.stream

    @property
    def heads(self) -> int:
        """Width of all query heads together."""
        return self.config.model.num_heads * self.config.model.head_dim

    @property
    def keys_values(self) -> float:
        """Bytes of the keys and values that the rows attend to."""
        model = self.config.model
        return 2 * self.keys * model.num_kv_heads * model.head_dim * self.sizes.products

    @property
    def fresh(self) -> float:
        """Bytes of the keys and values that the rows compute."""
        return 0.0 if self.shares == "share_first" else self.keys_values * self.count / self.keys

    def block_saved(self) -> float:
        """What one block saves: inputs of the norms, of each projection, of attention and of SwiGLU's products."""
        model, size = self.config.model, self.sizes.products
        # The normed input is saved once for attention and once for SwiGLU. Autocast copies it for each of q, k, v, gate
        # and up instead; share-first computes no keys and values, which leaves three.
        autocast = size < self.sizes.stream
        normed = 2 if not autocast else 3 if self.shares == "share_first" else 5
        width = normed * model.dim + 2 * self.heads + 4 * model.ffn_dim  # twice: queries, and attention's output
        statistics = (2 + model.num_heads) * STATISTIC
        if model.sandwich_norms:
            # What the branches add, before it is normalised; on a CPU, autocast keeps two copies of it in fp32.
            width += 2 * model.dim * (4 if autocast and not self.sizes.on_gpu else 1)
            statistics += 2 * STATISTIC
        saved = 2 * self.stream + self.count * (width * size + statistics)
        if model.qk_norm:
            # Queries and keys before they are normalised; on a CPU, autocast keeps two copies of them in fp32.
            heads = self.count * self.heads * size + self.fresh / 2
            saved += heads * (4 if autocast and not self.sizes.on_gpu else 1) + self.count * model.num_heads * STATISTIC
        if self.shares != "share_first":
            saved += self.keys_values
        routed = self.count < self.config.train.micro_batch_size * self.config.data.seq_len
        masked = 1.0 if self.shares else self.sliding if routed else 0.0
        if masked and self.sizes.on_gpu and model.num_kv_heads < model.num_heads:
            # Fused kernels don't take grouped heads with a mask, so keys and values are repeated for each query head.
            saved += masked * 2 * self.keys * self.heads * size
        if model.attention == "multi_scale":
            # Each chunk of queries copies the keys and values that it sees; on a GPU, once for each query head.
            heads = model.num_heads if self.sizes.on_gpu else model.num_kv_heads
            saved += 2 * self.chunked_keys() * heads * model.head_dim * size
        if (not self.sizes.on_gpu and (self.uneven or self.shares)) or model.attention == "multi_scale":
            # On a CPU, ragged attention runs in buckets: its output exists once as buckets and once put together. So
            # does that of chunks.
            saved += self.count * self.heads * size
        elif self.sliding and not self.sizes.on_gpu:
            saved += self.sliding * self.count * self.heads * size
        return saved

    def chunked_keys(self) -> float:
        """Keys of all chunks of queries together under multi-scale attention; the mean of a block counts as one."""
        model, batch = self.config.model, self.config.train.micro_batch_size
        queries, keys = self.count / batch, self.keys / batch
        chunks = fine_chunks(int(queries), reach(model))
        return batch * chunks * (min(keys, queries / chunks + reach(model)) + keys / model.attention_block / 2)

    def block(self) -> tuple[float, float]:
        """What a block keeps under the configured activation checkpointing, and what backward then creates again."""
        saved, train = self.block_saved(), self.config.train
        if train.activation_checkpointing == "none":
            return saved, 0.0
        kept, again = self.stream + (self.keys_values if self.keeps else 0.0), saved - self.stream
        if train.activation_checkpointing == "selective":
            results = self._results()
            kept += sum(results[op] for op in train.selective_ops)
            again -= sum(results[op] for op in train.selective_ops)
            if "mm" in train.selective_ops:
                # The policy keeps every product, also the last of attention and of SwiGLU, which backward doesn't need.
                # Norms behind the branches need them.
                unused = 0 if self.config.model.sandwich_norms else 2
                kept += unused * self.count * self.config.model.dim * self.sizes.products
        return kept, again

    def _results(self) -> dict[str, float]:
        """Bytes of a block's results that the backward pass needs, by operation as in `train.selective_ops`."""
        model, size = self.config.model, self.sizes.products
        return {
            "mm": self.count * (self.heads + 2 * model.dim * model.sandwich_norms + 2 * model.ffn_dim) * size
            + self.fresh,
            "sdpa": self.count * (self.heads * size + model.num_heads * STATISTIC),
            "silu": self.count * model.ffn_dim * size,
        }

    def widest(self) -> float:
        """Gradients that exist at once in the middle of SwiGLU, with that of the residual stream."""
        return 2 * self.count * self.config.model.ffn_dim * self.sizes.products + 2 * self.stream

    def around_blocks(self) -> float:
        """What a recursion saves around its blocks: result, combined rows, scorer's input, RoPE angles, positions."""
        router, model = self.config.router, self.config.model
        injected = self.stream if self.config.recursion.input_injection else 0.0
        if isinstance(router, FixedDepthConfig):
            return injected
        streams = 3 if isinstance(router, ScoredConfig | MonotoneConfig) else 2
        saved = injected + streams * self.stream + self.count * (2 * model.head_dim * STATISTIC + 4 * INDEX)
        if self.shares:
            # Queries and keys are different tokens, so attention needs an explicit mask.
            saved += self.count * self.config.data.seq_len * self.sizes.products
        return saved


def _recursion(rows: BlockRows, stage: Segment) -> list[Span]:
    num_blocks = stage.num_blocks
    if rows.config.train.activation_checkpointing == "recursion":
        kept = rows.stream + (num_blocks * rows.keys_values if rows.keeps else 0.0)
        again = num_blocks * rows.block_saved() - rows.stream
        return [Span(stage.name, 1.0, kept + rows.around_blocks(), again, rows.widest())]
    block = Span(stage.name, 1 / num_blocks, *rows.block(), rows.widest())
    return [replace(block, saved=block.saved + rows.around_blocks()), *[block] * (num_blocks - 1)]


def loss_bytes(config: Config, sizes: ElementSizes) -> tuple[float, float]:
    """Bytes of final norm, head and cross-entropy: (kept for backward, needed besides at the busiest moment).

    The loss computes its gradients in the forward pass, so what is kept are the norm's input and the finished gradients
    with respect to the hidden states and the head's weights.
    """
    model, tokens = config.model, config.train.micro_batch_size * config.data.seq_len
    hidden = tokens * model.dim
    weight = model.vocab_size * model.dim
    kept = hidden * (sizes.stream + sizes.products) + weight * sizes.products
    if sizes.on_gpu and config.distill.from_ is None and config.train.loss_kernel != "reference":
        # Gradients replace the logits. Those of the weight are summed in fp32 if there are several chunks.
        rows = gpu_chunk(tokens, model.vocab_size, sizes.products)
        logits = min(tokens, rows) * model.vocab_size * sizes.products
        return kept, logits + hidden * sizes.products + (weight * 4 if tokens > rows else 0)
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // model.vocab_size)) * model.vocab_size
    logits = chunk * (4 if sizes.products == 4 else 4 + sizes.products)
    return kept, logits + hidden * sizes.products + weight * 4
