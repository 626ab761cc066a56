"""Steps of the commit protocol that touch the file system: durable writes, atomic publication, safe deletion.

A kill between any two system calls leaves either the old or the new state, never something between (`layout` names
what may be left over, `sweep` puts it in order).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megamor.checkpoint.layout import (
    DELETING_PREFIX,
    DRAFT_SUFFIX,
    REPLACED_PREFIX,
    WRITING_PREFIX,
    draft_of,
)


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


def publish(draft: Path, final: Path) -> None:
    """Give a finished draft its final name. One of the same name steps aside first and is deleted afterwards."""
    replaced = final.with_name(REPLACED_PREFIX + final.name)
    if final.exists():
        final.rename(replaced)
    draft.rename(final)
    sync_directory(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def point(link: Path, name: str) -> None:
    """Move `link` to its sibling `name` in one atomic step; it is relative, so that the tree may be moved."""
    draft = draft_of(link)
    draft.unlink(missing_ok=True)
    draft.symlink_to(name)
    draft.replace(link)
    sync_directory(link.parent)


def replace_durably(path: Path, content: str) -> None:
    """Replace a file in one atomic step."""
    draft = draft_of(path)
    write_durably(draft, content)
    draft.replace(path)
    sync_directory(path.parent)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that a half deleted one is never taken for a whole one."""
    doomed = checkpoint.with_name(DELETING_PREFIX + checkpoint.name)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def sweep(root: Path) -> None:
    """Put in order what an interrupted save left in `root`."""
    for draft in root.glob(f".*{DRAFT_SUFFIX}"):
        draft.unlink()
    for replaced in root.glob(REPLACED_PREFIX + "*"):
        final = root / replaced.name.removeprefix(REPLACED_PREFIX)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for prefix in (WRITING_PREFIX, DELETING_PREFIX):
        for leftover in root.glob(prefix + "*"):
            shutil.rmtree(leftover)
