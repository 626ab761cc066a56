"""Moving checkpoints out of a run's way without deleting them, and putting links back that a copy has replaced.

For one process: the first rank calls these.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from megamor.checkpoint import commit, layout
from megamor.checkpoint.manifest import find_damage
from megamor.checkpoint.retention import read_losses, write_losses
from megamor.checkpoint.trainer_state import TrainerState
from megamor.errors import CheckpointError
from megamor.files import sync_directory

log = logging.getLogger("megamor.checkpoint")


def set_aside_after(root: Path, step: int, also: Sequence[Path] = ()) -> Path | None:
    """Let `latest` name `step`, and move every later checkpoint of `root` with its validation loss to `set_aside/`.

    Files `also` are copied there. A kill in between loses nothing, and the next call moves the rest.

    Returns:
        Where they are now; None if there are no later checkpoints.
    """
    # First of all: a launch that finds only some of them moved must resume from `step` too.
    commit.point(root / layout.LATEST, layout.step_name(step))
    later = [layout.step_name(found) for found in layout.published_steps(root) if found > step]
    if not later:
        return None
    target = _new_directory(root, f"after_{layout.step_name(step)}")
    for file in also:
        if file.exists():
            shutil.copy2(file, target / file.name)
    # A loss of the left branch must not make a later checkpoint of the same step the best.
    losses = read_losses(root)
    if losses:
        write_losses(target, {found: loss for found, loss in losses.items() if found > step})
        write_losses(root, {found: loss for found, loss in losses.items() if found <= step})
    for name in later:
        (root / name).rename(target / name)
    best = root / layout.BEST
    if best.is_symlink() and not best.exists():
        best.unlink()  # the next save or evaluation points it to the best of the others
    sync_directory(target)
    sync_directory(root)
    return target


def restore_links(root: Path) -> None:
    """Make `latest` and `best` links again where they are directories, as `cp -rL` leaves them.

    A copy of a whole `step_…` beside it is deleted. If there is none of that step, the copy gets its name. Any other
    directory is moved to `set_aside/`.
    """
    for link in (root / layout.LATEST, root / layout.BEST):
        if link.is_symlink() or not link.is_dir():
            continue
        try:
            original = root / layout.step_name(TrainerState.read(link).step)
        except CheckpointError:
            original = None
        if original is not None and not original.exists():
            link.rename(original)
            log.warning("%s was a directory; it is now a link to %s", link, original.name)
        elif original is not None and _same(link, original):
            commit.delete(link)
            log.warning("%s was a copy of %s; it is now a link to it", link, original.name)
        else:
            kept = _new_directory(root, link.name) / link.name
            link.rename(kept)
            log.warning("%s was a directory that is no copy of a whole checkpoint beside it; moved to %s", link, kept)
            continue
        commit.point(link, original.name)


def _same(copy: Path, original: Path) -> bool:
    manifests = [directory / layout.MANIFEST_FILE for directory in (copy, original)]
    if not all(manifest.is_file() for manifest in manifests):
        return False
    return manifests[0].read_bytes() == manifests[1].read_bytes() and not find_damage(original)


def _new_directory(root: Path, name: str) -> Path:
    names = (name if number == 1 else f"{name}_{number}" for number in count(1))
    target = next(path for path in (root / layout.SET_ASIDE / name for name in names) if not path.exists())
    target.mkdir(parents=True)
    return target
