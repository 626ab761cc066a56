"""Every reliability promise has a test marked with it, or is listed here as untested."""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from pathlib import Path

import pytest

from tests.reliability_table import PROMISES

TESTS = Path(__file__).parents[1]
OUTCOMES = TESTS.parent / "benchmarks" / "results" / "reliability.json"

MISSING: dict[str, str] = {}
"""Promises without a test, and the reason."""


def marked_tests() -> dict[str, list[str]]:
    """Node ids of test functions by the promises in their marks, from the source alone."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = promises_in(node for node in tree.body if isinstance(node, ast.Assign))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for promise in module | promises_in(node.decorator_list):
                    found[promise].append(f"{path.relative_to(TESTS.parent)}::{node.name}")
    return found


def promises_in(nodes: object) -> set[str]:
    """Arguments of all `pytest.mark.promise` calls among the nodes."""
    calls = [call for node in nodes for call in ast.walk(node) if isinstance(call, ast.Call)]  # type: ignore[attr-defined]
    return {
        argument.value
        for call in calls
        if ast.unparse(call.func).endswith("mark.promise")
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


def test_every_promise_is_tested_or_listed() -> None:
    found = marked_tests()
    assert found.keys() <= PROMISES.keys()
    assert PROMISES.keys() - found.keys() == MISSING.keys()


def test_outcomes_are_of_tests_that_exist() -> None:
    """A test that was renamed, removed or unmarked must not stay in the results as passed."""
    marked = {(node, promise) for promise, nodes in marked_tests().items() for node in nodes}
    report = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    assert report["promises"] == PROMISES
    written = {(node, entry["promise"]) for node, test in report["tests"].items() for entry in test["promises"]}
    assert written - marked == set(), "make reliability"


@pytest.mark.promise("R17")
def test_marks_are_checked_and_outcomes_are_kept(pytester: pytest.Pytester) -> None:
    """Outcomes are recorded by promise and backend; a second session changes only the tests that it ran."""
    pytester.makeconftest("from tests.conftest import *")
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\nmarkers = ["promise"]')
    first = pytester.makepyfile(
        test_first="""
        import pytest
        @pytest.mark.promise("R1", "R9")
        @pytest.mark.parametrize(("backend", "stage"), [("ddp", 0), ("deepspeed", 3)])
        def test_backends(backend, stage): assert stage == 0
        @pytest.mark.promise("R16")
        def test_alone(): pass
        def test_unmarked(): pass
        """
    )
    pytester.makepyfile(
        test_second="""
        import pytest
        @pytest.mark.promise("R4", backend=("ddp", "fsdp2"))
        def test_both(): pass
        """
    )
    table = pytester.path / "out.json"
    for arguments in ([first], ["test_second.py"]):
        pytester.runpytest_inprocess(*arguments, "--reliability", table)
    tests = json.loads(table.read_text())["tests"]
    seen = {
        (name.partition("::")[2], entry["promise"], entry["backend"], entry.get("passed", 0), entry.get("failed", 0))
        for name, test in tests.items()
        for entry in test["promises"]
    }
    assert seen == {
        ("test_backends", "R1", "ddp", 1, 0),
        ("test_backends", "R9", "ddp", 1, 0),
        ("test_backends", "R1", "zero3", 0, 1),
        ("test_backends", "R9", "zero3", 0, 1),
        ("test_alone", "R16", "", 1, 0),
        ("test_both", "R4", "ddp", 1, 0),
        ("test_both", "R4", "fsdp2", 1, 0),
    }
    pytester.makepyfile(test_third='import pytest\n@pytest.mark.promise("R99")\ndef test_unknown(): pass')
    assert pytester.runpytest_inprocess("test_third.py").ret != 0
