"""docs/seeds.md has a row for each promise of the earlier projects, and names nothing that doesn't exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from megamor.cli import COMMANDS, main
from megamor.config.changes import SETTINGS
from tests.commands import status

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/seeds.md").read_text(encoding="utf-8")
LINES = {"000": 14, "001": 17, "002": 18, "003": 16, "004": 12}
SPANS = re.findall(r"`([^`]+)`", TEXT)
SETTINGS_PAGE = (ROOT / "docs/settings.md").read_text(encoding="utf-8")


def test_every_line_has_a_row() -> None:
    rows = [line.split("|")[1:-1] for line in TEXT.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == sum(LINES.values()) == 77
    expected = [f"{project}.{n}" for project, count in LINES.items() for n in range(1, count + 1)]
    assert [number.strip() for number, _, _ in rows] == expected
    assert all(promised.strip() and len(here) > 15 for _, promised, here in rows)


@cache
def help_of(command: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert status(main, *command.split(), "--help") == 0
    return shown.getvalue()


@pytest.mark.parametrize("command", [span for span in SPANS if span.startswith("megamor ")])
def test_commands_exist_with_their_options(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    if name == "--help":
        return
    assert name in COMMANDS
    name += " train" if name == "bench" and arguments else ""
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(rf"(?<![\w-]){argument}\b", help_of(name)), argument
        if re.fullmatch(r"(configs|studies)/\S+", argument):
            assert (ROOT / argument).exists()


def test_files_and_tests_exist() -> None:
    for span in SPANS:
        for path, test in re.findall(r"((?:tests|studies|examples|notebooks|\.github)/[\w./]+)(?:::(\w+))?", span):
            assert (ROOT / path).exists(), path
            assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test


def test_settings_exist() -> None:
    sections = {name.partition(".")[0] for name in SETTINGS}
    for span in SPANS:
        for section, name in re.findall(r"(?<![\w/.-])([a-z]+)\.([a-z_]+)(?=[:= ]|$)", span):
            if section == "router":
                assert name == "kind" or f"| `{name}` |" in SETTINGS_PAGE.split("## `router`")[1], span
            elif section in sections:
                assert f"{section}.{name}" in SETTINGS, span


def test_metrics_are_documented() -> None:
    documented = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    found = [span for span in SPANS if re.fullmatch(r"(routing|throughput|memory|train|depth)/[\w]+", span)]
    assert len(found) > 12
    for name in found:
        assert name in documented or name.removeprefix("routing/") in documented, name
