"""Peak memory of a training step on one device, by part, for every backend: an estimate that simulates the step.

In the forward pass activations add up, and the head's logits come on top. In the backward pass, span by span, what the
span saved (or recomputes) is freed and the gradients of its weights are allocated; the shared core's are allocated in
its last recursion, which comes first, and stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from torch import nn

from megamor.config import Config
from megamor.config.derive import derive
from megamor.model import build_model
from megamor.optim import is_matrix
from megamor.optim.muon import BATCH_ELEMENTS
from megamor.parallel import resolve_backend
from megamor.parallel.zero_config import BUCKET_ELEMENTS
from megamor.plan.activations import ElementSizes, loss_bytes, spans

FP32, BF16 = 4, 2
MOMENTS = 8
"""Bytes per parameter of AdamW's two fp32 moments."""


@dataclass(frozen=True)
class Memory:
    """Bytes at one moment of a step.

    `parameters` are the slice (or copy) that exists throughout the step, in all its precisions; `gathered` are whole
    weights that exist for a while, and buffers of collectives; `activations` is what is saved, recomputed or in flight;
    `loss` belongs to head and cross-entropy.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


def step_memory(config: Config, world_size: int, on_gpu: bool = True) -> Memory:
    """Peak of one rank of `world_size`, at the configured capacities, eager, without the allocator's fragmentation."""
    sizes = element_sizes(config, world_size, on_gpu)
    found = memory_during_step(config, sizes, bytes_per_parameter(config, world_size, on_gpu), unit_parameters(config))
    return max(found, key=lambda memory: memory.total)


def element_sizes(config: Config, world_size: int, on_gpu: bool) -> ElementSizes:
    """Element sizes of the configured step. Autocast (one process, DDP, ZeRO-0) keeps the stream in fp32."""
    if config.train.precision == "fp32":
        return ElementSizes(FP32, FP32, on_gpu)
    backend = resolve_backend(config.parallel, world_size, on_gpu)
    autocast = backend in ("single", "ddp") or (backend == "deepspeed" and config.parallel.zero_stage == 0)
    return ElementSizes(FP32 if autocast else BF16, BF16, on_gpu)


def unit_parameters(config: Config) -> dict[str, int]:
    """Parameters of each of the parallel plan's units (prelude.0, stage, coda.0 ...) and of the "root" around them."""
    model = build_model(config, device="meta")
    names = {module: name for name, module in model.named_modules()}
    counts = {names[unit]: count(unit) for unit in model.parallel_plan().units}
    return counts | {"root": model.num_parameters() - sum(counts.values())}


def moment_bytes(config: Config) -> float:
    """Bytes per parameter of what an update keeps in fp32, on average: moments (Muon has one) and a moving average."""
    average = FP32 if config.optim.average_decay is not None else 0
    matrices = muon_parameters(config)
    return MOMENTS + average - (FP32 * matrices / sum(unit_parameters(config).values()) if matrices else 0)


def muon_parameters(config: Config) -> int:
    """Elements of the matrices that Muon updates; 0 with AdamW."""
    if config.optim.kind != "muon":
        return 0
    named = build_model(config, device="meta").named_parameters()
    return sum(parameter.numel() for name, parameter in named if is_matrix(name, parameter.ndim))


