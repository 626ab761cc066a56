"""Opening a finished checkpoint for evaluation, generation or export, in one process."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megamor.checkpoint import layout
from megamor.checkpoint.manifest import find_damage, summary, verify
from megamor.checkpoint.state import load_weights
from megamor.checkpoint.trainer_state import TrainerState
from megamor.errors import CheckpointError

log = logging.getLogger("megamor.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has passed its check. Everything it needs is in `directory`."""

    directory: Path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        step = layout.parse_step(self.directory.name)
        return TrainerState.read(self.directory).step if step is None else step  # a copy may have any name

    @property
    def recursions(self) -> int | None:
        """The most recursions that a growing schedule has reached; None without one."""
        return TrainerState.read(self.directory).recursions

    @property
    def config_yaml(self) -> str:
        """The resolved configuration of the run, as YAML text."""
        path = stored_file(self.directory, layout.CONFIG_FILE)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} can't be read ({error}); copy the checkpoint again") from error

    def weights(self) -> dict[str, Tensor]:
        """Full CPU tensors by parameter name; see `load_weights`."""
        return load_weights(self.directory)


def stored_file(directory: Path, name: str) -> Path:
    """Path of the file `name` in the directory of a checkpoint or an export.

    Raises:
        CheckpointError: there is none.
    """
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {name}; it was saved without one")
    return path


def open_checkpoint(path: Path | str, *, full: bool = False) -> Checkpoint:
    """Open a checkpoint after checking it against its manifest.

    Args:
        path: a checkpoint (`…/step_00000100`), `latest`, a directory of checkpoints, or a run's directory. In the last
            two cases the checkpoint that `latest` names is opened; if it is damaged, this is logged and the newest
            whole one before it is opened.
        full: read every file and compare its checksum, not only its size.

    Raises:
        CheckpointError: there is no checkpoint, or none is whole.
    """
    path = Path(path)
    for root in (path, path / layout.CHECKPOINTS_DIR):
        if layout.published_steps(root) or (root / layout.LATEST).is_symlink():
            return _newest_whole(root, full=full)
    if not path.exists():
        link = f" (a link to {path.readlink()}, which is gone)" if path.is_symlink() else ""
        raise CheckpointError(f"there is no checkpoint at {path}{link}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a checkpoint's directory, such as runs/x/checkpoints/latest")
    if not layout.looks_like_checkpoint(path):
        raise CheckpointError(f"{path} is neither a checkpoint nor a run with one; give, for example, runs/x")
    directory = path.resolve()  # a run may move `latest` while the checkpoint is being read
    verify(directory, hashes=full)
    return Checkpoint(directory)


def _newest_whole(root: Path, *, full: bool) -> Checkpoint:
    for step in layout.by_preference(layout.published_steps(root), layout.latest_step(root)):
        directory = root / layout.step_name(step)
        damage = find_damage(directory, hashes=full)
        if not damage:
            return Checkpoint(directory.resolve())
        log.error("%s is damaged and not used: %s", directory, summary(damage))
    raise CheckpointError(f"no checkpoint in {root} is whole: restore one from a copy")
