"""Weights to start from: `init.from`. What a run resumes from its own checkpoints, or branches from, is in `run_state`.

Every rank reads the source and copies its weights into the whole model that it has just built, before the backend
shards it. Names and shapes must match; what `init` leaves out is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megamor.checkpoint import describe_origin, iterate_state, open_checkpoint, state_shapes
from megamor.checkpoint.layout import TOKENIZER_FILE
from megamor.checkpoint.state import AVERAGE_PREFIX, shape_differences
from megamor.codec import read_tokenizer
from megamor.config import Config
from megamor.config.changes import Effect, changes
from megamor.config.paths import expand_paths
from megamor.config.segments import stages
from megamor.errors import ConfigError
from megamor.interop.dense import HUB
from megamor.interop.depth import convert_depth, describe_check
from megamor.interop.export import is_export
from megamor.load import Source, read_source, refuse_missing
from megamor.model import Transformer
from megamor.ranks import from_first_rank, run_on_all_ranks

_LORA = re.compile(r"\.(down|up)\.\d+\.weight$")
_OF_RECURSION = re.compile(r"\.(?:others|down|up|recursion_embedding|injection|heads|aux_router)\.(\d+)(?=\.|$)")
"""A parameter of one recursion, and its number."""
_SHOWN = 60
"""How many weights that don't fit an error lists."""


def warm_start(model: Transformer, config: Config) -> tuple[dict[str, Any], list[str]]:
    """Give the whole `model`, freshly built, the weights that `init.from` names. Collective.

    Returns:
        `TrainerState.started_from`, which is empty without `init.from`, and what the user should be told.

    Raises:
        MegamorError: on every rank, if the source can't be read or its weights don't fit.
    """
    if config.init.from_ is None:
        return {}, ["starting from the beginning"]
    expanded = run_on_all_ranks(lambda: expand_paths(config))
    # Only one rank looks, so that all read the same checkpoint of a run that may still be training.
    path = from_first_rank(lambda: locate(str(expanded.init.from_)))
    source = run_on_all_ranks(lambda: read_source(path))
    told = run_on_all_ranks(lambda: _load(model, expanded, source))
    converted = {} if config.init.convert is None else {"convert": config.init.convert}
    return {**source.origin, **converted}, [f"starting from {describe_origin(source.origin)}", *told]


def locate(source: str) -> str:
    """`source`, or the checkpoint that it means, after a comparison with all hashes of its manifest."""
    refuse_missing(source)
    if source.startswith(HUB) or is_export(Path(source)):
        return source
    return str(open_checkpoint(source, full=True).directory)


def _load(model: Transformer, config: Config, source: Source) -> list[str]:
    """Copy weights of `source` into `model`; returns what should be told."""
    check_tokenizer(source, config)
    weights, method = source.weights | (_averages(source) if config.init.average else {}), config.init.convert
    if method is None:
        # Shapes don't show these.
        differ = [change for change in changes(source.config, config) if change.effect is Effect.FUNCTION]
        told = [f"  warning: the source had another {c}" for c in differ if c.name != "data.tokenizer"]
    else:
        weights = convert_depth(source.config, weights, config, method)
        told = [f"  {describe_check(source.config, config)}"]
    taken, left_out = select(weights, source.config, model, config)
    own = model.state_dict()
    for name, tensor in taken.items():
        target = own[name][: len(tensor)] if tensor.ndim else own[name]
        target.copy_(tensor)
    return told + left_out


def select(
    weights: Mapping[str, Tensor], old: Config, model: Transformer, config: Config
) -> tuple[dict[str, Tensor], list[str]]:
    """What `model` takes of the `weights` of a model of `old`, by name, and what should be told about the rest.

    A tensor may have fewer rows than the model's.

    Raises:
        ConfigError: naming every weight that is missing, unknown or of another shape, and not left out by `init`.
    """
    init, shapes = config.init, {name: value.shape for name, value in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters()}

    def is_fresh(name: str) -> bool:
        if not _is_router(name):
            return init.lora == "fresh" and _LORA.search(name) is not None
        fresh = init.router == "fresh" or init.convert is not None  # a dense model has none
        return fresh or (init.router == "weights" and name not in parameters)

    given = {name: weight for name, weight in weights.items() if not is_fresh(name)}
    needed = {name: shape for name, shape in shapes.items() if not is_fresh(name)}
    copied = {name: given[of] for name in needed if name not in given and (of := _recursion_before(name, given))}
    given |= copied
    allowed = {name for name in {*given, *needed} if _is_below(name, init.allow_missing)}
    if unknown := [each for each in init.allow_missing if not any(_is_below(n, [each]) for n in {*given, *shapes})]:
        raise ConfigError(f"init.allow_missing names {', '.join(unknown)}, which neither model has: correct it")
    taken = {name: weight for name, weight in given.items() if weight.shape == needed.get(name)}
    before, now = old.model.vocab_size, config.model.vocab_size
    for name in allowed.intersection(given, needed):
        if before < now and [*given[name].shape] == [before, *needed[name][1:]] and needed[name][0] == now:
            taken[name] = given[name]
    left_out = [name for name in dict.fromkeys([*needed, *given]) if name not in taken]
    if refused := [name for name in left_out if name not in allowed]:
        raise ConfigError(_refusal(refused, given, needed, old, config))
    groups = {
        "copied from the recursion before": [*copied],
        "drawn anew": [name for name in shapes if name not in taken],
        f"drawn anew from row {before}": [name for name in taken if taken[name].shape != shapes[name]],
        "not used": [name for name in weights if name not in taken],
    }
    return taken, [f"  {what}: {', '.join(_prefixes(n, {*weights, *shapes}))}" for what, n in groups.items() if n]


