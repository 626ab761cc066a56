"""A dense model made recursive: unique blocks that take weights of the layers they replace (arXiv 2410.20672).

    stepwise    block b of a stage takes one layer; the layers are evenly spaced from the stage's first to its last
    lower       the stage's first layers; upper: its last ones
    average     the mean of all layers that the block runs as
    svd_lora    the same, and as low-rank updates the truncated SVD of what each recursion's layer differs from the mean

With `recursion.separate_norms` every application keeps the norms of its own layer. Embedding, final norm, head and
unshared blocks are copied; recursion embeddings and input injection start as if they weren't there. Routers aren't
converted: a dense model has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from megamor.config import Config, FixedDepthConfig, RecursionConfig
from megamor.config.segments import segments
from megamor.errors import ConfigError
from megamor.model import Transformer, build_model
from megamor.model.blocks import Block

METHODS = ("stepwise", "average", "lower", "upper", "svd_lora")
MAY_DIFFER = {"num_layers", "head_width", "sliding_layers", "max_seq_len", "init_std", "document_positions"}
"""Settings of the backbone that are free, or compared in another way."""
CHECKED_TOKENS = 48
TOLERANCE = 1e-5
"""Largest difference of a hidden state from the original, relative to the layer's largest value."""


@dataclass(frozen=True)
class UniqueBlock:
    """A block of the target, named `name`, and where it is in the dense model.

    Its segment takes the place of the layers `span`, of which it is number `index` of `count`. `runs[r]` are the layers
    that it runs as in recursion r; none are known where the segment has more or fewer applications than layers.
    `sliding` says whether its attention is limited to a window.
    """

    name: str
    recursion: RecursionConfig
    index: int
    count: int
    span: range
    runs: tuple[tuple[int, ...], ...]
    sliding: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that it runs as."""
        return tuple(chain.from_iterable(self.runs))

    def sources(self, method: str) -> tuple[int, ...]:
        """The layers whose mean its shared weights are."""
        if self.layers and (method in ("average", "svd_lora") or len(self.span) == self.count):
            return self.layers
        first, last, steps = self.span[0], self.span[-1], max(1, self.count - 1)
        # first + index · (last - first) / steps, rounded half up in integers.
        stepwise = first + (2 * self.index * (last - first) + steps) // (2 * steps)
        return ({"stepwise": stepwise, "lower": first + self.index}.get(method, last + 1 - self.count + self.index),)

    def own(self, recursion: int, method: str) -> tuple[int, ...]:
        """The layers whose mean its norms in `recursion` are. Under `sequence` there may be several, or none."""
        return (self.runs[recursion] if self.runs else ()) or self.sources(method)


def unique_blocks(config: Config, num_layers: int) -> list[UniqueBlock]:
    """The target's blocks over a dense model of `num_layers`.

    With as many layers as applications, each application is a layer. With as many as unique blocks, each block is. Else
    a single stage takes the place of what the unshared blocks at the ends leave.

    Raises:
        ConfigError: the layers can't be divided in this way.
    """
    found = segments(config)
    stages = [number for number, segment in enumerate(found) if segment.schedule]
    sizes, unique = [s.num_applications if s.num_blocks else 0 for s in found], [s.num_blocks for s in found]
    wanted = f"{sum(sizes)} applications of {sum(unique)} unique blocks"
    if sum(sizes) != num_layers and sum(unique) == num_layers:
        sizes = unique
    elif len(stages) == 1:
        sizes[stages[0]] += num_layers - sum(sizes)
    if not stages:
        raise ConfigError("the target shares no layers: set recursion.sharing and recursion.num_recursions")
    if sum(sizes) != num_layers or any(size < count for size, count in zip(sizes, unique, strict=True)):
        raise ConfigError(
            f"the target's {wanted} can't be taken from a dense model of {num_layers} layers: give model.num_layers "
            "the dense model's, or share its layers otherwise"
        )
    blocks, begin = [], 0
    for segment, size in zip(found, sizes, strict=True):
        order = segment.schedule or (tuple(range(segment.num_blocks)),)
        infix = "blocks." if segment.schedule else ""
        for index in range(segment.num_blocks):
            runs = tuple(
                tuple(begin + r * len(row) + j for j, block in enumerate(row) if block == index)
                for r, row in enumerate(order)
            )
            known = runs if size == segment.num_applications else ()
            name, span = f"{segment.name}.{infix}{index}", range(begin, begin + size)
            recursion = segment.config.recursion if segment.schedule else RecursionConfig()
            sliding = index in segment.sliding
            blocks.append(UniqueBlock(name, recursion, index, segment.num_blocks, span, known, sliding))
        begin += size
    return blocks


def convert_depth(
    dense_config: Config, weights: Mapping[str, Tensor], config: Config, method: str
) -> dict[str, Tensor]:
    """State dict of the model of `config` from `weights` of the vanilla model of `dense_config`, named as theirs are.

    It has every name of the target's state dict but those of routers (`router_names`), which the caller draws. If every
    application is a layer, the target's forward pass with each application's own layer is compared with the dense one.

    Args:
        method: one of `METHODS`; svd_lora with an optional rank, as in `svd_lora:64`, which is `recursion.lora_rank`.

    Raises:
        ConfigError: the method or one of its requirements isn't met, or the models' backbones differ.
    """
    name = checked_method(method, config)
    blocks = unique_blocks(config, dense_config.model.num_layers)
    refuse_differences(dense_config, config, blocks, name)
    layers: list[dict[str, Tensor]] = [{} for _ in range(dense_config.model.num_layers)]
    converted: dict[str, Tensor] = {}
    for full, weight in weights.items():
        if full.startswith("prelude."):
            _, layer, rest = full.split(".", 2)
            layers[int(layer)][rest] = weight
        else:
            converted[full] = weight
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(config.run.seed))
    for block in blocks:
        own = [mean_of(layers, block.own(r, name)) for r in range(block.recursion.num_recursions)]
        shared = mean_of(layers, block.sources(name))
        for rest, weight in shared.items():
            path, full = rest.removesuffix(".weight"), f"{block.name}.{rest}"
            converted[full] = weight
            if weight.dim() == 1 and block.recursion.separate_norms:
                converted[full] = own[0][rest]
                converted |= {f"{block.name}.{path}.others.{r - 1}": own[r][rest] for r in range(1, len(own))}
            elif weight.dim() == 2 and (rank := block.recursion.lora_rank):
                for r, original in enumerate(own):
                    down = draw(rank, weight.shape[1]).to(weight.dtype) * config.model.init_std
                    up = weight.new_zeros(weight.shape[0], rank)
                    if name == "svd_lora":
                        # Ranks beyond the matrix's own keep a drawn `down`: with both at zero neither would ever learn.
                        u, s, vh = torch.linalg.svd(original[rest] - weight, full_matrices=False)
                        kept = min(rank, len(s))
                        down[:kept], up[:, :kept] = vh[:kept], u[:, :kept] * s[:kept]
                    converted |= {
                        f"{block.name}.{path}.down.{r}.weight": down,
                        f"{block.name}.{path}.up.{r}.weight": up,
                    }
    routers = router_names(config)
    for full, expected in build_model(config, device="meta").state_dict().items():
        if ".recursion_embedding." in full or ".injection." in full:
            converted[full] = torch.zeros(expected.shape, dtype=converted["norm.weight"].dtype)
        assert full in routers or converted[full].shape == expected.shape, f"{full} isn't converted"
    if is_checked(blocks):
        check_before_sharing(dense_config, weights, config, converted, layers, blocks)
    return converted


def router_names(config: Config) -> set[str]:
    """The weights that `convert_depth` leaves out: those of the model's routers."""
    prefixes = tuple(f"{segment.name}.router." for segment in segments(config) if segment.schedule)
    return {name for name in build_model(config, device="meta").state_dict() if name.startswith(prefixes)}


