"""Weights to start from: `init.from`. What this run resumes from its own checkpoints is in `run_state`.

Every rank reads the source and copies what fits into the whole model that it has just built, before the backend shards
it. Names must match, unless the user says that something may be left out; a weight is never left out silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megamor.checkpoint import describe_origin, iterate_state, open_checkpoint, state_shapes
from megamor.checkpoint.layout import TOKENIZER_FILE
from megamor.checkpoint.state import AVERAGE_PREFIX
from megamor.codec import read_tokenizer
from megamor.config import Config
from megamor.config.changes import Effect, changes
from megamor.config.paths import expand_paths
from megamor.errors import ConfigError
from megamor.interop.dense import is_dense
from megamor.interop.export import is_export
from megamor.load import Source, read_source
from megamor.model import Transformer
from megamor.ranks import from_first_rank, run_on_all_ranks

_LORA = re.compile(r"\.(down|up)\.\d+\.weight$")
_OF_RECURSION = re.compile(r"\.(?:others|down|up|recursion_embedding|injection|heads|aux_router)\.(\d+)(?=\.|$)")
"""A parameter of one recursion, and its number."""


def warm_start(model: Transformer, config: Config) -> tuple[dict[str, Any], list[str]]:
    """Give the whole `model`, freshly built, the weights that `init.from` names. Collective.

    Returns:
        `TrainerState.started_from`, which is empty without `init.from`, and what the user should be told.

    Raises:
        ConfigError, CheckpointError: on every rank, if the source can't be read or its weights don't fit.
    """
    if config.init.from_ is None:
        return {}, ["starting from the beginning"]
    expanded = run_on_all_ranks(lambda: expand_paths(config))
    # Only one rank looks, so that all read the same checkpoint of a run that may still be training.
    path = from_first_rank(lambda: locate(str(expanded.init.from_)))
    source = run_on_all_ranks(lambda: read_source(path))
    told = run_on_all_ranks(lambda: _load(model, expanded, source))
    return source.origin, [f"starting from {describe_origin(source.origin)}", *told]


def locate(source: str) -> str:
    """`source`, or the checkpoint that it means, after a comparison with all hashes of its manifest."""
    if is_dense(source) or is_export(Path(source)):
        return source
    return str(open_checkpoint(source, full=True).directory)


def _load(model: Transformer, config: Config, source: Source) -> list[str]:
    """Copy weights of `source` into `model`; returns what should be told."""
    check_tokenizer(source, config)
    weights = source.weights | (_averages(source) if config.init.average else {})
    selection = Selection.of(weights, source.config, model, config)
    own = model.state_dict()
    for name, tensor in selection.taken.items():
        target = own[name][: len(tensor)] if tensor.ndim else own[name]
        target.copy_(tensor)
    return [*_warnings(source, config), *selection.describe()]


@dataclass(frozen=True)
class Selection:
    """What is taken of a source's weights, and what isn't."""

    taken: dict[str, Tensor]
    """By name in the model. A tensor may have fewer rows than the model's."""
    copied: list[str]
    """Names of what recursions that the source lacks have, which is taken from the recursion before."""
    drawn: list[str]
    """Names in the model that keep what was drawn."""
    unused: list[str]
    """Names in the source that aren't used."""

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], old: Config, model: Transformer, config: Config) -> Selection:
        """Compare the `weights` of a model of `old` with those that `model` needs.

        Raises:
            ConfigError: naming every weight that is missing, unknown or of another shape, and not left out by `init`.
        """
        init, wanted = config.init, {name: value.shape for name, value in model.state_dict().items()}
        parameters = {name for name, _ in model.named_parameters()}

        def is_fresh(name: str) -> bool:
            if "router" in name.split("."):
                return init.router == "fresh" or (init.router == "weights" and name not in parameters)
            return init.lora == "fresh" and _LORA.search(name) is not None

        given = {name: weight for name, weight in weights.items() if not is_fresh(name)}
        needed = [name for name in wanted if not is_fresh(name)]
        copied = {name: given[of] for name in needed if name not in given and (of := _recursion_before(name, given))}
        given |= copied
        vocabularies = [(old.model.vocab_size,), (config.model.vocab_size,)]
        allowed = {name for name in {*given, *needed} if _is_below(name, init.allow_missing)}
        if unknown := [each for each in init.allow_missing if not any(_is_below(n, [each]) for n in {*given, *wanted})]:
            raise ConfigError(f"init.allow_missing names {', '.join(unknown)}, which neither model has: correct it")
        fits = {name for name in needed if name in given and given[name].shape == wanted[name]}
        grown = {
            name
            for name in allowed.intersection(needed, given)
            if [given[name].shape[:1], wanted[name][:1]] == vocabularies
            and given[name].shape[1:] == wanted[name][1:]
            and vocabularies[0] < vocabularies[1]
        }
        left_out = [name for name in dict.fromkeys([*needed, *given]) if name not in fits | grown]
        if refused := [name for name in left_out if name not in allowed]:
            raise ConfigError(_refusal(refused, given, {name: wanted[name] for name in needed}, config))
        taken = {name: given[name] for name in needed if name in fits | grown}
        drawn = [name for name in wanted if name not in taken]
        return cls(taken, [*copied], drawn, [name for name in weights if name not in taken])

    def describe(self) -> Iterator[str]:
        """A line for each group of weights that aren't simply taken."""
        groups = {
            "copies of the recursion before": self.copied,
            "drawn anew": self.drawn,
            "not used": self.unused,
        }
        for what, names in groups.items():
            if names:
                yield f"  {what}: {', '.join(_prefixes(names, [*self.taken, *self.drawn, *self.unused]))}"


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


