"""Durable writes: a file is either complete and on disk under its name, or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a new file and flush it to disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk: a file's own fsync does not make its name durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush the entries of `directory` and of every directory below it, the deepest first."""
    for path, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(path))


def replace_file(path: Path, content: str | bytes, draft: Path | None = None) -> None:
    """Replace `path` in one atomic step, by way of `draft` in the same directory (default: `<path>.partial`)."""
    draft = draft or path.with_name(path.name + ".partial")
    write_durably(draft, content)
    draft.replace(path)
    sync_directory(path.parent)
