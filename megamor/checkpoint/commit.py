"""Steps of the commit protocol that touch the file system: durable writes, atomic publication, safe deletion.

A kill between any two system calls leaves either the old or the new state, never something between (`layout` names
what may be left over, `sweep` puts it in order).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megamor.checkpoint.layout import (
    DELETING_PREFIX,
    DRAFT_SUFFIX,
    REPLACED_PREFIX,
    WRITING_PREFIX,
    draft_of,
)
from megamor.files import sync_directory


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
