"""The lists of mutants, and whether they still fit the code: the text they replace, and the tests that they name."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Mutant:
    """One fault: `text` of `file`, which occurs there once, becomes `replacement`.

    `tests` are pytest's node ids, one of which must fail. `equivalent` says why no test can tell the mutant from the
    original; such a mutant is on record only and isn't run.
    """

    room: str
    id: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...] = ()
    equivalent: str | None = None

    @property
    def name(self) -> str:
        """`room/id`, which is unique."""
        return f"{self.room}/{self.id}"

    def mutated(self, root: Path) -> str:
        """The source of `file` under `root` with the fault in it.

        Raises:
            ValueError: the text doesn't occur exactly once, the result is no Python, or it means the same.
        """
        source = (root / self.file).read_text(encoding="utf-8")
        if (count := source.count(self.text)) != 1:
            raise ValueError(f"{self.name}: {self.file} has this text {count} times instead of once: {self.text}")
        changed = source.replace(self.text, self.replacement)
        try:
            tree = ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"{self.name}: the replacement is no Python: {error}") from error
        if ast.dump(tree) == _meaning(source):
            raise ValueError(f"{self.name}: the replacement changes nothing but the form")
        return changed


def load() -> list[Mutant]:
    """Every mutant of every list."""
    return [
        Mutant(room=path.stem, **{**entry, "tests": tuple(f"tests/{test}" for test in entry.get("tests", ()))})
        for path in sorted(HERE.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


def select(mutants: Sequence[Mutant], only: Sequence[str]) -> list[Mutant]:
    """Those of `mutants` whose room or name is in `only`; all of them if it is empty.

    Raises:
        ValueError: an entry of `only` selects nothing.
    """
    unknown = set(only) - {mutant.room for mutant in mutants} - {mutant.name for mutant in mutants}
    if unknown:
        raise ValueError(f"no room and no mutant is called {', '.join(sorted(unknown))}")
    return [mutant for mutant in mutants if not only or mutant.room in only or mutant.name in only]


def faults(mutants: Sequence[Mutant], root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the entries, a line each: names given twice, stale texts, tests that don't exist."""
    seen: set[str] = set()
    for mutant in mutants:
        if mutant.name in seen:
            yield f"{mutant.name}: there are two mutants of this name"
        seen.add(mutant.name)
        try:
            mutant.mutated(root)
        except (OSError, ValueError) as error:
            yield str(error)
        if not mutant.tests and mutant.equivalent is None:
            yield f"{mutant.name}: no tests are named, and no reason why none can notice it"
        for test in mutant.tests:
            file, _, function = test.partition("::")
            if function.partition("[")[0] not in {"", *_functions(root / file)}:
                yield f"{mutant.name}: there is no test {test}"
            elif not (root / file).exists():
                yield f"{mutant.name}: there is no file {file}"


@cache
def _meaning(source: str) -> str:
    """The syntax tree of a program as text: equal for programs that differ in comments and layout alone."""
    return ast.dump(ast.parse(source))


@cache
def _functions(file: Path) -> frozenset[str]:
    """Names of the functions of a Python file or, for a directory or a missing file, none."""
    if not file.is_file():
        return frozenset()
    return frozenset(node.name for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.FunctionDef))
