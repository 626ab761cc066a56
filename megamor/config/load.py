"""Configuration files: YAML, `extends:` overlays and dotted overrides.

    extends: [model/360m_mor3.yaml, parallel/fsdp2.yaml]   # relative to this file; a later one overrides an earlier one
    optim: {lr: 1e-3}                                      # this file overrides what it extends

On the command line, `optim.lr=2e-3` overrides every file. Sections merge key by key, settings replace (`convert.py`). A
layer that changes `router.kind` starts that section afresh.

All YAML of megamor is read and written here: configuration files, overrides, the configuration in a checkpoint. What
`config_to_yaml` and `override` write reads back equal, whatever characters a string has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megamor.config.convert import Added, config_from_layers, config_to_dict
from megamor.config.paths import expand_path
from megamor.config.schema import Config
from megamor.config.validate import validate
from megamor.errors import ConfigError


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    under: Sequence[tuple[str, Mapping[str, Any]]] = (),
    run: bool = True,
) -> Config:
    """Read a YAML file with what it extends, apply `a.b.c=value` overrides, and validate for `world_size` processes.

    Without `world_size`, rules that depend on the number of processes aren't checked. `under` are layers of (source,
    values) that the file overrides. With `run` false, the length of the run may be left out.

    Raises:
        ConfigError: a file can't be read; or keys, types and ranges are wrong (all of them in one message); or rules
            between settings are broken (all of them in one message).
    """
    config = config_from_layers([*under, *_layers(Path(path), chain=()), ("override", _parse_overrides(overrides))])
    validate(config, world_size, run=run)
    return config


def load_layers(path: str | Path | None, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """The configuration of a file and what it extends, with `layers` of (source, values) over it; not validated.

    Raises:
        ConfigError: a file can't be read, or keys, types or ranges are wrong.
    """
    return config_from_layers([*([] if path is None else _layers(Path(path), chain=())), *layers])


def config_from_yaml(text: str, source: str) -> Config:
    """The configuration that `config_to_yaml` wrote; `source` is named in errors. Raises ConfigError."""
    return config_from_layers([(source, parse_mapping(text, source))])


def config_to_yaml(config: Config) -> str:
    """The complete configuration as YAML; `config_from_yaml` and `load_config` of it give an equal one."""
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def override(key: str, value: Any) -> str:
    """The override that gives the setting at dotted `key` this plain value: `run.name='2026'`."""
    items = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=math.inf
    )
    return f"{key}={items[1:-2]}"  # without the brackets of the list


# --- files and overrides ----------------------------------------------------------------------------------------------


def _layers(path: Path, chain: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(file, its own values) of everything that `path` extends, then of `path` itself: lowest priority first.

    `chain` holds the files that led here; a file that is already in it extends itself.
    """
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(file.name for file in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: extends itself ({circle}); remove one of these extends")
    values = read_mapping(path)
    parents = values.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends: found {parents!r}, expected a file name or a list of file names")
    files = [path.parent / expand_path(parent, f"{path}: extends") for parent in parents]
    layers = [layer for file in files for layer in _layers(file, (*chain, resolved))]
    return [*layers, (str(path), values)]


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "a.c=2"]` -> `{"a": {"b": 1, "c": 2}}`: one layer, so the order of `router.kind=` doesn't matter."""
    layer: dict[str, Any] = Added()
    for index, given in enumerate(overrides):
        dotted, equals, text = given.partition("=")
        names = dotted.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"override {given!r}: expected {_meant(given, overrides[index + 1 :])}")
        section = layer
        for name in names[:-1]:
            if not isinstance(section.get(name), dict):
                section[name] = Added()
            section = section[name]
        section[names[-1]] = _parse_yaml(text, source=f"override {given!r}")
    return layer


def _meant(given: str, following: Sequence[str]) -> str:
    """What to write instead of the malformed override `given`, which may be cut in two: `optim.lr 1e-3`."""
    value = " ".join(following).lstrip("= ").partition(" ")[0]
    if re.fullmatch(r"\w+(\.\w+)+", given) and value:
        return f"{given}={value}, without spaces"
    return "dotted.key=value, for example optim.lr=1e-3"


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


_STR = "tag:yaml.org,2002:str"
_TAGS = (None, _STR, *(f"tag:yaml.org,2002:{name}" for name in ("seq", "map", "null", "bool", "int", "float")))


_MAX_NODES = 10**6


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, and values of JSON's types alone.

    Names are strings whatever they look like. A name given twice is an error: the last one would silently win.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - none of YAML 1.1's
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _TAGS}  # noqa: RUF012

    def get_single_node(self) -> yaml.Node | None:
        """The document. Aliases of aliases, with which a few lines fill any memory, are an error."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _expanded(node, {}) > _MAX_NODES:
            raise yaml.MarkedYAMLError(problem="its aliases repeat too much", problem_mark=node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        self.flatten_mapping(node)  # `<<` first, then what is left are names
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key_node.tag = _STR
        return super().construct_mapping(node, deep)


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below `node` if each alias were written out. A circle counts once; it is an error elsewhere."""
    if id(node) not in known:
        known[id(node)] = 1
        children = (each for pair in node.value for each in (pair if isinstance(pair, tuple) else (pair,)))
        known[id(node)] += 0 if isinstance(node, yaml.ScalarNode) else sum(_expanded(each, known) for each in children)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Quotes a string that either version of YAML would read as something else, so that any reader gets a string."""


for _class in (_Loader, _Dumper):
    for _name, _pattern in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), None)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Other styles fold line breaks, of which YAML 1.1 has more than 1.2; in double quotes all are escaped.
    return dumper.represent_scalar(_STR, text, style='"' if text.splitlines() not in ([], [text]) else None)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))  # SafeLoader's own would read 010 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_representer(str, _represent_str)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ConfigError(f"{source}: a value is too large to read: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a file of YAML or JSON; empty if it has only comments. Raises ConfigError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a text file: {error}") from error
    # JSON is YAML, but for tabs between values.
    return parse_mapping(text.expandtabs() if path.suffix == ".json" else text, str(path))


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping in `text`, called `source` in errors. Raises ConfigError."""
    values = _parse_yaml(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: found {type(values).__name__}, expected a mapping such as `optim: {{lr: 1e-3}}`")
    return values
