"""Paths in settings: `~` and environment variables.

A configuration holds paths as they were written, and so does its copy in a checkpoint, which can therefore be read on a
machine with another home directory, or where a variable isn't set. Paths are expanded when a run opens its files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from megamor.config.constraints import Location
from megamor.config.convert import field_types, without_null
from megamor.errors import ConfigError

Section = TypeVar("Section")

_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)\})")


def expand_paths(section: Section, key: str = "") -> Section:
    """A configuration, or the section of it at dotted `key`, with every path in it expanded; see `expand_path`."""
    hints = field_types(type(section)).items()  # type: ignore[arg-type]
    values = {name: _expand(getattr(section, name), hint, f"{key}.{name}".lstrip(".")) for name, hint in hints}
    return replace(section, **values)  # type: ignore[type-var]


def _expand(value: Any, hint: Any, key: str) -> Any:
    if value is None:
        return None
    hint = without_null(hint)
    if get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], Location):
        return expand_path(value, key)
    if is_dataclass(value):
        return expand_paths(value, key)
    if isinstance(value, tuple):
        return tuple(_expand(item, get_args(hint)[0], f"{key}[{index}]") for index, item in enumerate(value))
    if isinstance(value, Mapping):
        return {name: _expand(item, get_args(hint)[1], f"{key}.{name}") for name, item in value.items()}
    return value


def literal(path: str | Path) -> str:
    """The absolute `path` as a setting that `expand_path` leaves as it is."""
    return str(path).replace("$", "$$")


def expand_path(text: str, key: str) -> str:
    """`text`, the setting `key`, with `~`, `~user`, `$NAME` and `${NAME}` replaced, and `$$` by a dollar sign.

    Raises:
        ConfigError: there is no such user, or the variable isn't set.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[2] or match[3]
        if match[1]:
            return "$"
        if name not in os.environ:
            unset = f"{key} = {text!r}: the environment variable {name} isn't set"
            raise ConfigError(f"{unset}; set it or write the path in full ($$ stands for a dollar sign)")
        return os.environ[name]

    user, directory = "", ""
    if text.startswith("~"):
        user = text.partition("/")[0]
        directory = os.path.expanduser(user)
        if directory == user:
            unknown = f"{key} = {text!r}: there is no user {user[1:]!r}"
            raise ConfigError(f"{unknown}; for a directory of that name write ./{text}")
    return directory + _VARIABLE.sub(value_of, text[len(user) :])
