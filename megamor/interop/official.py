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

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megamor.checkpoint import CheckpointManager, TrainerState, code_revision, layout, library_versions
from megamor.checkpoint.layout import CONFIG_FILE, TOKENIZER_FILE, TRAINER_FILE
from megamor.checkpoint.state import MODEL_PREFIX, write_state
from megamor.config import Config, ExpertChoiceConfig, config_to_yaml
from megamor.config.segments import segments
from megamor.errors import CheckpointError, ConfigError
from megamor.interop.official_config import Settings, Shape, config_of
from megamor.lock import WriteLock
from megamor.model import build_model

Untied = Literal["first", "mean"]

BLOCK_WEIGHTS = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
"""Weights of a block: megamor's name → the released code's."""

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BALANCING_BIAS = "stage.router.bias"
FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Imported:
    """A model from a released checkpoint.

    `weights` are fp32 and named as in `Transformer.state_dict()`; `untied` names those whose copies differed and were
    reduced to one.
    """

    config: Config
    weights: dict[str, Tensor]
    untied: tuple[str, ...] = ()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Weights of a `.safetensors` or PyTorch file, or of the directory that holds `model.safetensors` or
    `pytorch_model.bin`.

    Raises:
        CheckpointError: there is no such file, or it contains something else.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path} contains neither {' nor '.join(FILES)}: give the file itself")
        path = found[0]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message is long, and advises to switch the check off
        raise CheckpointError(f"{path} holds something else than tensors, which was not run") from error
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"can't read the weights in {path}: {error}") from error
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a state dict (a mapping from names to tensors)")
    return dict(state)


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
        copies = [state[key].float() for key in keys]
        for key, copy in zip(keys, copies, strict=True):
            if copy.shape != expected[name]:
                raise CheckpointError(f"{key} has shape {tuple(copy.shape)} instead of {tuple(expected[name])}")
        if all(torch.equal(copy, copies[0]) for copy in copies):
            weights[name] = copies[0].clone()
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
    )


def sources_of(config: Config, routing: str | None) -> dict[str, list[str]]:
    """megamor's name of a weight → the names of all its copies in the released state dict."""
    sources = {"embed.weight": [EMBEDDING], "norm.weight": [NORM]}
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


def check_names(state: Mapping[str, Tensor], wanted: set[str]) -> None:
    """Refuse a state dict that lacks a copy, has anything else, or has a head that isn't the embedding."""
    missing = sorted(wanted - state.keys())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{missing[0]} is missing{more}: the weights are from another run than the config describes"
        )
    extra = [key for key in state if key not in wanted | {HEAD} and not key.endswith("rotary_emb.inv_freq")]
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(f"{extra[0]}{more} is not in the model that the run config describes")
    if HEAD in state and not torch.equal(state[HEAD], state[EMBEDDING]):
        raise CheckpointError(
            f"{HEAD} differs from {EMBEDDING}: this model has an output head of its own (as the released recursive "
            "baseline does) and can't be imported; megamor's head is tied to the embedding, as in the paper"
        )


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
    return copies[0].clone() if untied == "first" else torch.stack(copies).mean(0)


def save_imported(imported: Imported, directory: Path, tokenizer: Path | None = None) -> Path:
    """Write the checkpoint with a `tokenizer.json`. Raises ConfigError if there is none, else as `save_weights`."""
    if tokenizer is not None and not tokenizer.is_file():
        raise ConfigError(f"{tokenizer} is not a file: give a tokenizer.json")
    files: dict[str, str | bytes | Path] = {CONFIG_FILE: config_to_yaml(imported.config)}
    if tokenizer is not None:
        files[TOKENIZER_FILE] = tokenizer
    return save_weights(directory, {MODEL_PREFIX + name: weight for name, weight in imported.weights.items()}, files)


def refuse_occupied(directory: Path) -> None:
    """Raise ConfigError unless `directory` is new or empty, and can be made."""
    found = next(path for path in (directory, *directory.parents) if path.exists())
    if not found.is_dir() or (found == directory and any(found.iterdir())):
        raise ConfigError(f"{found} exists and is not an empty directory: give another output")


def save_weights(
    directory: Path,
    weights: Mapping[str, Tensor],
    files: Mapping[str, str | bytes | Path],
    **record: Any,
) -> Path:
    """Write a checkpoint for evaluation, generation, serving and export: weights without optimizer state.

    The new or empty `directory` will contain the checkpoint `step_00000000` and `latest`. `weights` have stored names,
    `files` are configuration and tokenizer, and `record` are further fields of `TrainerState`.

    Raises:
        ConfigError: `directory` is in use.
        CheckpointError: it can't be written.
    """
    refuse_occupied(directory)
    trainer = TrainerState(
        step=0,
        tokens_seen=0,
        data={},
        world_size=1,
        backend="single",
        **record,
        code_revision=code_revision(),
        versions=library_versions(),
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with WriteLock(directory, str(directory), "give another output"):
        if layout.published_steps(directory):
            raise ConfigError(f"another process has just written a checkpoint to {directory}: give another output")
        writers = [partial(write_state, tensors=weights)]
        return CheckpointManager(directory, keep_last=1).save(0, writers, {**files, TRAINER_FILE: trainer.to_json()})
