"""A model as a list of segments: unshared blocks and recursion stages, in forward order (paper section 2.2.1, table 1).

A model with one stage has a prelude before and a coda after it. A vanilla model is a prelude alone. `recursion.stages`
and `recursion.router_layers` make models of several stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megamor.config.routers import CustomRouterConfig, FixedDepthConfig
from megamor.config.schema import Config, StageConfig


@dataclass(frozen=True)
class Segment:
    """`num_blocks` unique blocks, in the model's module `name`.

    In a recursion stage, `schedule[r][j]` is the block that runs as layer j of recursion r, and `config` is that of a
    model with this stage alone. Unshared blocks have an empty schedule: every token passes through each of them once.
    `sliding` are the blocks whose attention is limited to `model.sliding_window`.
    """

    name: str
    num_blocks: int
    config: Config
    schedule: tuple[tuple[int, ...], ...] = ()
    sliding: tuple[int, ...] = ()

    @property
    def num_applications(self) -> int:
        """Blocks that a token passes through at full depth."""
        return max(1, len(self.schedule)) * self.num_blocks

    @property
    def prefix(self) -> str:
        """What comes before the names of its statistics: nothing in a model that has one stage."""
        return "" if self.name == "stage" else f"{self.name}/"

    def sliding_fraction(self, recursion: int = 0) -> float:
        """Fraction of the blocks run in `recursion` whose attention is limited."""
        blocks = self.schedule[recursion] if self.schedule else tuple(range(self.num_blocks))
        return sum(block in self.sliding for block in blocks) / max(1, len(blocks))


def segments(config: Config) -> tuple[Segment, ...]:
    """The segments of a validated config; some of a model with one stage may be empty."""
    recursion, num_layers = config.recursion, config.model.num_layers
    if recursion.router_layers or recursion.stages:
        return tuple(_listed(config))
    if recursion.sharing == "none":
        return _segment("prelude", config, range(num_layers)), Segment("coda", 0, config)
    # The middle variants leave the first and the last layer unshared.
    edge = 1 if recursion.sharing.startswith("middle") else 0
    num_blocks = (num_layers - 2 * edge) // recursion.num_recursions
    order = schedule(recursion.sharing, recursion.num_recursions, num_blocks)
    layers = [block for blocks in order for block in blocks]
    stage = _segment("stage", config, [edge + layers.index(block) for block in range(num_blocks)], order)
    coda = _segment("coda", config, range(num_layers - edge, num_layers))
    return _segment("prelude", config, range(edge)), stage, coda


def _segment(
    name: str, config: Config, layers: Sequence[int], order: tuple[tuple[int, ...], ...] = (), own: Config | None = None
) -> Segment:
    """The segment whose blocks are, or first run as, these `layers` of the model."""
    sliding = (block for block, layer in enumerate(layers) if layer in config.model.sliding_layers)
    return Segment(name, len(layers), own or config, order, tuple(sliding))


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
            yield _segment(f"layers_{layer}", config, range(layer, stage.first_layer))
        own = stage_config(config, stage)
        order = schedule(stage.sharing, own.recursion.num_recursions, stage.num_layers)
        first, layer = stage.first_layer, stage.first_layer + stage.num_layers
        yield _segment(f"layers_{first}", config, range(first, layer), order, own)
    if layer < config.model.num_layers:
        yield _segment(f"layers_{layer}", config, range(layer, config.model.num_layers))


def uses_everything(config: Config) -> bool:
    """Whether every forward pass in training uses every parameter, whatever the routing.

    Blocks, routers and embeddings of recursions are used even where no token takes a recursion. Depth schedules and a
    fixed depth can leave recursions out, and a shared block's own norms and low-rank updates may belong to recursions
    that have no use for them.
    """
    for stage in stages(config):
        recursion, router = stage.config.recursion, stage.config.router
        if recursion.separate_norms or recursion.lora_rank or recursion.schedule != "constant":
            return False
        if isinstance(router, CustomRouterConfig) or (isinstance(router, FixedDepthConfig) and router.depth):
            return False
    return True
