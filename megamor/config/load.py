"""Configuration files: YAML, `extends:` overlays and dotted overrides.

    extends: [model/360m_mor3.yaml, parallel/fsdp2.yaml]   # relative to this file; a later one overrides an earlier one
    optim: {lr: 1e-3}                                      # this file overrides what it extends

On the command line, `optim.lr=2e-3` overrides every file. Mappings merge key by key; lists and scalars replace. A layer
that changes `router.kind` starts that section afresh.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megamor.config.convert import config_from_layers, config_to_dict
from megamor.config.schema import Config
from megamor.config.validate import validate
from megamor.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Config:
    """Read a YAML file with what it extends, apply `a.b.c=value` overrides, and validate for `world_size` processes.

    Without `world_size`, rules that depend on the number of processes aren't checked.

    Raises:
        ConfigError: a file can't be read; or keys, types and ranges are wrong (all of them in one message); or rules
            between settings are broken (all of them in one message).
    """
    config = config_from_layers([*_layers(Path(path), chain=()), ("override", _parse_overrides(overrides))])
    validate(config, world_size)
    return config


def config_from_yaml(text: str, source: str) -> Config:
    """The configuration that `config_to_yaml` wrote; `source` is named in errors. Raises ConfigError."""
    return config_from_layers([(source, _parse_mapping(text, source))])


def config_to_yaml(config: Config) -> str:
    """The complete configuration as YAML; `config_from_yaml` and `load_config` of it give an equal one."""
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --- files and overrides ----------------------------------------------------------------------------------------------


def _layers(path: Path, chain: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(file, its own values) of everything that `path` extends, then of `path` itself: lowest priority first.

    `chain` holds the files that led here; a file that is already in it extends itself.
    """
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(file.name for file in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: extends itself ({circle}); remove one of these extends")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a text file: {error}") from error
    values = _parse_mapping(text, str(path))
    parents = values.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends: found {parents!r}, expected a file name or a list of file names")
    layers = [layer for parent in parents for layer in _layers(path.parent / parent, (*chain, resolved))]
    return [*layers, (str(path), values)]


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


# --- YAML -------------------------------------------------------------------------------------------------------------
# PyYAML follows YAML 1.1, where `1e-3` is a string, `on` a bool, `010` eight and `1:30` ninety. The scalars below are
# those of YAML 1.2, plus `_` between digits.

_SCALARS: tuple[tuple[str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9][0-9_]*"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    ("null", r"~|null|Null|NULL|"),
    ("merge", r"<<"),
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars; a key given twice is an error instead of the last one silently winning."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - none of YAML 1.1's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that either version of YAML would read as something else, so that any reader gets a string."""


for _class in (_Loader, _Dumper):
    for _name, _pattern in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), None)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))  # SafeLoader's own would read 010 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error


def _parse_mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping that `text` holds; empty if there are only comments."""
    values = _parse_yaml(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: found {type(values).__name__}, expected a mapping such as `optim: {{lr: 1e-3}}`")
    return values
