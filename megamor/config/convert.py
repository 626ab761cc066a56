"""Plain YAML values to configuration dataclasses and back.

Everything here follows the type hints of `schema.py`: a new field, section or router kind needs no change. A union of
dataclasses is told apart by its members' `kind`; the first member is meant where `kind` is absent. A dataclass with
exactly one field that has no default may be given as that field's bare value (`data/pile` for `{prefix: data/pile}`).
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megamor.config.schema import Config
from megamor.errors import ConfigError

_SCALARS: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def config_from_dict(values: Mapping[str, Any], source: str = "config") -> Config:
    """Build a `Config` from nested plain values as YAML holds them; absent keys take their defaults.

    Raises `ConfigError` listing every unknown key, wrong type and missing value; `source` says where they stand.
    """
    return config_from_layers(values, Origins(source))


@dataclass
class Origins:
    """Where each value came from, by dotted key; `default` for those never recorded."""

    default: str
    sources: dict[str, str] = field(default_factory=dict)

    def of(self, key: str) -> str:
        """The source of `key`, or of the nearest section around it."""
        while key:
            if key in self.sources:
                return self.sources[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.default


def config_from_layers(values: Mapping[str, Any], origins: Origins) -> Config:
    """`config_from_dict` for merged layers, whose errors name the layer that each value came from."""
    converter = _Converter(origins)
    config = converter.dataclass(values, Config, key="")
    if converter.problems:
        raise ConfigError("\n  ".join(["the configuration can't be read:", *converter.problems]))
    assert isinstance(config, Config)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The nested dicts, lists and scalars from which `config_from_dict` builds an equal configuration."""
    return {item.name: _to_plain(getattr(config, item.name)) for item in fields(config)}


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, Mapping):
        return {name: _to_plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value


@cache
def field_hints(section: type) -> dict[str, Any]:
    """Field name -> type of a configuration dataclass."""
    return get_type_hints(section)


@cache
def union_kinds(hint: Any) -> dict[str, type]:
    """kind -> dataclass of a union told apart by `kind`, its default first; empty for every other type."""
    members = _union_members(hint)
    if len(members) < 2 or not all(is_dataclass(member) for member in members):
        return {}
    return {get_args(field_hints(member)["kind"])[0]: member for member in members}


def join_key(key: str, name: Any) -> str:
    """`optim` + `lr` -> `optim.lr`."""
    return f"{key}.{name}" if key else str(name)


def _union_members(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) not in (Union, types.UnionType):
        return ()
    return tuple(member for member in get_args(hint) if member is not type(None))


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _required_fields(section: type) -> list[str]:
    return [item.name for item in fields(section) if item.default is MISSING and item.default_factory is MISSING]


def describe_type(hint: Any) -> str:
    """What a field of type `hint` accepts, in words for an error message."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    if _is_optional(hint):
        return " or ".join([*map(describe_type, _union_members(hint)), "null"])
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if get_origin(hint) is tuple:
        return f"a list (each item {describe_type(get_args(hint)[0])})"
    if is_dataclass(hint) and len(_required_fields(hint)) == 1:  # type: ignore[arg-type]
        return f"{{{', '.join(field_hints(hint))}}} or a bare {_required_fields(hint)[0]}"  # type: ignore[arg-type]
    return "a mapping"


class _Converter:
    """One pass over a configuration; collects problems so that all of them are reported at once.

    After a problem the value returned is a placeholder, never seen by a caller.
    """

    def __init__(self, origins: Origins) -> None:
        self.origins = origins
        self.problems: list[str] = []

    def value(self, value: Any, hint: Any, key: str) -> Any:
        """`value` as type `hint`."""
        if value is None and _is_optional(hint):
            return None
        if union_kinds(hint):
            return self.kind_union(value, hint, key)
        wanted = describe_type(hint)
        if _is_optional(hint):
            (hint,) = _union_members(hint)
        if is_dataclass(hint):
            return self.dataclass(value, hint, key)  # type: ignore[arg-type]
        if get_origin(hint) is tuple and isinstance(value, list | tuple):
            item_hint = get_args(hint)[0]
            return tuple(self.value(item, item_hint, f"{key}[{i}]") for i, item in enumerate(value))
        if get_origin(hint) is Mapping and isinstance(value, Mapping):
            item_hint = get_args(hint)[1]
            return {str(name): self.value(item, item_hint, join_key(key, name)) for name, item in value.items()}
        if not _is_scalar(value, hint):
            self.problem(key, f"found {value!r}, expected {wanted}{_advice(value, hint)}")
        return float(value) if hint is float and type(value) is int else value

    def kind_union(self, value: Any, hint: Any, key: str) -> Any:
        """The member of a union of dataclasses that `value["kind"]` names."""
        kinds = union_kinds(hint)
        if not isinstance(value, Mapping):
            self.problem(key, f"found {value!r}, expected a mapping with kind: {' | '.join(kinds)}")
            return None
        kind = value.get("kind", next(iter(kinds)))
        if not isinstance(kind, str) or kind not in kinds:
            expected = f"one of {', '.join(kinds)}{_nearest(kind, kinds)}"
            self.problem(join_key(key, "kind"), f"found {kind!r}, expected {expected}")
            return None
        return self.dataclass(value, kinds[kind], key, siblings=kinds)

    def dataclass(self, value: Any, section: type, key: str, siblings: Mapping[str, type] | None = None) -> Any:
        """An instance of `section`; `siblings` are the other kinds of its union, named when a key is one of theirs."""
        required = _required_fields(section)
        if not isinstance(value, Mapping):
            if len(required) == 1 and value is not None:
                value = {required[0]: value}
            else:
                self.problem(key, f"found {value!r}, expected a mapping; remove the section to take its defaults")
                return None
        hints = field_hints(section)
        for name in value:
            if name not in hints:
                self.problem(join_key(key, name), f"unknown key; {_suggest(name, section, key, siblings or {})}")
        for name in required:
            if name not in value:
                self.problem(join_key(key, name), f"missing; give {describe_type(hints[name])}")
        problems_before = len(self.problems)
        converted = {name: self.value(value[name], hints[name], join_key(key, name)) for name in hints if name in value}
        complete = len(self.problems) == problems_before and all(name in value for name in required)
        return section(**converted) if complete else None

    def problem(self, key: str, message: str) -> None:
        self.problems.append(f"{self.origins.of(key)}: {key or 'the whole configuration'}: {message}")


def _is_scalar(value: Any, hint: Any) -> bool:
    """Whether `value` is the bool, int, float, str or `Literal` choice that `hint` asks for; an int may be a float."""
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def _advice(value: Any, hint: Any) -> str:
    if hint is str and isinstance(value, bool | int | float):
        return "; quote it to make it a string"
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if get_origin(hint) is Literal:
        return _nearest(value, [str(choice) for choice in get_args(hint)])
    return ""


def _nearest(word: Any, choices: Iterable[str]) -> str:
    close = _close_match(word, choices)
    return f"; did you mean {close}?" if close else ""


def _close_match(word: Any, choices: Iterable[str], cutoff: float = 0.5) -> str | None:
    return next(iter(difflib.get_close_matches(str(word), list(choices), n=1, cutoff=cutoff)), None)


def _suggest(name: Any, section: type, key: str, siblings: Mapping[str, type]) -> str:
    """What may have been meant by the unknown key `name`: a field here, a field of another kind, or one elsewhere."""
    here = field_hints(section)
    owners = [kind for kind, member in siblings.items() if name in field_hints(member)]
    if owners:
        kind = next(kind for kind, member in siblings.items() if member is section)
        return f"it belongs to {key}.kind {' and '.join(owners)}, and this run's {key}.kind is {kind}"
    if close := _close_match(name, here):
        return f"did you mean {join_key(key, close)}?"
    elsewhere = {dotted.rpartition(".")[2]: dotted for dotted in _dotted_keys(Config)}
    if close := _close_match(name, elsewhere, cutoff=0.8):  # many keys: a loose match would be chance
        return f"did you mean {elsewhere[close]}?"
    return f"the keys here are {', '.join(here)}"


def _dotted_keys(section: type, key: str = "") -> Iterator[str]:
    """Every key of a section and of those inside it, depth first."""
    for name, hint in field_hints(section).items():
        dotted = join_key(key, name)
        yield dotted
        for member in [hint] if is_dataclass(hint) else union_kinds(hint).values():
            yield from _dotted_keys(member, dotted)  # type: ignore[arg-type]
