"""The source code of Python's standard library: real text that every machine has, without a network."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def source_files(limit_characters: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield name and text of the standard library's Python files, sorted by name, without those that aren't UTF-8."""
    total = 0
    for path in sorted(STANDARD_LIBRARY.rglob("*.py")):
        # Some systems keep third-party packages inside the standard library's directory.
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield str(path.relative_to(STANDARD_LIBRARY)), text
            total += len(text)
            if limit_characters is not None and total >= limit_characters:
                return