def is_checked(blocks: Sequence[UniqueBlock]) -> bool:
    """Whether every application is a layer of the dense model, so that `check_before_sharing` says something."""
    return all(block.layers for block in blocks)


def describe_check(dense_config: Config, config: Config) -> str:
    """What `convert_depth` has checked, in words."""
    if is_checked(unique_blocks(config, dense_config.model.num_layers)):
        return "checked: before sharing, the hidden states of every layer equal the original's"
    return (
        "not checked: with another number of applications than the original's layers, hidden states can't be compared"
    )


def mean_of(layers: Sequence[Mapping[str, Tensor]], chosen: Sequence[int]) -> dict[str, Tensor]:
    """The mean of the weights of some layers; those of a single one as they are."""
    if len(chosen) == 1:
        return dict(layers[chosen[0]])
    return {name: torch.stack([layers[n][name] for n in chosen]).mean(0) for name in layers[chosen[0]]}


def checked_method(method: str, config: Config) -> str:
    """The method's name. Raises ConfigError unless it is known and `config` has what it needs."""
    name, colon, rank = method.partition(":")
    if name not in METHODS or (colon and (name != "svd_lora" or not rank.isdecimal())):
        raise ConfigError(f"method {method!r} is unknown: give {', '.join(METHODS)}, or a rank as in svd_lora:64")
    if name == "svd_lora":
        for recursion in (segment.config.recursion for segment in segments(config) if segment.schedule):
            if not recursion.lora_rank or (colon and recursion.lora_rank != int(rank)):
                raise ConfigError(
                    f"{method} with recursion.lora_rank = {recursion.lora_rank}: set it to "
                    f"{rank or 'the rank of the updates'}, in every stage"
                )
            if not recursion.separate_norms:
                raise ConfigError(f"{method} needs the layers' own norms: set recursion.separate_norms, in every stage")
    return name


