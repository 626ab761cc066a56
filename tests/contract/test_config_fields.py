"""Every setting is used and documented.

A setting is used if code other than loading and validation reads it. The check goes by name: a field counts as read in
a file that reads an attribute of that name and mentions its section (`optim`) or class (`OptimConfig`, or a base). An
unused field can therefore hide behind a used one of the same name; what a field does is tested with the code that uses
it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megamor.config import Config, DepthStep, RampConfig, SourceConfig, reference
from megamor.config.changes import SETTINGS
from megamor.config.schema import RopeScalingConfig

ROOT = Path(__file__).parents[2]
NESTED: dict[str, list[Any]] = {
    "model": [RopeScalingConfig],
    "recursion": [DepthStep],
    "data": [SourceConfig],
    "train": [RampConfig],
}
NOT_READERS = {"schema.py", "routers.py", "load.py", "convert.py", "validate.py", "reference.py", "__init__.py"}


@dataclass(frozen=True)
class Names:
    """Identifiers that one file uses."""

    attributes: frozenset[str]
    """Attributes that are read, `getattr(x, "name")` included."""
    mentioned: frozenset[str]


def names_in(source: str) -> Names:
    """The identifiers of a module's source."""
    attributes, mentioned = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            mentioned.add(node.attr)
            if isinstance(node.ctx, ast.Load):
                attributes.add(node.attr)
        elif isinstance(node, ast.Name):
            mentioned.add(node.id)
        elif isinstance(node, ast.arg):
            mentioned.add(node.arg)
        elif isinstance(node, ast.alias):
            mentioned.add(node.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            attributes |= {str(argument.value) for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
    return Names(frozenset(attributes), frozenset(mentioned))


def settings() -> Iterator[tuple[str, Any, str]]:
    """(section, class, field) of every setting, except `kind`, which selects the class."""
    for section, hint in get_type_hints(Config).items():
        classes = [hint] if is_dataclass(hint) else list(get_args(hint))
        for owner in [*classes, *NESTED.get(section, [])]:
            yield from ((section, owner, item.name) for item in fields(owner) if item.name != "kind")


def is_read(section: str, owner: Any, name: str, readers: list[Names]) -> bool:
    """Whether a file reads `name`, or a property computed from it, and mentions its section or class."""
    getters = {key: value.fget for key, value in vars(owner).items() if isinstance(value, property)}
    names = {name} | {key for key, getter in getters.items() if getter and name in getter.__code__.co_names}
    # What belongs to an item of a section may be read by who knows the section's class.
    around = [get_type_hints(Config)[section]] if owner in NESTED.get(section, []) else []
    knows = {section, *(base.__name__ for base in (*owner.__mro__, *around))}
    return any(names & file.attributes and knows & file.mentioned for file in readers)


@pytest.fixture(scope="module")
def readers() -> list[Names]:
    """The identifiers of every file that may count as using a setting."""
    found = [*ROOT.glob("megamor/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("pretrain.py")]
    config = ROOT / "megamor" / "config"
    return [names_in(path.read_text()) for path in found if not (path.parent == config and path.name in NOT_READERS)]


def test_every_setting_is_read(readers: list[Names]) -> None:
    unread = [f"{s}.{name} ({owner.__name__})" for s, owner, name in settings() if not is_read(s, owner, name, readers)]
    assert not unread, "these settings change nothing: " + ", ".join(unread)


def test_every_setting_is_documented() -> None:
    undocumented = [f"{s}.{name}" for s, owner, name in settings() if name not in reference.documentation(owner)]
    assert not undocumented, "put a string below these fields: " + ", ".join(undocumented)


def test_the_reference_is_current() -> None:
    assert reference.PAGE.read_text() == reference.page(), "run python -m megamor.config.reference --write"


@pytest.mark.parametrize("name", sorted({*SETTINGS} - {"router.kind"}))
def test_every_setting_has_a_row_in_its_section(name: str) -> None:
    section, _, key = name.partition(".")
    part = reference.page().split(f"\n## `{section}`\n")[1].split("\n## ")[0]
    assert f"\n| `{key}` | " in part


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(config):\n    return config.optim.lr", True),
        ("def f(c: OptimConfig):\n    return getattr(c, 'lr')", True),
        ("def f(config):\n    return config.lr", False),
        ("def f(config):\n    config.optim.lr = 3", False),
        ("lr = 'optim.lr'", False),
    ],
)
def test_what_counts_as_reading(source: str, expected: bool) -> None:
    (owner,) = {owner for section, owner, _ in settings() if section == "optim"}
    assert is_read("optim", owner, "lr", [names_in(source)]) is expected
