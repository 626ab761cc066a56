"""What follows from a validated configuration: steps, batches, schedule, layer counts and parameter counts."""

from __future__ import annotations

from dataclasses import dataclass

from megamor.config.batches import BatchSchedule
from megamor.config.depth import describe_schedule
from megamor.config.routers import (
    CustomRouterConfig,
    ExpertChoiceConfig,
    FixedDepthConfig,
    HaltingConfig,
    LearnedThresholdConfig,
    MonotoneConfig,
    RandomConfig,
    RouterHead,
    ScoredConfig,
    SkipForwardRecurseConfig,
    TokenChoiceConfig,
)
from megamor.config.schema import Config, ModelConfig, OptimConfig
from megamor.config.segments import Segment, segments

HIDDEN_MULTIPLIER: dict[RouterHead, int] = {"mlp": 2, "wide_mlp": 4}
"""Width of a router's hidden layer as a multiple of the model's."""


@dataclass
class Consumed:
    """What the steps that led to the current weights have used, over all launches.

    `tokens_seen` leaves out padding. `flops` are executed training FLOPs. Steps that a rollback undid don't count.
    """

    step: int = 0
    tokens_seen: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Derived:
    """Quantities printed at the start of a launch.

    `unique_parameters` counts each parameter once; `effective_parameters` counts a shared block once per recursion.
    Like the paper's tables, both leave out the embedding and the output head.
    """

    config: Config
    world_size: int
    done: Consumed
    """What earlier launches used."""
    total_steps: int | None
    """Steps of the whole run; see `is_estimate`. None if `train.max_flops` leaves them unknown."""
    batches: BatchSchedule
    micro_batches: int
    """Micro-batches that each rank accumulates per optimizer step, after `train.ramp`."""
    decay_steps: int
    segments: tuple[Segment, ...]
    unique_parameters: int
    unique_parameters_with_embedding: int
    effective_parameters: int

    def describe(self) -> str:
        """The quantities as aligned lines of text."""
        decay = "no decay"
        if is_estimate(self.config) and self.config.optim.schedule != "constant":
            limit = "max_tokens" if self.config.train.max_flops is None else "max_flops"
            decay = f"decay ({self.config.optim.schedule}) by the fraction of train.{limit} used"
        elif self.total_steps is not None and self.decay_steps:
            start = self.total_steps - self.decay_steps
            decay = f"decay over {self.decay_steps:,} steps from step {start:,}"
        lines = {
            "steps": self._describe_steps(),
            "micro-batches": f"{self.micro_batches:,} per rank and step, {self.world_size:,} in parallel",
            "learning rate": f"{self.config.optim.warmup_steps:,} warm-up steps, {decay}",
            "layers": self._describe_layers(),
            "recursions": describe_schedule(self.config),
            "parameters": f"{self.unique_parameters:,} unique, {self.effective_parameters:,} effective (no embedding), "
            f"{self.unique_parameters_with_embedding:,} unique with embedding",
        }
        width = max(map(len, lines))
        return "\n".join(f"{subject:<{width}}  {text}" for subject, text in lines.items() if text)

    def _describe_steps(self) -> str:
        """Steps done, steps to come by their size, and the tokens of all of them."""
        limit = self.config.train.max_flops
        about = "about " if is_estimate(self.config) else ""
        until = "" if limit is None else f", until {limit:.3e} FLOPs are executed"
        first, tokens = self.done.step, self.done.tokens_seen
        done = f"{first:,} done with {tokens:,} tokens"
        stages = []
        for start, end, shape in self.batches.stages(first, self.total_steps or 0):
            stages.append(f"{about}{end - start:,} of {shape.tokens:,}")
            tokens += (end - start) * shape.tokens
        if not stages:
            return done + until
        return f"{' + '.join([done, *stages] if first else stages)} tokens = {tokens:,} tokens{until}"

    def _describe_layers(self) -> str:
        found = [segment for segment in self.segments if segment.num_blocks]
        unique, effective = sum(s.num_blocks for s in found), sum(s.num_applications for s in found)
        if not any(segment.schedule for segment in found):
            return f"{effective}, none shared"
        blocks = [
            f"{s.num_blocks} core x {len(s.schedule)} recursions"
            if s.name == "stage"
            else f"{s.num_blocks} {s.name}" + (f" x {len(s.schedule)} recursions" if s.schedule else "")
            for s in found
        ]
        return f"{' + '.join(blocks)} = {effective} effective, {unique} unique"


def derive(config: Config, world_size: int, done: Consumed | None = None, expected_steps: int | None = None) -> Derived:
    """Everything that follows from a configuration that `validate(config, world_size)` accepts.

    `done` is what earlier launches used. `expected_steps` is an estimate of all steps, for `train.max_flops`.
    """
    done = done or Consumed()
    steps = total_steps(config, done)
    steps = expected_steps if steps is None else steps
    found = segments(config)
    per_layer = layer_parameters(config.model)
    final_norm = config.model.dim
    outside_layers = final_norm + sum(stage_parameters(segment) for segment in found if segment.schedule)
    unique_parameters = sum(segment.num_blocks for segment in found) * per_layer + outside_layers
    return Derived(
        config=config,
        world_size=world_size,
        done=done,
        total_steps=steps,
        batches=BatchSchedule.of(config),
        micro_batches=config.train.global_batch_size // (config.train.micro_batch_size * world_size),
        decay_steps=decay_steps(config.optim, steps or 0),
        segments=found,
        unique_parameters=unique_parameters,
        unique_parameters_with_embedding=unique_parameters + embedding_parameters(config.model),
        effective_parameters=sum(segment.num_applications for segment in found) * per_layer + outside_layers,
    )


