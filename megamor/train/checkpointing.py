"""What of a run goes into a checkpoint, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamor.checkpoint import (
    CheckpointManager,
    TrainerState,
    check_same_model,
    code_revision,
    library_versions,
    restore_rng,
    save_rng,
)
from megamor.checkpoint.layout import CONFIG_FILE, TOKENIZER_FILE, TRAINER_FILE
from megamor.config import Config, config_to_yaml
from megamor.data import TrainingLoader
from megamor.errors import CheckpointError
from megamor.parallel import Backend, resolve_backend


@dataclass
class Progress:
    """How far a run is. `run_ids` are those of experiment trackers."""

    step: int = 0
    tokens_seen: int = 0
    run_ids: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunCheckpoints:
    """Saves and restores everything of a run: model, optimizer, random states, position in the data, progress."""

    config: Config
    manager: CheckpointManager
    backend: Backend
    loader: TrainingLoader
    fingerprints: Callable[[], dict[str, str]]

    def save(self, progress: Progress) -> Path:
        """Publish a checkpoint of `progress.step`. Collective."""
        state = TrainerState(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            data=self.loader.state_dict(),
            world_size=self.backend.world_size,
            backend=resolve_backend(self.config.parallel, self.backend.world_size),
            run_ids=progress.run_ids,
            data_fingerprints=self.fingerprints(),
            code_revision=code_revision(),
            versions=library_versions(),
        )
        files: dict[str, Any] = {CONFIG_FILE: config_to_yaml(self.config), TRAINER_FILE: state.to_json()}
        if self.config.data.tokenizer:
            files[TOKENIZER_FILE] = Path(self.config.data.tokenizer)
        return self.manager.save(progress.step, [self.backend.save, self._save_rng], files)

    def restore(self) -> Progress | None:
        """Go back to the newest whole checkpoint; None if there is none. Collective.

        Raises:
            CheckpointError: it belongs to another model or backend, or no checkpoint is whole.
        """
        directory = self.manager.latest_valid()
        if directory is None:
            return None
        state = TrainerState.read(directory)
        self._check_backend(directory, state)
        check_same_model(directory, parameter_shapes(self.backend))
        self.backend.load(directory)
        self.loader.load_state_dict(state.data)
        restore_rng(
            directory,
            rank=self.backend.rank,
            world_size=self.backend.world_size,
            seed=self.config.run.seed,
            step=state.step,
        )
        return Progress(state.step, state.tokens_seen, state.run_ids)

    def _save_rng(self, directory: Path) -> None:
        save_rng(directory, rank=self.backend.rank, world_size=self.backend.world_size)

    def _check_backend(self, directory: Path, state: TrainerState) -> None:
        now = resolve_backend(self.config.parallel, self.backend.world_size)
        if (now == "deepspeed") != (state.backend == "deepspeed"):
            raise CheckpointError(
                f"{directory} was written by the {state.backend} backend and can't be resumed by {now}: resume with "
                f"parallel.backend={state.backend}, or start another run (run.name)"
            )


def parameter_shapes(backend: Backend) -> dict[str, tuple[int, ...]]:
    """Full shapes of the model's state by name; parameters that a backend has emptied keep their full shape aside."""
    return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in backend.module.state_dict().items()}
