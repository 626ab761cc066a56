"""Conversion of layers of plain YAML values to a `Config`, and back to plain values.

Pydantic checks types and ranges, which the schema declares, and finds all problems at once. What is here beside that is
the merging of layers, and error messages that name the source of a value and the probable fix.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from megamor.config.constraints import ByKind
from megamor.config.routers import FixedDepthConfig, RouterConfig
from megamor.config.schema import Config, DepthStep, RampConfig, RopeScalingConfig, SourceConfig, StageConfig
from megamor.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

ROUTERS: dict[str, type] = {router.kind: router for router in get_args(RouterConfig)}
"""`router.kind` -> its settings."""
_ITEMS: dict[Any, str] = {
    SourceConfig: " or a bare prefix",
    RampConfig: "",
    StageConfig: "",
    DepthStep: "",
    RopeScalingConfig: "",
}
"""Dataclasses that are values of settings or items of lists, and what may be written instead."""
_WORDS: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def config_from_dict(values: Mapping[str, Any], source: str = "config") -> Config:
    """Build a `Config` from nested plain values; absent keys take their defaults.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, missing values; all of them in one message, which
            names `source`.
    """
    return config_from_layers([(source, values)])


def config_from_layers(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """Build a `Config` from (source, values) pairs, of which a later one overrides an earlier one key by key.

    Raises:
        ConfigError: as `config_from_dict`; each problem names the source of its value.
    """
    from pydantic import ValidationError

    sources = {"": layers[-1][0]}  # dotted key -> where its value came from
    values: dict[str, Any] = {}
    # Pydantic's strict mode converts lists to tuples and mappings to dataclasses only when it reads JSON.
    try:
        for source, layer in layers:
            values = _merge(values, layer, "", source, sources)
        document = json.dumps(_spelled_out(values), default=repr, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        text = error.object[max(error.start - 40, 0) : error.end + 40]
        raise ConfigError(f"{layers[-1][0]}: a string isn't Unicode text: {text!r}") from error
    except (ValueError, RecursionError) as error:  # YAML's aliases can do that
        raise ConfigError(f"{layers[-1][0]}: a value contains itself, or is nested too deeply") from error
    try:
        return _adapter().validate_json(document, strict=True, extra="forbid")
    except ValidationError as error:
        problems = [_explain(problem, sources) for problem in error.errors(include_url=False)]
    raise ConfigError("\n  ".join(["the configuration can't be read:", *problems]))


def config_to_dict(config: Config) -> dict[str, Any]:
    """The nested dicts, lists and scalars from which `config_from_dict` builds an equal configuration."""
    values: dict[str, dict[str, Any]] = json.loads(json.dumps(asdict(config)))
    return {section: {setting_name(name): value for name, value in own.items()} for section, own in values.items()}


def setting_name(field: str) -> str:
    """The setting that a field of the schema declares: `from_` is `from`, which Python reserves."""
    return field.removesuffix("_")


@cache
def _adapter() -> TypeAdapter[Config]:
    """Built on first use: importing pydantic and compiling the schema take .15 s, which `--help` need not wait for."""
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


# --- layers -----------------------------------------------------------------------------------------------------------


class Added(dict[str, Any]):
    """The inner mapping of a dotted override: `data.validation.x=...` adds to a setting that a mapping replaces."""


def _merge(
    base: Mapping[str, Any], layer: Mapping[str, Any], key: str, source: str, sources: dict[str, str]
) -> dict[str, Any]:
    """`base` overridden by `layer`, both at dotted `key`; `sources` records what came from `source`.

    Sections merge, settings replace, and so do those that are mappings, unless the layer is `Added` to one. `null`
    removes a list, a mapping or an entry of a mapping.
    """
    if key == "router":  # a setting of the old kind or class must not leak into the new one
        kind = base.get("kind", FixedDepthConfig.kind)
        if layer.get("kind", kind) != kind:
            base = {}
        elif layer.get("target", base.get("target")) != base.get("target"):
            base = {name: value for name, value in base.items() if name != "options"}
    in_mapping = _collections().get(key) is Mapping
    merged = {} if in_mapping and not isinstance(layer, Added) else dict(base)
    for name, value in layer.items():
        dotted = _join(key, name)
        sources[dotted] = source
        if value is None and (dotted in _collections() or (in_mapping and name in base)):
            merged.pop(name, None)
            continue
        if isinstance(value, Mapping):
            below = merged.get(name)
            value = _merge(below if isinstance(below, Mapping) else {}, value, dotted, source, sources)
        merged[name] = value
    return merged


@cache
def _collections() -> dict[str, Any]:
    """Dotted key -> `tuple` or `Mapping`, of the settings that hold several values and can't be null."""
    sections = {name: [hint] for name, hint in field_types(Config).items()} | {"router": [*ROUTERS.values()]}
    return {
        f"{name}.{setting}": get_origin(hint)
        for name, owners in sections.items()
        for owner in owners
        for setting, hint in field_types(owner).items()
        if get_origin(hint) in (tuple, Mapping)
    }