def _is_below(name: str, prefixes: Collection[str]) -> bool:
    """Whether `name` is one of `prefixes` or continues one after a dot."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def _prefixes(names: Collection[str], among: Collection[str]) -> list[str]:
    """The shortest beginnings of `names` that are the beginning of no other name `among` all."""
    others = [name for name in among if name not in {*names}]
    found = []
    for name in names:
        parts = name.split(".")
        beginnings = (".".join(parts[:count]) for count in range(1, len(parts)))
        found.append(next((each for each in beginnings if not any(_is_below(o, [each]) for o in others)), name))
    return list(dict.fromkeys(found))


def _refusal(refused: list[str], given: Mapping[str, Tensor], needed: Mapping[str, Any], config: Config) -> str:
    """The error that names all weights that don't fit, and how to leave them out."""
    init, lines = config.init, []
    for name in refused:
        if name not in needed:
            lines.append(f"{name} {tuple(given[name].shape)} is not in the model")
        elif name not in given:
            lines.append(f"{name} {tuple(needed[name])} is missing")
        else:
            lines.append(f"{name} is {tuple(given[name].shape)} instead of {tuple(needed[name])}")
    routers = [name for name in refused if "router" in name.split(".")]
    lora = [name for name in refused if _LORA.search(name)]
    others = _prefixes([n for n in refused if n not in {*routers, *lora}], [*given, *needed])
    fixes = ["init.router=fresh"] if routers else []
    fixes += ["init.lora=fresh"] if lora else []
    fixes += [f"init.allow_missing=[{','.join([*init.allow_missing, *others])}]"] if others else []
    return (
        "\n  ".join([f"the weights of init.from = {init.from_} don't fit this run's model:", *lines])
        + f"\nChange the model's settings or, to leave these out and draw what is missing, set {' '.join(fixes)}"
    )


def _averages(source: Source) -> dict[str, Tensor]:
    """The moving averages of a checkpoint's weights, by name. Raises ConfigError if it has none."""
    directory = Path(source.origin["source"])
    stored = state_shapes(directory) if "step" in source.origin else {}
    names = [name for name in stored if name.startswith(AVERAGE_PREFIX) and name != f"{AVERAGE_PREFIX}updates"]
    if not names:
        raise ConfigError(f"init.average: {directory} has no moving average (optim.average_decay): set false")
    return {name.removeprefix(AVERAGE_PREFIX): tensor for name, tensor in iterate_state(directory, names=names)}


def _warnings(source: Source, config: Config) -> Iterator[str]:
    """What the source's weights were trained with and this run changes, as far as it changes their function."""
    for change in changes(source.config, config):
        if change.effect is Effect.FUNCTION and change.name != "data.tokenizer":
            yield f"warning: the source was trained with another {change}"


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
