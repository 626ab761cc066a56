"""The file system steps of the commit protocol: publishing a checkpoint, moving a link to it, deleting it.

Each step ends in one `rename`, which the file system does completely or not at all. A kill between any two lines
therefore leaves the old state or the new one, plus leftovers under names that no reader looks at (see `layout`), which
`sweep` clears away at the next start.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megamor.checkpoint.layout import DELETING_PREFIX, DRAFT_SUFFIX, REPLACED_PREFIX, WRITING_PREFIX, draft_of
from megamor.files import sync_directory


def publish(draft: Path, final: Path) -> None:
    """Give the finished directory `draft` its final name, replacing a checkpoint that has this name already."""
    replaced = final.with_name(REPLACED_PREFIX + final.name)
    if final.exists():
        # A directory can't be renamed onto one that isn't empty, so the old checkpoint is renamed first. A kill here
        # leaves no `final`, but both checkpoints whole: `sweep` gives the old one its name back.
        final.rename(replaced)
    draft.rename(final)
    # Until the parent's entries are flushed, a power failure can undo the rename; `latest` must not point to it before.
    sync_directory(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def point(link: Path, name: str) -> None:
    """Let `link` point to its sibling `name`, in one atomic step."""
    draft = draft_of(link)
    draft.unlink(missing_ok=True)
    draft.symlink_to(name)  # relative, so that the run's directory can be moved
    draft.replace(link)  # a symlink can't be changed in place: deleting it first would leave a moment without `latest`
    sync_directory(link.parent)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint. Deleting its files takes time, so it loses its name first: a kill in between leaves no
    incomplete checkpoint under a valid name."""
    doomed = checkpoint.with_name(DELETING_PREFIX + checkpoint.name)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def sweep(root: Path) -> None:
    """Clear away what an interrupted save or deletion left in `root`."""
    for draft in root.glob(f".*{DRAFT_SUFFIX}"):
        draft.unlink()
    # First the checkpoints that may have to be put back: if this is killed too, nothing has been lost.
    for replaced in root.glob(REPLACED_PREFIX + "*"):
        final = root / replaced.name.removeprefix(REPLACED_PREFIX)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for prefix in (WRITING_PREFIX, DELETING_PREFIX):
        for leftover in root.glob(prefix + "*"):
            shutil.rmtree(leftover)