def _spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with what may be abbreviated written in full: the default kind of router, and bare training sources."""
    result = dict(values)
    for name, section in field_types(Config).items():
        reserved = [field for field in field_types(section) if field != setting_name(field)] if name != "router" else []
        if reserved and isinstance(own := values.get(name), Mapping):
            fields = {setting_name(field): field for field in reserved}
            result[name] = {fields.get(setting, setting): value for setting, value in own.items()}
    router = values.get("router", {})
    if isinstance(router, Mapping):
        router = result["router"] = {"kind": FixedDepthConfig.kind, **router}
        recursion = values.get("recursion")
        if isinstance(recursion, Mapping) and isinstance(stages := recursion.get("stages"), list | tuple):
            result["recursion"] = {**recursion, "stages": [_with_router(stage, router) for stage in stages]}
    if isinstance(data := values.get("data"), Mapping) and isinstance(train := data.get("train"), list | tuple):
        sources = [{"prefix": item} if isinstance(item, str) else item for item in train]
        result["data"] = {**data, "train": sources}
    return result


def _with_router(stage: Any, router: Mapping[str, Any]) -> Any:
    """An item of `recursion.stages` whose router, where it has one, is spelled out: what it adds to the model's."""
    own = stage.get("router") if isinstance(stage, Mapping) else None
    if not isinstance(own, Mapping):
        return stage
    return {**stage, "router": {**(router if own.get("kind", router["kind"]) == router["kind"] else {}), **own}}


def _join(key: str, name: Any) -> str:
    """`optim` + `lr` -> `optim.lr`."""
    return f"{key}.{name}" if key else str(name)


# --- types in words ---------------------------------------------------------------------------------------------------


@cache
def field_types(section: type) -> dict[str, Any]:
    """Field name -> type of a configuration dataclass, annotations included."""
    return get_type_hints(section, include_extras=True)


def describe_type(hint: Any) -> str:
    """What a setting of type `hint` accepts, in words."""
    if (inner := without_null(hint)) is not hint:
        return f"{describe_type(inner)} or null"
    if get_origin(hint) is Annotated:
        (constraint,) = hint.__metadata__
        return f"a mapping with kind: {' | '.join(ROUTERS)}" if isinstance(constraint, ByKind) else constraint.words
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(x).lower() if isinstance(x, bool) else str(x) for x in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list (each item {describe_type(get_args(hint)[0])})"
    if hint in _ITEMS:
        return f"{{{', '.join(field_types(hint))}}}{_ITEMS[hint]}"
    return _WORDS.get(hint, "a mapping")


def without_null(hint: Any) -> Any:
    """`X` for `X | None`; other types as they are."""
    if type(None) not in get_args(hint):
        return hint
    (inner,) = (member for member in get_args(hint) if member is not type(None))
    return inner


def _bare(hint: Any) -> Any:
    """`hint` without null and without its constraint."""
    hint = without_null(hint)
    return hint.__origin__ if get_origin(hint) is Annotated else hint


# --- errors -----------------------------------------------------------------------------------------------------------


def _explain(problem: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """A line about one of pydantic's problems: source, dotted key, value, and what to write instead."""
    key, section, hint = _locate(problem["loc"])
    found = problem["input"]
    if problem["type"] == "union_tag_invalid":
        key, hint, found = f"{key}.kind", Literal[tuple(ROUTERS)], found["kind"]
    if problem["type"] == "unexpected_keyword_argument":
        message = f"unknown key; {_suggest(problem['loc'][-1], section, key)}"
    elif problem["type"] == "missing":
        message = f"missing; give {describe_type(hint)}"
    else:
        message = f"found {found!r}, expected {describe_type(hint)}{_advice(found, _bare(hint))}"
    recorded = key
    while recorded not in sources:  # a missing key and an item of a list have the source of what is around them
        recorded = recorded[: max(recorded.rfind("."), recorded.rfind("["), 0)]
    return f"{sources[recorded]}: {key or 'the whole configuration'}: {message}"


def _locate(location: Sequence[Any]) -> tuple[str, Any, Any]:
    """(dotted key, section around it, type) of pydantic's location, in which the kind of router is an item too."""
    key = ""
    section: Any = Config
    hint: Any = Config
    for item in location:
        hint = _bare(hint)
        if hint == RouterConfig:
            hint = ROUTERS[item]
        elif is_dataclass(hint):
            key, section = _join(key, setting_name(item)), hint
            hint = field_types(section).get(item)
        elif get_origin(hint) is tuple:
            key, hint = f"{key}[{item}]", get_args(hint)[0]
        else:
            key, hint = _join(key, item), get_args(hint)[1]
    return key, section, hint


def _advice(found: Any, hint: Any) -> str:
    if hint is str and isinstance(found, bool | int | float):
        return "; quote it to make it a string"
    if hint is int and isinstance(found, int | float) and found > sys.maxsize:
        return " below 2^63"
    if get_origin(hint) is Literal and (close := _closest(found, map(str, get_args(hint)))):
        return f"; did you mean {close}?"
    return "; remove the section to take its defaults" if is_dataclass(hint) and hint not in _ITEMS else ""


def _closest(word: Any, choices: Iterable[str], cutoff: float = 0.5) -> str | None:
    return next(iter(difflib.get_close_matches(str(word), list(choices), n=1, cutoff=cutoff)), None)


def _suggest(name: Any, section: Any, key: str) -> str:
    """What may have been meant by the unknown key `name`: a setting here, of another router, or of another section."""
    owners = [kind for kind, router in ROUTERS.items() if name in field_types(router)]
    if section in ROUTERS.values() and owners:
        return f"it belongs to router.kind {' or '.join(owners)}, but router.kind = {section.kind}"
    prefix = key[: -len(str(name))]
    if close := _closest(name, map(setting_name, field_types(section))):
        return f"did you mean {prefix}{close}?"
    elsewhere = {
        setting_name(inner): f"{outer}.{setting_name(inner)}"
        for outer, hint in field_types(Config).items()
        for member in (ROUTERS.values() if outer == "router" else [hint])
        for inner in field_types(member)
    }
    if close := _closest(name, elsewhere, cutoff=0.8):  # among so many keys a loose match would be chance
        return f"did you mean {elsewhere[close]}?"
    return f"the keys here are {', '.join(map(setting_name, field_types(section)))}"