def count(module: nn.Module) -> int:
    """Parameters of a module, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class BytesPerParameter:
    """Bytes per parameter that a backend holds on each rank.

    Throughout the step: `weights` and `optimizer` (a slice or all), `whole` for weights gathered beside the slices,
    `buckets` for gradients. From a parameter's backward pass on: `gradients`. For parameters of the root, which stays
    gathered: `root`. `copies` are autocast's, freed after the backward pass, or after the forward pass with
    checkpointing.

    For parameters of a unit: `unit` while it or its neighbour computes, `fresh` for its gradients until they are
    reduced, `reduced` during the reduction.
    """

    weights: float
    optimizer: float
    gradients: float
    buckets: float = 0.0
    whole: float = 0.0
    root: float = 0.0
    copies: float = 0.0
    unit: float = 0.0
    fresh: float = 0.0
    reduced: float = 0.0


def bytes_per_parameter(config: Config, world_size: int, on_gpu: bool = False) -> BytesPerParameter:
    """Bytes per parameter under the configured backend.

    Single and DDP keep everything, with autocast's bf16 copies. FSDP2 gathers a unit in the type of the products and
    reduces its gradient in fp32. Accumulated gradients exist from the start of a micro-batch: whole under FSDP2, beside
    the buckets that always exist under DDP. Each ZeRO stage shards one more part (arXiv 1910.02054, section 5); stages
    1 and 2 reduce in two buckets, and stage 3 keeps what it has gathered, up to 1e9 parameters.
    """
    backend = resolve_backend(config.parallel, world_size, on_gpu)
    element = BF16 if config.train.precision == "bf16" else FP32
    copies = BF16 if element == BF16 else 0
    moments = moment_bytes(config)
    accumulated = FP32 if derive(config, world_size).micro_batches > 1 else 0
    if backend == "single":
        return BytesPerParameter(FP32, moments, FP32 - accumulated, buckets=accumulated, copies=copies)
    if backend == "ddp":
        # Where DDP's buckets are arranged at the start, .58 of the copy were measured (two cases, two ranks).
        arranged = build_model(config, device="meta").parallel_plan().uses_everything
        return BytesPerParameter(
            FP32, moments, 0, buckets=FP32 + (0.58 if arranged else 1.0) * accumulated, copies=copies
        )
    if backend == "fsdp2":
        shards = config.parallel.shard_degree or world_size
        return BytesPerParameter(
            FP32 / shards,
            moments / shards,
            FP32 / shards,
            buckets=accumulated,
            whole=0 if config.parallel.reshard_after_forward else element,
            root=element,
            unit=element if config.parallel.reshard_after_forward else 0,
            # fp32 gradients are accumulated in place; bf16 ones exist beside the fp32 accumulator.
            fresh=0 if accumulated == element else element,
            reduced=FP32,
        )
    stage = config.parallel.zero_stage
    if stage == 0:
        return BytesPerParameter(FP32, moments, FP32, buckets=FP32, copies=copies)
    master, slices = FP32 / world_size, moments / world_size
    gradients = FP32 / world_size
    if stage == 3:
        return BytesPerParameter(element / world_size + master, slices, gradients, buckets=element, whole=element)
    buckets = FP32 * min(1.0, 2 * BUCKET_ELEMENTS / sum(unit_parameters(config).values())) if copies else 0
    return BytesPerParameter(element + master, slices, gradients, buckets=element + buckets)


def memory_during_step(
    config: Config, sizes: ElementSizes, held: BytesPerParameter, counts: dict[str, int]
) -> Iterator[Memory]:
    """Memory at each point of a step that may be its peak."""
    total, root = sum(counts.values()), counts["root"]
    parts = spans(config, sizes)
    loss, loss_widest = loss_bytes(config, sizes)
    activations = sum(span.saved for span in parts)
    always = Memory(
        parameters=held.weights * total,
        gradients=held.buckets * total,
        optimizer=held.optimizer * total,
        gathered=held.whole * (total - root) + held.root * root,
        activations=0,
        loss=0,
    )
    copies = held.copies * (total - root)
    # The peak of the forward pass is at its end, when all activations and the logits of a chunk exist.
    in_forward = replace(always, gathered=always.gathered + copies)
    yield replace(in_forward, activations=activations, loss=loss + loss_widest)
    # Autograd saves autocast's copies of the weights until the backward pass is over. With checkpointing they are freed
    # in the forward pass and made again for one span at a time.
    if config.train.activation_checkpointing == "none":
        always, copies = in_forward, 0.0
    # A tied head's gradient waits until the end for that of the embedding; a head of its own is done with its own.
    weight = config.model.vocab_size * config.model.dim
    head = weight * sizes.products if config.model.tied_head else 0
    hidden = config.train.micro_batch_size * config.data.seq_len * config.model.dim
    yield replace(always, activations=activations, loss=loss + weight * sizes.products + hidden * sizes.products)
    own_head = 0 if config.model.tied_head else weight
    gradients = always.gradients + held.gradients * own_head
    left: dict[str, float] = dict(counts)
    # Backward: what a span holds while it is at work, then what remains while its finished unit is reduced.
    for index, span in reversed(list(enumerate(parts))):
        size, used = counts[span.unit], counts[span.unit] * span.share
        # A weight's gradient is allocated once, however many recursions add to it.
        new = min(left[span.unit], used)
        left[span.unit] -= new
        gradients += held.gradients * new
        next_unit = parts[index - 1].unit if index else "root"
        is_done = next_unit != span.unit
        # FSDP2 gathers the next unit while this one computes; its own weights go once its last span is done.
        gathered = always.gathered + held.unit * (size + (counts[next_unit] if is_done else 0))
        gathered += held.fresh * (size - left[span.unit]) + (held.copies * used if copies else 0)
        at_work = activations + span.recomputed + span.widest
        yield replace(always, gradients=gradients, gathered=gathered, activations=at_work, loss=head)
        activations -= span.saved
        if is_done:
            gathered += held.reduced * size
            yield replace(always, gradients=gradients, gathered=gathered, activations=activations, loss=head)
    gradients += held.gradients * (root - own_head)
    yield replace(always, gradients=gradients, loss=head)
    if matrices := muon_parameters(config):
        # Muon's update: momenta with the gradient added, results, and three copies of a batch in Newton-Schulz.
        mine = matrices * held.weights / FP32
        update = mine * (FP32 + sizes.products) + 3 * sizes.products * min(mine, BATCH_ELEMENTS)
        yield replace(always, gradients=gradients, gathered=always.gathered + update)