def _recursion_before(name: str, given: Collection[str]) -> str | None:
    """The same parameter of the last recursion before that of `name` that is given; None if there is none.

    The norms of the first recursion are the block's own.
    """
    if (found := _OF_RECURSION.search(name)) is None:
        return None
    start, end = found.span(1)
    earlier = [f"{name[:start]}{number}{name[end:]}" for number in reversed(range(int(found[1])))]
    first = [f"{name[: found.start()]}.weight"] if ".others." in name else []
    return next((each for each in [*earlier, *first] if each in given), None)


def _is_router(name: str) -> bool:
    return "router" in name.split(".")


def _is_below(name: str, prefixes: Collection[str]) -> bool:
    """Whether `name` is one of `prefixes` or continues one after a dot."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def _prefixes(names: Collection[str], among: Collection[str]) -> list[str]:
    """The shortest beginnings of `names` that are the beginning of no other name `among` all."""

    def beginnings(name: str) -> Iterator[str]:
        parts = name.split(".")
        return (".".join(parts[:count]) for count in range(1, len(parts) + 1))

    others = {beginning for name in among if name not in {*names} for beginning in beginnings(name)}
    return list(dict.fromkeys(next((b for b in beginnings(name) if b not in others), name) for name in names))


def _refusal(
    refused: list[str], given: Mapping[str, Tensor], needed: Mapping[str, Any], old: Config, config: Config
) -> str:
    """The error that names the weights that don't fit, the settings behind them, and how to leave them out."""
    stored = {name: given[name].shape for name in refused if name in given}
    differences = shape_differences(stored, {name: needed[name] for name in refused if name in needed})
    if (more := len(differences) - _SHOWN) > 1:
        differences[_SHOWN:] = [f"and {more} more"]
    others = [name for name in refused if not (_is_router(name) or _LORA.search(name))]
    fixes = ["init.router=fresh"] if any(map(_is_router, refused)) else []
    fixes += ["init.lora=fresh"] if any(map(_LORA.search, refused)) else []
    names = [*config.init.allow_missing, *_prefixes(others, {*given, *needed})]
    fixes += [f"init.allow_missing=[{','.join(names)}]"] if others else []
    settings = [str(c) for c in changes(old, config) if re.match(r"(model|recursion)\.", c.name)]
    told = [f"Settings of the source and of this run: {'; '.join(settings)}"] if settings else []
    if stages(config) and not stages(old):
        told.append("To make a dense model recursive, set init.convert: stepwise, for example")
    told.append("Change the model's settings or, to leave these out and draw what is missing, set " + " ".join(fixes))
    head = f"the weights of init.from = {config.init.from_} don't fit this run's model:"
    return "\n".join(["\n  ".join([head, *differences]), *told])


def _averages(source: Source) -> dict[str, Tensor]:
    """The moving averages of a checkpoint's weights, by name. Raises ConfigError if it has none."""
    directory = Path(source.origin["source"])
    stored = state_shapes(directory) if "step" in source.origin else {}
    names = [name for name in stored if name.startswith(AVERAGE_PREFIX) and name != f"{AVERAGE_PREFIX}updates"]
    if not names:
        raise ConfigError(f"init.average: {directory} has no moving average (optim.average_decay): set false")
    return {name.removeprefix(AVERAGE_PREFIX): tensor for name, tensor in iterate_state(directory, names=names)}


def check_tokenizer(source: Source, config: Config) -> None:
    """Refuse another tokenizer than the source's: its ids would mean other tokens.

    Two files are the same tokenizer if they give a text the same ids; decoders and templates may differ.
    """
    path, own = source.files.get(TOKENIZER_FILE), config.data.tokenizer
    if path is None or own is None or "data.tokenizer" in config.checkpoint.allow_changes:
        return
    old, new = (json.loads(read_tokenizer(each).to_str()) for each in (path, own))
    differ = [key for key in ("model", "added_tokens", "normalizer", "pre_tokenizer") if old[key] != new[key]]
    if differ:
        raise ConfigError(
            f"data.tokenizer = {own} isn't the tokenizer that the weights were trained with, {path}: "
            f"{', '.join(differ)} differ. Preprocess with that one, or allow it: "
            "checkpoint.allow_changes=[data.tokenizer]"
        )
