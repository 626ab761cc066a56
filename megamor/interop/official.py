"""Import of models trained with the paper authors' released code (github.com/raymin0223/mixture_of_recursions).

Their state dict is that of a Llama model (`model.embed_tokens`, `model.layers`, `model.norm`, `lm_head`). It stores a
shared layer once for every application, whether the copies are tied or not:

    recursive          model.layers.{layer}.*                        one for each of the L effective layers
    expert-choice      model.layers.{e + r}.block.{j}.*              recursion r, j-th layer; e = 1 for middle_cycle
                       model.layers.{e + r}.mor_router.router.*      and mlp_router.router.* for auxiliary routers
    token-choice       model.layers.{e}.block_list.{r}.{j}.*         for cycle the index {e} is absent
                       model.layers.{e}.mor_router.router.*          and router_bias under loss-free balancing
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from megamor.config import Config, ExpertChoiceConfig
from megamor.config.segments import segments
from megamor.errors import CheckpointError
from megamor.interop.official_config import Settings, Shape, config_of
from megamor.interop.weights import BLOCK_WEIGHTS, EMBEDDING, HEAD, NORM, Imported, check_names, fp32
from megamor.model import build_model

Untied = Literal["first", "mean"]

BALANCING_BIAS = "stage.router.bias"


def import_official(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], *, untied: Untied | None = None
) -> Imported:
    """Translate a released state dict and the settings of its run.

    Args:
        state: as `read_state_dict` returns it.
        settings: the run's YAML file as nested plain values.
        untied: what to do with attention weights that differ between recursions: refuse (None), use those of the
            first recursion, or their mean. Neither gives the model that was trained.

    Raises:
        CheckpointError: naming a weight that is missing, unknown, of another shape, or un-tied.
        ConfigError: naming a setting that has no counterpart in megamor.
    """
    run = Settings(settings)
    config = config_of(run, shape_of(state))
    sources = sources_of(config, run.routing)
    check_names(state, {key for keys in sources.values() for key in keys})
    expected = {name: value.shape for name, value in build_model(config, device="meta").state_dict().items()}
    # Every copy of a shared weight is compared: if copies differ, the model isn't the one its settings describe.
    weights: dict[str, Tensor] = {}
    reduced: list[str] = []
    for name, keys in sources.items():
        copies = [fp32(state, key, expected[name]) for key in keys]
        if all(torch.equal(copy, copies[0]) for copy in copies):
            weights[name] = copies[0]
        else:
            weights[name] = reduce_copies(name, keys, copies, untied)
            reduced.append(name)
    if BALANCING_BIAS in expected:
        weights.setdefault(BALANCING_BIAS, torch.zeros(expected[BALANCING_BIAS]))  # only loss-free runs store one
    assert weights.keys() == expected.keys()
    return Imported(config, weights, tuple(reduced))


def shape_of(state: Mapping[str, Tensor]) -> Shape:
    """Widths and effective depth, from names and shapes of the weights."""

    def first(pattern: str) -> Tensor:
        found = next((value for name, value in state.items() if re.fullmatch(pattern, name)), None)
        if found is None or found.dim() != 2:
            some = next(iter(state), "nothing")
            raise CheckpointError(
                f"no matrix is named {pattern!r}: this is not a state dict of the released code (it contains {some} …)"
            )
        return found

    embedding = first(re.escape(EMBEDDING))
    # One query projection for each application of a layer, shared or not.
    depth = sum(name.endswith(".self_attn.q_proj.weight") for name in state)
    hidden = [value.shape[0] for name, value in state.items() if name.endswith(".mor_router.router.0.weight")]
    return Shape(
        vocab_size=embedding.shape[0],
        dim=embedding.shape[1],
        kv_dim=first(r"model\.layers\..*self_attn\.k_proj\.weight").shape[0],
        ffn_dim=first(r"model\.layers\..*mlp\.up_proj\.weight").shape[0],
        num_layers=depth,
        router_hidden=hidden[0] if hidden else 0,
        tied_head=HEAD not in state or torch.equal(state[HEAD], embedding),
    )


def sources_of(config: Config, routing: str | None) -> dict[str, list[str]]:
    """megamor's name of a weight → the names of all its copies in the released state dict."""
    sources = {"embed.weight": [EMBEDDING], "norm.weight": [NORM]}
    if not config.model.tied_head:
        sources["head.weight"] = [HEAD]
    for recursion, ours, theirs in applications(config, routing):
        # Applications of one shared block have the same name in megamor, so their copies gather in one list.
        for our_weight, their_weight in BLOCK_WEIGHTS.items():
            name = f"{ours}.{our_weight}.weight"
            if recursion and config.recursion.separate_norms and our_weight.endswith("_norm"):
                name = f"{ours}.{our_weight}.others.{recursion - 1}"
            sources.setdefault(name, []).append(f"{theirs}.{their_weight}.weight")
    if routing is not None:
        sources.update(router_sources(config, routing))
    return sources


