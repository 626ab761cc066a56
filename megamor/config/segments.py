"""A model as a list of segments: unshared blocks and recursion stages, in forward order (paper section 2.2.1, table 1).

A model with one stage has a prelude before and a coda after it. A vanilla model is a prelude alone. `recursion.stages`
and `recursion.router_layers` make models of several stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megamor.config.schema import Config, StageConfig


@dataclass(frozen=True)
class Segment:
    """`num_blocks` unique blocks, in the model's module `name`.

    In a recursion stage, `schedule[r][j]` is the block that runs as layer j of recursion r, and `config` is that of a
    model with this stage alone. Unshared blocks have an empty schedule: every token passes through each of them once.
    """

    name: str
    num_blocks: int
    config: Config
    schedule: tuple[tuple[int, ...], ...] = ()

    @property
    def num_applications(self) -> int:
        """Blocks that a token passes through at full depth."""
        return max(1, len(self.schedule)) * self.num_blocks

    @property
    def prefix(self) -> str:
        """What comes before the names of its statistics: nothing in a model that has one stage."""
        return "" if self.name == "stage" else f"{self.name}/"


def segments(config: Config) -> tuple[Segment, ...]:
    """The segments of a validated config; some of a model with one stage may be empty."""
    recursion, num_layers = config.recursion, config.model.num_layers
    if recursion.router_layers or recursion.stages:
        return tuple(_listed(config))
    if recursion.sharing == "none":
        return Segment("prelude", num_layers, config), Segment("coda", 0, config)
    # The middle variants leave the first and the last layer unshared.
    edge = 1 if recursion.sharing.startswith("middle") else 0
    num_blocks = (num_layers - 2 * edge) // recursion.num_recursions
    order = schedule(recursion.sharing, recursion.num_recursions, num_blocks)
    stage = Segment("stage", num_blocks, config, order)
    return Segment("prelude", edge, config), stage, Segment("coda", edge, config)


def stages(config: Config) -> tuple[Segment, ...]:
    """The segments that are recursion stages."""
    return tuple(segment for segment in segments(config) if segment.schedule)


def max_depth(config: Config) -> int:
    """Recursions of a token that takes all of every stage."""
    return sum(len(stage.schedule) for stage in stages(config))


def schedule(sharing: str, num_recursions: int, num_blocks: int) -> tuple[tuple[int, ...], ...]:
    """`Segment.schedule`: the blocks as a whole repeat (cycle), or each of them (sequence)."""
    recursions, layers = range(num_recursions), range(num_blocks)
    if sharing.endswith("cycle"):
        return tuple(tuple(layers) for _ in recursions)
    return tuple(tuple((r * num_blocks + j) // num_recursions for j in layers) for r in recursions)


def listed_stages(config: Config) -> list[StageConfig]:
    """`recursion.stages` and the stages of one layer that `recursion.router_layers` adds, by their first layer."""
    given = {stage.first_layer: stage for stage in config.recursion.stages}
    bare = {layer: StageConfig(first_layer=layer) for layer in config.recursion.router_layers}
    return [stage for _, stage in sorted((bare | given).items())]


def stage_config(config: Config, stage: StageConfig) -> Config:
    """The configuration of a model with this stage alone."""
    recursion = replace(config.recursion, sharing=stage.sharing, stages=(), router_layers=())
    for name in ("num_recursions", "kv_policy", "recursion_embedding", "separate_norms", "lora_rank"):
        if (value := getattr(stage, name)) is not None:
            recursion = replace(recursion, **{name: value})
    # `num_layers` is the number of applications there, as in any model with one stage.
    model = replace(config.model, num_layers=stage.num_layers * recursion.num_recursions)
    return replace(config, model=model, recursion=recursion, router=stage.router or config.router)


def _listed(config: Config) -> Iterator[Segment]:
    """Stages in the order of their layers, and what is between them."""
    layer = 0
    for stage in listed_stages(config):
        if stage.first_layer > layer:
            yield Segment(f"layers_{layer}", stage.first_layer - layer, config)
        own = stage_config(config, stage)
        order = schedule(stage.sharing, own.recursion.num_recursions, stage.num_layers)
        yield Segment(f"layers_{stage.first_layer}", stage.num_layers, own, order)
        layer = stage.first_layer + stage.num_layers
    if layer < config.model.num_layers:
        yield Segment(f"layers_{layer}", config.model.num_layers - layer, config)