def total_steps(config: Config, done: Consumed | None = None) -> int | None:
    """The step that ends a run that has `done` so much: `max_steps`, or the first that reaches `max_tokens`.

    None with `max_flops`: how many FLOPs a step executes depends on the router. An estimate with `max_tokens` where
    windows are padded, since padding is no token: the run may become longer.
    """
    train, done = config.train, done or Consumed()
    if train.max_tokens is not None:
        return BatchSchedule.of(config).steps_for(train.max_tokens - done.tokens_seen, done.step)
    return train.max_steps


def is_estimate(config: Config) -> bool:
    """Whether the number of steps follows from what they will have consumed, and isn't known beforehand."""
    train = config.train
    return train.max_flops is not None or (train.max_tokens is not None and config.data.packing != "stream")


def decay_steps(optim: OptimConfig, steps: int) -> int:
    """Steps at the end of a run of `steps` over which the learning rate falls.

    `wsd` decays over the last int(decay_fraction * steps) steps (arXiv 2507.10524, appendix B) or `decay_steps`,
    `cosine` over all steps after the warm-up, `constant` never.
    """
    if optim.schedule == "wsd" and optim.decay_steps is not None:
        return optim.decay_steps
    decay = {"wsd": int(optim.decay_fraction * steps), "cosine": steps - optim.warmup_steps, "constant": 0}
    return decay[optim.schedule]


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one block: query and output projections, keys and values, SwiGLU, norms."""
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    return model.dim * heads + 3 * model.dim * model.ffn_dim + norm_parameters(model)


def embedding_parameters(model: ModelConfig) -> int:
    """Parameters of embedding and head, which may be the same matrix."""
    return (1 if model.tied_head else 2) * model.vocab_size * model.dim


def norm_parameters(model: ModelConfig) -> int:
    """Parameters of a block's norms: two of the stream (four with `sandwich_norms`), two of a head with `qk_norm`."""
    return (4 if model.sandwich_norms else 2) * model.dim + (2 * model.head_dim if model.qk_norm else 0)


def stage_parameters(stage: Segment) -> int:
    """Parameters of a recursion stage beside its blocks' own."""
    config = stage.config
    own = config.model.dim * config.recursion.recursion_embedding + 2 * config.recursion.input_injection
    entering = config.recursion.num_recursions * own
    return router_parameters(config) + stage.num_blocks * recursion_parameters(config) + entering


def recursion_parameters(config: Config) -> int:
    """Parameters that a shared block has in addition for its recursions: separate norms and low-rank updates.

    A low-rank update of an n x m matrix has rank * (n + m) parameters (arXiv 2410.20672).
    """
    model, recursion = config.model, config.recursion
    # n + m of each matrix: query and output, key and value, the three of SwiGLU.
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    sides = 4 * model.dim + heads + 3 * (model.dim + model.ffn_dim)
    # The block's own norms serve the first recursion.
    norms = (recursion.num_recursions - 1) * norm_parameters(model) if recursion.separate_norms else 0
    return norms + recursion.num_recursions * recursion.lora_rank * sides


def router_parameters(config: Config) -> int:
    """Parameters of all heads: one per recursion (two with `aux_router`) where recursions are scored one by one."""
    heads = config.recursion.num_recursions
    match config.router:
        case ExpertChoiceConfig(sampling="aux_router"):
            heads *= 2
        case TokenChoiceConfig() | SkipForwardRecurseConfig(routers="shared") | HaltingConfig():
            heads = 1
    inputs = config.recursion.num_recursions if getattr(config.router, "recursion_input", False) else 0
    return heads * router_head_parameters(config) + inputs * config.model.dim


def router_head_parameters(config: Config) -> int:
    """Parameters of one head, which costs 2 FLOPs per parameter and token; 0 for custom routers."""
    router, dim = config.router, config.model.dim
    match router:
        case FixedDepthConfig() | CustomRouterConfig() | RandomConfig(gates="open"):
            return 0
        case LearnedThresholdConfig():
            return head_parameters(router.head, dim, outputs=1) + 1
        case ScoredConfig():
            return head_parameters(router.head, dim, outputs=1)
        case TokenChoiceConfig():
            return head_parameters(router.head, dim, outputs=config.recursion.num_recursions)
        case SkipForwardRecurseConfig():
            return router.hidden * ((dim if router.gate == "mlp" else 3 * dim) + 3)
        case HaltingConfig() | MonotoneConfig():
            return dim + 1


def head_parameters(head: RouterHead, dim: int, outputs: int) -> int:
    """Parameters of a head `dim -> outputs`, directly or through one hidden layer; heads have no biases."""
    if head == "linear":
        return dim * outputs
    hidden = HIDDEN_MULTIPLIER[head] * dim
    return hidden * (dim + outputs)
