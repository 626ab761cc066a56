"""Configuration files: YAML, `extends:` overlays and dotted overrides, merged in that order.

    extends: [model/360m_mor3.yaml, parallel/fsdp2.yaml]   # relative to this file; the later one wins
    optim: {lr: 1e-3}                                      # this file wins over what it extends

and on the command line `optim.lr=2e-3` wins over every file. Mappings merge key by key, lists and scalars replace. A
layer that changes the `kind` of a section (`router`) starts that section afresh, so no field of the old kind leaks.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from megamor.config.convert import (
    Origins,
    config_from_dict,
    config_from_layers,
    config_to_dict,
    field_hints,
    join_key,
    union_kinds,
)
from megamor.config.schema import Config
from megamor.config.validate import validate
from megamor.errors import ConfigError

__all__ = ["config_from_dict", "config_to_dict", "config_to_yaml", "load_config"]

_EXTENDS = "extends"
_OVERRIDE = "override"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with what it extends, apply `a.b.c=value` overrides, and validate.

    Raises `ConfigError` for a file that can't be read, for every unknown key and wrong type (all in one message), and
    then for every rule between fields that doesn't hold (again all in one).
    """
    values: dict[str, Any] = {}
    origins = Origins(default=str(path))
    for source, layer in [*_layers(Path(path), chain=()), (_OVERRIDE, _parse_overrides(overrides))]:
        values = _merge(values, layer, Config, key="", source=source, origins=origins)
    config = config_from_layers(values, origins)
    validate(config)
    return config


def config_to_yaml(config: Config) -> str:
    """The complete configuration as YAML; `load_config` of it gives an equal one."""
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --- layers -----------------------------------------------------------------------------------------------------------


def _layers(path: Path, chain: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(file, its own values) of everything that `path` extends, then `path` itself: lowest priority first.

    `chain` holds the files that led here, to find one that extends itself.
    """
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(file.name for file in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: extends itself ({circle}); remove one of these extends")
    values = _read_mapping(path)
    parents = values.pop(_EXTENDS, [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends: found {parents!r}, expected a file name or a list of file names")
    layers = [layer for parent in parents for layer in _layers(path.parent / parent, (*chain, resolved))]
    return [*layers, (str(path), values)]


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a text file: {error}") from error
    values = _parse_yaml(text, source=str(path))
    if values is None:  # an empty file, or one that holds only comments
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {type(values).__name__}, expected a mapping such as `optim: {{lr: 1e-3}}`")
    return values


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "a.c=2"]` -> `{"a": {"b": 1, "c": 2}}`: one layer, so the order of `router.kind=` doesn't matter."""
    layer: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        names = dotted.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"override {override!r}: expected dotted.key=value, for example optim.lr=1e-3")
        section = layer
        for name in names[:-1]:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[names[-1]] = _parse_yaml(text, source=f"override {override!r}")
    return layer


def _merge(
    base: Mapping[str, Any], layer: Mapping[str, Any], hint: Any, key: str, source: str, origins: Origins
) -> dict[str, Any]:
    """`base` with `layer` on top, both of type `hint` at dotted `key`; records where each value came from."""
    kinds = union_kinds(hint)
    if kinds:
        default_kind = next(iter(kinds))
        old_kind = base.get("kind", default_kind)
        kind = layer.get("kind", old_kind)
        if kind != old_kind:
            base = {}
        hint = kinds.get(kind) if isinstance(kind, str) else None
    hints = field_hints(hint) if is_dataclass(hint) else {}  # type: ignore[arg-type]
    merged = dict(base)
    for name, value in layer.items():
        dotted = join_key(key, name)
        origins.sources[dotted] = source
        if isinstance(value, Mapping):
            below = merged.get(name)
            below = below if isinstance(below, Mapping) else {}
            value = _merge(below, value, hints.get(name), dotted, source, origins)
        merged[name] = value
    return merged


# --- YAML -------------------------------------------------------------------------------------------------------------
# PyYAML follows YAML 1.1, where `1e-3` is a string, `on` a bool, `010` eight and `1:30` ninety. The scalars below are
# those of YAML 1.2 (plus `_` between digits), for reading and for deciding what to quote when writing.

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars; a key given twice is an error instead of the last one silently winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as a string."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}  # none of YAML 1.1's
    for _name, _pattern, _first in _SCALARS:
        _tag = f"tag:yaml.org,2002:{_name}"
        _firsts = ["" if character == "\0" else character for character in _first]
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _firsts)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))  # SafeLoader's own would read 010 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
