"""Durable writes and file hashes: a file is either complete under its name, or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamor.errors import CheckpointError
from megamor.lock import WriteLock


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for text from anywhere: whatever can't be read is a ValueError, nested too deeply included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if there is none."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains a {type(content).__name__} instead of an object")
    return content


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


@contextmanager
def draft_for(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial` to write to; it becomes `path` when the block ends, and is removed after an error.

    For files that are too large for `replace_file`, or that a library writes. Creates the directory if needed. Raises
    InUseError if another process is doing the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".partial")
    with WriteLock(path, str(path), "wait for it or choose another output") as lock:
        try:
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            lock.check()
            draft.replace(path)
            sync_directory(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def sha256_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of a file; of several, that of their sorted hashes, one on each line."""
    hashes = sorted(map(sha256_of_file, paths))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's contents in hexadecimal. Raises OSError if it can't be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
