"""Opening a finished checkpoint for evaluation, generation or export, by one process."""

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
    """A checkpoint that has passed its check. It needs nothing outside of `directory`."""

    directory: Path

    @property
    def step(self) -> int:
        """Optimizer steps done; a copy under another name than `step_…` knows it from `trainer.json`."""
        step = layout.parse_step(self.directory.name)
        return self.trainer_state.step if step is None else step

    @property
    def config_yaml(self) -> str:
        """The resolved configuration of the run, as YAML text."""
        return stored_file(self.directory, layout.CONFIG_FILE).read_text(encoding="utf-8")

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that the model was trained with.

        Raises:
            CheckpointError: it was saved without one.
        """
        return stored_file(self.directory, layout.TOKENIZER_FILE)

    @property
    def trainer_state(self) -> TrainerState:
        """State of the training loop."""
        return TrainerState.read(self.directory)

    def weights(self) -> dict[str, Tensor]:
        """Full CPU tensors by parameter name; see `load_weights`."""
        return load_weights(self.directory)


def stored_file(directory: Path, name: str) -> Path:
    """The file of that name in a checkpoint's or an export's directory.

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
        path: a checkpoint (`…/step_00000100`), `latest`, the directory that holds them, or a run's directory. Of a
            directory of checkpoints the one of `latest` is taken; if it is damaged, the newest whole one before it,
            with a warning.
        full: read every file and compare its checksum, instead of its size only.

    Raises:
        CheckpointError: nothing there is a checkpoint, or none is whole.
    """
    path = Path(path)
    root = _directory_of_checkpoints(path)
    if root is not None:
        return _newest(root, full=full)
    if not path.exists():
        link = f" (a link to {path.readlink()}, which is gone)" if path.is_symlink() else ""
        raise CheckpointError(f"there is no checkpoint at {path}{link}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a checkpoint's directory, such as runs/x/checkpoints/latest")
    directory = path.resolve()
    verify(directory, hashes=full)
    return Checkpoint(directory)


def _directory_of_checkpoints(path: Path) -> Path | None:
    for root in (path, path / layout.CHECKPOINTS_DIR):
        if layout.published_steps(root) or (root / layout.LATEST).is_symlink():
            return root
    return None


def _newest(root: Path, *, full: bool) -> Checkpoint:
    for step in layout.by_preference(layout.published_steps(root), layout.latest_step(root)):
        directory = root / layout.step_name(step)
        damage = find_damage(directory, hashes=full)
        if not damage:
            return Checkpoint(directory.resolve())
        log.error("%s is damaged and not used: %s", directory, summary(damage))
    raise CheckpointError(f"{root} holds no whole checkpoint")
