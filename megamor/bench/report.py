"""Reports of benchmarks: a JSON file for each, and tables that the terminal and the documentation share."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megamor.errors import DataError
from megamor.files import replace_file

Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """One column of a table: its header, the text of its cell for a row, and on which side the text is aligned."""

    header: str
    cell: Callable[[Row], str]
    left: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a title, with notes below. Columns in which no row has a value are left out."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    notes: Sequence[str] = ()

    def markdown(self) -> Iterator[str]:
        """Lines of Markdown; the first is empty."""
        rows = [[column.cell(row) for column in self.columns] for row in self.rows]
        shown = [index for index in range(len(self.columns)) if any(cells[index] not in ("", "n/a") for cells in rows)]
        columns = [self.columns[index] for index in shown]
        if self.title:
            yield from ("", self.title)
        yield ""
        yield f"| {' | '.join(column.header for column in columns)} |"
        yield f"|{'|'.join('---' if column.left else '---:' for column in columns)}|"
        yield from (f"| {' | '.join(cells[index] for index in shown)} |" for cells in rows)
        for note in self.notes:
            yield from ("", note)

    def show(self) -> None:
        """Print the table to the terminal."""
        from rich.console import Console
        from rich.markdown import Markdown

        lines = [*self.markdown()]
        # A file has no width of its own, and 80 columns would wrap headers and notes.
        console = Console(width=None if sys.stdout.isatty() else max(160, *map(len, lines)))
        console.print(Markdown("\n".join(lines)))


def text(path: str) -> Callable[[Row], str]:
    """Cells that show a field as it is; empty where a row lacks it."""
    return number(path, "")


def number(path: str, form: str, scale: float = 1, null: str = "n/a") -> Callable[[Row], str]:
    """Cells that show the field at a dotted path, times `scale`, in a format such as `.2f`.

    The cell is empty where a row lacks the field (older files, cases that failed), and `null` where its value is None.
    """

    def cell(row: Row) -> str:
        value: Any = row
        try:
            for name in path.split("."):
                value = value[name]
        except LookupError:
            return ""
        return null if value is None else format(value if scale == 1 else value * scale, form)

    return cell


def spread(path: str, form: str, scale: float = 1) -> Callable[[Row], str]:
    """Cells that show a median and, in parentheses, the quartiles around it."""
    parts = [number(f"{path}.{name}", form, scale) for name in ("median", "q1", "q3")]

    def cell(row: Row) -> str:
        median, low, high = (part(row) for part in parts)
        return f"{median} ({low}–{high})" if median else ""

    return cell


def rotated(items: Sequence[T], number: int) -> list[T]:
    """The order of round `number`: each round begins with another item, so that none always follows the same one."""
    first = number % len(items)
    return [*items[first:], *items[:first]]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (inclusive method; all equal for a single value)."""
    if len(values) == 1:
        return {"q1": values[0], "median": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def device_name(report: Row) -> str:
    """The GPU that was measured, or the CPU with the number of threads."""
    machine = report["machine"]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return machine["accelerator"] or f"{machine['cpu']}, {threads}"


def provenance(report: Row, *libraries: str) -> str:
    """Date, versions of `libraries` and revision of the code, as one phrase."""
    versions = [f"{name} {report['versions'][name]}" for name in libraries if name in report["versions"]]
    changed = " with changes" if report["commit"]["dirty"] else ""
    return ", ".join([report["date"][:10], *versions, f"revision {report['commit']['revision'][:9]}{changed}"])


def write_report(path: Path, report: Row) -> None:
    """Write the file of a report, which readers see whole or not at all; its directory is made if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(report, indent=1) + "\n")


def read_report(path: Path, schema: str) -> dict[str, Any]:
    """A result file of the given schema.

    Raises:
        DataError: the file isn't JSON or has another schema.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as JSON: {error}") from error
    found = report.get("schema") if isinstance(report, dict) else None
    if found != schema:
        raise DataError(f"{path}: schema is {found!r}, expected {schema}; measure again with megamor bench")
    return report