def applications(config: Config, routing: str | None) -> list[tuple[int, str, str]]:
    """Every application of a block, in order: recursion, megamor's prefix, the released code's prefix."""
    found: list[tuple[int, str, str]] = []
    layer = 0  # of the released code's list of layers
    for segment in segments(config):
        blocks, order = segment.num_blocks, segment.schedule
        for recursion, index in product(range(len(order)), range(blocks)):
            theirs = {
                None: f"model.layers.{layer + recursion * blocks + index}",
                "expert": f"model.layers.{layer + recursion}.block.{index}",
                "token": f"{token_stage(layer)}.block_list.{recursion}.{index}",
            }[routing]
            found.append((recursion, f"stage.blocks.{order[recursion][index]}", theirs))
        if order:
            layer += {None: len(order) * blocks, "expert": len(order), "token": 1}[routing]
        else:
            found += [(0, f"{segment.name}.{i}", f"model.layers.{layer + i}") for i in range(blocks)]
            layer += blocks
    return found


def token_stage(num_prelude: int) -> str:
    """Prefix of a token-choice model's recursion stage: one of the layers, or for cycle the list of layers itself."""
    return f"model.layers.{num_prelude}" if num_prelude else "model.layers"


def router_sources(config: Config, routing: str) -> dict[str, list[str]]:
    """The entries of `sources_of` for the routers."""
    linear = getattr(config.router, "head", "linear") == "linear"
    parts = {"weight": "weight"} if linear else {"fc1.weight": "0.weight", "fc2.weight": "2.weight"}
    num_prelude = segments(config)[0].num_blocks
    if routing == "token":
        stage = token_stage(num_prelude)
        sources = {f"stage.router.head.{p}": [f"{stage}.mor_router.router.{q}"] for p, q in parts.items()}
        if getattr(config.router, "balancing", "") == "loss_free":
            sources[BALANCING_BIAS] = [f"{stage}.router_bias"]
        return sources
    kinds = {"heads": "mor_router"}
    if isinstance(config.router, ExpertChoiceConfig) and config.router.sampling == "aux_router":
        kinds["aux_router"] = "mlp_router"
    return {
        f"stage.router.{ours}.{r}.{p}": [f"model.layers.{num_prelude + r}.{theirs}.router.{q}"]
        for ours, theirs in kinds.items()
        for r in range(config.recursion.num_recursions)
        for p, q in parts.items()
    }


def reduce_copies(name: str, keys: list[str], copies: list[Tensor], untied: Untied | None) -> Tensor:
    """One weight from copies that differ. Only attention weights may, and only if the user allows it.

    Raises:
        CheckpointError: naming two copies that differ.
    """
    other = next(key for key, copy in zip(keys, copies, strict=True) if not torch.equal(copy, copies[0]))
    if ".attention." not in name:
        raise CheckpointError(
            f"{keys[0]} and {other} differ, but the run config shares them between recursions: the weights are from "
            "another run"
        )
    if untied is None:
        raise CheckpointError(
            f"attention is un-tied: {keys[0]} and {other} differ. The released expert-choice code creates the "
            "attention of every recursion anew after sharing the layers, so its models have more parameters than the "
            "paper says (360M with 3 recursions: 167M instead of 118M) and no exact counterpart in megamor. To import "
            "an approximation to train further, pass --untied first (weights of the first recursion) or --untied mean"
        )
    return copies[0] if untied == "first" else torch.stack(copies).mean(0)
