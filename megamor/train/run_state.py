"""What goes into a run's checkpoints, and how a run is restored from one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megamor.checkpoint import (
    BackgroundSave,
    CheckpointManager,
    TrainerState,
    check_same_model,
    code_revision,
    describe_origin,
    library_versions,
    open_checkpoint,
    origin_of,
    restore_rng,
    rng_states,
    weight_shapes,
    write_rng,
)
from megamor.checkpoint.layout import (
    CHAT_TEMPLATE_FILE,
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    END_OF_TEXT_FILE,
    LATEST,
    TOKENIZER_FILE,
    TRAINER_FILE,
    published_steps,
    step_name,
)
from megamor.checkpoint.state import write_state
from megamor.checkpoint.trainer_state import directory_identity, is_copy
from megamor.config import Config, DataConfig, config_to_yaml
from megamor.config.changes import Effect
from megamor.config.derive import Consumed
from megamor.config.paths import expand_path
from megamor.config.segments import stages
from megamor.data.loader import TrainingLoader
from megamor.data.meta import end_of_text
from megamor.errors import CheckpointError, ConfigError, DataError, MegamorError
from megamor.parallel import Backend, resolve_backend
from megamor.ranks import from_first_rank, run_on_all_ranks
from megamor.routing import draws_random
from megamor.train.resume import Resumption

log = logging.getLogger("megamor.train")


@dataclass(frozen=True)
class Origin:
    """The code and data that a checkpoint comes from. Determined once per launch: asking git and pip is slow."""

    data_fingerprints: dict[str, str]
    code_revision: str = field(default_factory=code_revision)
    versions: dict[str, str] = field(default_factory=library_versions)


@dataclass
class RunProgress(Consumed):
    """How far a run is, over all its launches; the fields are those of `TrainerState`."""

    seconds: float = 0.0
    lr: float | None = None
    run_ids: dict[str, str] = field(default_factory=dict)
    resumed_from: int | None = None
    recursions: int | None = None
    """The most recursions that a growing schedule has reached; None without one."""
    started_from: dict[str, Any] = field(default_factory=dict)


class Stateful(Protocol):
    """Something that changes during training. Its state is plain data (JSON) and the same on all ranks."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunCheckpoints:
    """Saves and restores a whole run: model, optimizer, random states, position in the data, progress.

    `model_shapes` are the shapes of the model's state before it was distributed, by name. `files` are copied into every
    checkpoint. `components` are all other objects that change during training.
    """

    config: Config
    manager: CheckpointManager
    backend: Backend
    loader: TrainingLoader
    model_shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, str | bytes]
    origin: Origin
    components: Mapping[str, Stateful] = field(default_factory=dict)
    background: BackgroundSave = field(default_factory=BackgroundSave)

    def save(self, progress: RunProgress) -> Path | None:
        """Write a checkpoint of `progress.step`; with `checkpoint.asynchronous`, start to. Collective.

        At most one is written at a time, so this waits for the previous one.

        Returns:
            The checkpoint; None while it is being written (see `wait`).
        """
        self.wait()
        # The small state is copied here, before training continues and changes it.
        state = TrainerState(
            **asdict(progress),
            data=self.loader.state_dict(),
            world_size=self.backend.world_size,
            components={name: component.state_dict() for name, component in self.components.items()},
            backend=resolve_backend(self.config.parallel, self.backend.world_size, self.backend.device.type == "cuda"),
            run_directory=directory_identity(self.manager.directory.parent),
            data_fingerprints=self.origin.data_fingerprints,
            code_revision=self.origin.code_revision,
            versions=self.origin.versions,
        )
        files = {**self.files, TRAINER_FILE: state.to_json()}
        rng = partial(write_rng, states=rng_states(self.backend.world_size), rank=self.backend.rank)
        # Random states are gathered now for the same reason: a background save must not see those of later steps.
        if not self.config.checkpoint.asynchronous:
            return self.manager.save(progress.step, [self.backend.save, rng], files)
        # The thread uses the manager's own gloo group, so its collectives can't mix with those of training.
        write = partial(write_state, tensors=self.backend.copy_state(), group=self.manager.ranks.group)
        self.background.start(partial(self.manager.save, progress.step, [write, rng], files))
        return None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing a checkpoint in the background."""
        return self.background.is_running

    def wait(self) -> Path | None:
        """Wait for the checkpoint that is being written; None if there is none. Collective.

        Raises:
            CheckpointError: on every rank, if writing it failed; `latest` is as it was.
        """
        return self.background.wait()

    def close(self) -> None:
        """Finish the checkpoint that is being written, without hiding an error that already ends the run."""
        try:
            self.wait()
        except MegamorError as error:
            log.error("a checkpoint was not written: %s", error)

    def record_loss(self, step: int, loss: float) -> None:
        """Store the validation loss of `step`, by which `checkpoint.keep_best` chooses what to keep. Collective."""
        run_on_all_ranks(lambda: self.manager.record_loss(step, loss) if self.backend.rank == 0 else None)

    def resume(self) -> tuple[RunProgress, Resumption, list[str]] | None:
        """Restore the checkpoint that this launch resumes from or, with `init.branch_from`, the other run's that it
        branches off; None if there is neither. Collective.

        Nothing on disk changes.

        Returns:
            The run's progress, what this launch changes, and what the user should be told about it.

        Raises:
            ConfigError: this launch would change the model's function.
            CheckpointError: it belongs to another model, no checkpoint is whole, or that of `checkpoint.resume_step` or
                `init.branch_from` isn't there.
        """
        wanted = self.config.checkpoint.resume_step
        # Done once only: a job that is requeued has the same command and must not fall back again.
        returns = wanted is not None and self.manager.resumed_from() != wanted
        # Every file is checked against the manifest; a damaged checkpoint is skipped in favour of the one before.
        directory = self.manager.valid(wanted) if wanted and returns else self.manager.latest_valid()
        branch = self.config.init.branch_from if directory is None else None
        if branch is not None:
            directory = from_first_rank(lambda: branch_point(expand_path(branch, "init.branch_from")))
        if directory is None:
            return None
        resumption = run_on_all_ranks(lambda: Resumption.of(directory, self.config, self.files, returns, branch))
        progress, state = self._restore(directory)
        lines = [f"resuming after step {state.step}"]
        if branch is not None:
            origin = from_first_rank(lambda: origin_of("branch", directory))
            progress = replace(progress, run_ids={}, resumed_from=None, started_from=origin)
            lines = [f"branching after step {state.step} from {describe_origin(origin)}"]
        if state.world_size != self.backend.world_size:
            lines.append(f"processes: {state.world_size} -> {self.backend.world_size} ({Effect.ARITHMETIC.value})")
        for name in state.versions.keys() & self.origin.versions.keys():
            if state.versions[name] != self.origin.versions[name]:
                lines.append(f"version of {name}: {state.versions[name]} -> {self.origin.versions[name]}")
        if state.flops is None:
            lines.append("the checkpoint doesn't say how many FLOPs were executed: they count from here")
            if self.config.train.max_flops is not None:
                raise ConfigError(f"train.max_flops needs a checkpoint that counts FLOPs; {directory} is older")
        # Checkpoints of earlier versions don't say where they were, but under which name.
        origin = state.run_directory.get("path", resumption.old.run.name)
        renamed = not state.run_directory and origin != self.config.run.name
        if branch is None and (renamed or is_copy(self.manager.directory.parent, state.run_directory)):
            lines.append(f"this is a copy of the run {origin}: new ids in experiment trackers")
            progress.run_ids = {}
        newer = [step for step in published_steps(self.manager.directory) if step > state.step]
        if newer and not returns:
            lines.append(f"the checkpoints of steps {newer} are not used, and replaced when the run gets there")
        return progress, resumption, lines + resumption.describe(progress, progress.lr)

    def set_later_aside(self, progress: RunProgress, keep: Sequence[Path]) -> Path | None:
        """Start again from `progress` as `checkpoint.resume_step` asks: move later checkpoints away. Collective.

        Files `keep` are copied along. Returns where all of them are now; None if there was nothing later.
        """
        progress.resumed_from = self.config.checkpoint.resume_step
        return self.manager.set_aside_after(progress.step, keep)

    def roll_back(self, at_most: int, progress: RunProgress) -> RunProgress | None:
        """Restore the newest whole checkpoint of step `at_most` or before; None if there is none. Collective.

        Raises:
            CheckpointError: no checkpoint is whole.
        """
        self.wait()
        directory = self.manager.latest_valid(at_most)
        if directory is None:
            return None
        # What belongs to the run, not to its weights, stays as it is now.
        restored, _ = self._restore(directory)
        return replace(restored, run_ids=progress.run_ids, resumed_from=progress.resumed_from)

    def _restore(self, directory: Path) -> tuple[RunProgress, TrainerState]:
        state = run_on_all_ranks(lambda: self._read(directory))
        self.backend.load(directory)
        restore_rng(
            directory,
            rank=self.backend.rank,
            world_size=self.backend.world_size,
            seed=self.config.run.seed,
            step=state.step,
            draws_random=any(draws_random(stage.config.router) for stage in stages(self.config)),
        )
        progress = RunProgress(**{field.name: getattr(state, field.name) for field in fields(RunProgress)})
        return replace(progress, flops=state.flops or 0.0), state

    def _read(self, directory: Path) -> TrainerState:
        """Read and check all that can be refused before weights are overwritten; restores loader and components."""
        state = TrainerState.read(directory)
        check_same_model(directory, weight_shapes(directory), self.model_shapes)
        self._check_end_of_text(directory / END_OF_TEXT_FILE)
        if state.data:  # none beside weights without optimizer state, which `Backend.load` refuses
            self.loader.load_state_dict(state.data)
        # Components that this version doesn't have (or that are switched off) are left out on purpose.
        for name, saved in state.components.items():
            if name in self.components:
                self.components[name].load_state_dict(saved)
        return state

    def _check_end_of_text(self, stored: Path) -> None:
        now = str(self.files.get(END_OF_TEXT_FILE, ""))
        if now and stored.is_file() and (before := stored.read_text(encoding="utf-8")) != now:
            raise DataError(
                f"{stored} says that texts end with {before.strip()}, the data's side files say {now.strip()}: "
                "preprocess the data with the --eod-token of the run's first data"
            )


def branch_point(branch_from: str) -> Path:
    """The checkpoint RUN@STEP, or RUN@latest, of a run that may still be training; nothing is written there.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    run, _, step = branch_from.rpartition("@")
    root = Path(run) / CHECKPOINTS_DIR if (Path(run) / CHECKPOINTS_DIR).is_dir() else Path(run)
    if step == LATEST:
        return open_checkpoint(root, full=True).directory
    if int(step) not in (steps := published_steps(root)):
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"init.branch_from = {branch_from}: {root} has no such checkpoint; its steps are: {there}"
        )
    return open_checkpoint(root / step_name(int(step)), full=True).directory


def checkpoint_files(config: Config, data: DataConfig, tokenizer: bytes | None) -> dict[str, str | bytes]:
    """What makes a checkpoint usable on its own: the resolved configuration, the tokenizer with the chat
    template beside it, and the end of text.

    `data` is the configuration's with its paths expanded.
    """
    files: dict[str, str | bytes] = {CONFIG_FILE: config_to_yaml(config)}
    if tokenizer is not None:
        files[TOKENIZER_FILE] = tokenizer
        template = Path(str(data.tokenizer)).with_name(CHAT_TEMPLATE_FILE)
        files |= {template.name: template.read_bytes()} if template.is_file() else {}
    end = end_of_text([*(source.prefix for source in data.train), *data.validation.values()])
    if end is not None:
        files[END_OF_TEXT_FILE] = end.to_json()
    return files