def refuse_differences(dense_config: Config, config: Config, blocks: Sequence[UniqueBlock], method: str) -> None:
    """Raises ConfigError, naming all settings in which the backbones differ, or what can't be converted."""
    dense, target = dense_config.model, config.model
    if any(segment.schedule for segment in segments(dense_config)):
        raise ConfigError("the model to convert has recursion stages: give a vanilla one")
    unused = {"attention_window", "attention_block"} if dense.attention == target.attention == "full" else set()
    unused |= set() if dense.sliding_layers or target.sliding_layers else {"sliding_window", "sliding_rope_theta"}
    names = ["head_dim", *(f.name for f in fields(dense) if f.name not in MAY_DIFFER | unused)]
    pairs = [(name, getattr(dense, name), getattr(target, name)) for name in names]
    differ = [f"model.{name} is {theirs} and in the target {ours}" for name, theirs, ours in pairs if theirs != ours]
    if method in ("average", "svd_lora") and not is_checked(blocks):
        depth = sum(segment.num_applications for segment in segments(config) if segment.num_blocks)
        differ.append(f"{method} needs {dense.num_layers} applications of blocks, and the target has {depth}")
    if config.recursion.residual_scaling != "none":
        differ.append("recursion.residual_scaling would change what the trained layers add to the stream: set none")
    for block in blocks:
        taken = {*block.layers, *block.sources(method)}
        if other := sorted(layer for layer in taken if (layer in dense.sliding_layers) != block.sliding):
            own, theirs = ("a sliding window", "the whole context")[:: 1 if block.sliding else -1]
            differ.append(
                f"{block.name} attends to {own}, and the layers {other} to {theirs}: change "
                "model.sliding_layers, or share layers so that each block replaces layers of one kind"
            )
    if differ:
        raise ConfigError("\n  ".join(["the dense model can't become the target:", *differ]))


@torch.no_grad()
def check_before_sharing(
    dense_config: Config,
    weights: Mapping[str, Tensor],
    config: Config,
    converted: Mapping[str, Tensor],
    layers: Sequence[Mapping[str, Tensor]],
    blocks: Sequence[UniqueBlock],
) -> None:
    """Compare the target's forward pass, each application with the matrices of its own layer, with the dense one.

    Recursions attend to their own keys and all are run, whatever `kv_policy` and router are. Norms that recursions have
    to themselves are the converted ones.

    Raises:
        AssertionError: the stream after an application isn't that of the dense model after its layer.
    """
    stages = tuple(replace(stage, router=None, kv_policy=None) for stage in config.recursion.stages)
    recursion = replace(config.recursion, kv_policy="recursion_wise", schedule="constant", stages=stages)
    plain = replace(config, recursion=recursion, router=FixedDepthConfig())
    dense, target = model_of(dense_config, weights), model_of(plain, converted, leave_out=router_names(config))
    of_layer = {layer: (block, target.get_submodule(block.name)) for block in blocks for layer in block.layers}
    streams: dict[Transformer, list[Tensor]] = {dense: [], target: []}

    def take_own_weights(module: nn.Module, _: Any) -> None:
        layer = len(streams[target])
        block, expected = of_layer[layer]
        assert module is expected, f"layer {layer} is computed by another block than {block.name}"
        single = all(len(run) < 2 for run in block.runs)
        module.load_state_dict(
            dict(unshared(module, layers[layer], block.recursion.separate_norms and single)), assign=True
        )

    def keep(model: Transformer, module: nn.Module, _: Any, output: Any) -> None:
        streams[model].append(output[0])

    for model in (dense, target):
        for module in (module for module in model.modules() if isinstance(module, Block)):
            module.register_forward_hook(partial(keep, model))
            if model is target:
                module.register_forward_pre_hook(take_own_weights)
    length = min(CHECKED_TOKENS, config.model.max_seq_len, dense_config.model.max_seq_len)
    tokens = torch.randint(config.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    for model in (dense, target):
        streams[model].append(model(tokens, mode="causal").logits)
    for layer, (expected, found) in enumerate(zip(streams[dense], streams[target], strict=True)):
        where = f"layer {layer}" if layer < len(layers) else "the head"
        error, scale = (found - expected).abs().max(), expected.abs().max()
        if not error <= TOLERANCE * scale:  # nor NaN; and no assert statement, which `python -O` leaves out
            raise AssertionError(f"{where} isn't the original's: differs by {error} of {scale}")


def unshared(module: nn.Module, layer: Mapping[str, Tensor], keep_norms: bool) -> Iterator[tuple[str, Tensor]]:
    """State of the block `module` that computes what a dense `layer` does; with `keep_norms` by its own norms."""
    for name, value in module.state_dict().items():
        path, _, number = name.partition(".others.")
        if ".up." in name:
            yield name, torch.zeros_like(value)
        elif ".down." in name or (value.dim() == 1 and keep_norms):
            yield name, value
        else:
            yield name, layer[f"{path}.weight" if number else name]


def model_of(config: Config, weights: Mapping[str, Tensor], leave_out: Sequence[str] | set[str] = ()) -> Transformer:
    """The model of `config` around `weights`, which aren't copied."""
    model = build_model(config, device="meta")
    model.load_state_dict({n: w for n, w in weights.items() if n not in leave_out}, assign=True)
    return model.eval()
