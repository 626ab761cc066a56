"""Moving checkpoints out of a run's way without deleting them, and putting links back that a copy has replaced.

For one process: the first rank calls these.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from megamor.checkpoint import commit, layout
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
    """Replace directories named `latest` and `best`, as `cp -rL` leaves them, by links to the checkpoint of their step.

    The directory gets the name of that checkpoint if there is none, or is moved to `set_aside/`.
    """
    for link in (root / layout.LATEST, root / layout.BEST):
        if link.is_symlink() or not link.is_dir():
            continue
        original = None
        with suppress(CheckpointError):
            original = root / layout.step_name(TrainerState.read(link).step)
        kept = original if original and not original.exists() else _new_directory(root, link.name) / link.name
        link.rename(kept)
        log.warning("%s was a directory instead of a link; it is now %s", link, kept)
        if original is not None:
            commit.point(link, original.name)


def _new_directory(root: Path, name: str) -> Path:
    names = (name if number == 1 else f"{name}_{number}" for number in count(1))
    target = next(path for path in (root / layout.SET_ASIDE / name for name in names) if not path.exists())
    target.mkdir(parents=True)
    return target
