"""Saving, finding and deleting the checkpoints of one run.

A checkpoint is saved in this order, so that a kill at any moment leaves at least one whole checkpoint:

1. write all files to a temporary directory and flush them,
2. record every file's size and checksum in the manifest,
3. rename the directory to its final name,
4. move `latest`,
5. read the new checkpoint back and compare it with the manifest,
6. only then delete old ones.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from megamor.checkpoint import commit, layout
from megamor.checkpoint.manifest import create_manifest, find_damage, manifest_json, summary
from megamor.checkpoint.retention import Retention, read_losses, write_losses
from megamor.checkpoint.set_aside import restore_links, set_aside_after
from megamor.checkpoint.trainer_state import TrainerState
from megamor.errors import CheckpointError, MegamorError
from megamor.files import sync_tree, write_durably
from megamor.ranks import OUT_OF_MEMORY, Ranks, describe

log = logging.getLogger("megamor.checkpoint")

T = TypeVar("T")
Writer = Callable[[Path], None]
VISIBILITY_TIMEOUT_SECONDS = 60.0
SETTLING_SECONDS = 10.0
"""Files that are missing may appear for this long before a checkpoint counts as damaged."""


class CheckpointManager:
    """Checkpoints of one run in one directory, which all ranks see. Methods are collective unless they say otherwise.

    `save` may run in a thread while training continues if `ranks` have a group of their own. Only one method may run at
    a time.

    Args:
        directory: created if missing. What an interrupted save left in it is cleared away.
        keep_last, keep_every, keep_best: see `Retention`.
        ranks: the ranks that save together; all processes of the run by default.
        may_write: called on rank 0, possibly in a thread, before anything is written or deleted; raises if this process
            may not write any more.
        on_stage: called with the name of each stage of a save: `"started"`, `"written"`, `"manifest"`, `"renamed"`,
            `"latest"`, `"verified"`, `"expiring"` (for each deletion), `"done"`; on rank 0 alone for `"manifest"`,
            `"renamed"`, `"latest"` and `"expiring"`. It must not raise.

    Raises:
        CheckpointError: the directory can't be written to.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        keep_every: int | None = None,
        keep_best: int = 0,
        ranks: Ranks | None = None,
        may_write: Callable[[], None] | None = None,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.directory = directory
        self.keep = Retention(keep_last, keep_every, keep_best)
        self.ranks = ranks or Ranks.current()
        self.may_write, self.on_stage = may_write or (lambda: None), on_stage
        self._damaged: set[int] = set()
        # `best` is moved by saves, possibly in a thread, and by `record_loss`.
        self._best_lock = threading.Lock()
        self._on_first_rank(f"preparing {directory}", self._prepare)

    def save(self, step: int, writers: Sequence[Writer], files: Mapping[str, str | bytes | Path]) -> Path:
        """Save and publish the checkpoint of `step`. After a failure nothing of it is left and `latest` is unchanged.

        Args:
            step: optimizer steps done. An existing checkpoint of the same step is replaced.
            writers: called one after the other on every rank with the directory to write to. After each, the ranks
                agree that it succeeded everywhere, so a writer may use collectives.
            files: written by rank 0: name → text, bytes, or a file to copy.

        Returns:
            The published directory.

        Raises:
            CheckpointError: on every rank, if any rank failed (full disk, directory that can't be written to).
        """
        draft = self.directory / (layout.WRITING_PREFIX + layout.step_name(step))
        try:
            self._write(draft, writers, files)
            self.on_stage("written")
            final = self._commit(draft, step)
        except OUT_OF_MEMORY:
            raise  # of this rank alone
        except Exception:
            # All ranks agreed on the failure before it was raised, so none of them is still writing to `draft`.
            self._on_first_rank("clearing away a failed save", self._clear)
            raise
        self._expire(step)
        self.on_stage("done")
        return final

    def is_empty(self) -> bool:
        """Whether there is no checkpoint, whole or damaged."""
        return not self._candidates()

    def latest_valid(self, at_most: int | None = None) -> Path | None:
        """The checkpoint to resume from: the one that `latest` names or, if it is damaged, the newest whole one before.

        Every file is read and compared with the manifest; damage is logged. None if there are no checkpoints (of step
        `at_most` or below).

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        candidates = self._candidates()
        if at_most is not None:
            candidates = [step for step in candidates if step <= at_most]
        for step in candidates:
            damage = self._find_damage(self.directory / layout.step_name(step))
            if not damage:
                return self._visible(step)
            self._damaged.add(step)
            if self.ranks.rank == 0:
                log.error("%s is damaged and not used: %s", self.directory / layout.step_name(step), summary(damage))
        if candidates:
            # Starting over would look like success, and its saves would replace what may still be recoverable.
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.directory} is whole; restore one from a copy, "
                "or move the directory away to start from the beginning"
            )
        return None

    def valid(self, step: int) -> Path:
        """The checkpoint of `step`.

        Raises:
            CheckpointError: there is none, or it isn't whole.
        """
        if step not in (steps := self._candidates()):
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; it has those of steps: {there}")
        if damage := self._find_damage(self.directory / layout.step_name(step)):
            raise CheckpointError(f"the checkpoint of step {step} is damaged: {summary(damage)}")
        return self._visible(step)

    def resumed_from(self) -> int | None:
        """The last `checkpoint.resume_step` that the run followed, as its newest readable checkpoint says."""

        def read() -> int | None:
            root = self.directory
            for step in layout.by_preference(layout.published_steps(root), layout.latest_step(root)):
                with suppress(CheckpointError):
                    return TrainerState.read(root / layout.step_name(step)).resumed_from
            return None

        return self._on_first_rank("reading the newest checkpoint", read)

    def set_aside_after(self, step: int, also: Sequence[Path] = ()) -> Path | None:
        """See `set_aside.set_aside_after`."""

        def move() -> Path | None:
            self.may_write()
            return set_aside_after(self.directory, step, also)

        return self._on_first_rank("setting later checkpoints aside", move)

    def record_loss(self, step: int, loss: float) -> None:
        """Store the validation loss of `step`, saved or not, for `keep_best`. For rank 0 alone, from any thread.

        Raises:
            CheckpointError: it can't be written.
        """
        if self.keep.best and math.isfinite(loss):
            try:
                self.may_write()
                with self._best_lock:
                    write_losses(self.directory, {**read_losses(self.directory), step: loss})
                self._point_best()
            except OSError as error:
                raise CheckpointError(f"can't store the validation loss of step {step}: {describe(error)}") from error

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        commit.sweep(self.directory)
        restore_links(self.directory)
        # A directory that can't be written to must be found now, not at the first save.
        probe = layout.draft_of(self.directory / "probe")
        probe.touch()
        probe.unlink()

    def _clear(self) -> None:
        try:
            self.may_write()  # else it would be the new writer's drafts that are cleared away
            commit.sweep(self.directory)
        except (OSError, MegamorError) as error:  # raising would hide the failure of the save
            log.error("can't clear away a failed save: %s", describe(error))

    def _create(self, draft: Path) -> None:
        self.may_write()
        draft.mkdir()

    def _write(self, draft: Path, writers: Sequence[Writer], files: Mapping[str, str | bytes | Path]) -> None:
        self._on_first_rank(f"creating {draft}", lambda: self._create(draft))
        self.ranks.run_on_all("looking for the checkpoint directory", partial(_wait_until, Path.is_dir, draft))
        self.on_stage("started")
        for writer in writers:
            self.ranks.run_on_all(f"writing {draft}", partial(_call, writer, draft))
        self._on_first_rank(f"writing {draft}", lambda: _add_files(draft, files))

    def _commit(self, draft: Path, step: int) -> Path:
        final = self.directory / layout.step_name(step)
        manifest = create_manifest(draft, self.ranks)  # flushes the files

        def publish() -> None:
            # Killed before the rename: `draft` is deleted at the next start, which resumes from the old `latest`.
            write_durably(draft / layout.MANIFEST_FILE, manifest_json(manifest))
            sync_tree(draft)
            self.on_stage("manifest")
            self.may_write()
            commit.publish(draft, final)
            self.on_stage("renamed")
            # Killed here: the new checkpoint is whole, but `latest` names the one before, and resuming from either is
            # right. Were `latest` moved first, it could name a checkpoint that never came to be.
            commit.point(self.directory / layout.LATEST, final.name)
            self.on_stage("latest")

        self._on_first_rank(f"publishing {final}", publish)
        return final

    def _expire(self, newest: int) -> None:
        """Delete old checkpoints, after the new one has been read back whole."""
        expired = self._on_first_rank("looking for old checkpoints", lambda: self._expired(newest))
        if not expired:
            return
        # The old ones are the only other copies: a new one that a faulty disk has changed must not replace them.
        damage = self._find_damage(self.directory / layout.step_name(newest))
        if damage:
            raise CheckpointError(f"the checkpoint of step {newest} can't be read back: {summary(damage)}")
        self.on_stage("verified")
        self._on_first_rank("deleting old checkpoints", lambda: self._delete(expired))

    def _candidates(self) -> list[int]:
        """Steps with a checkpoint that any rank sees, or that `latest` names, best first."""
        root = self.directory
        views = self.ranks.run_on_all(
            "reading the directory", lambda: (layout.latest_step(root), layout.published_steps(root))
        )
        latest = next((named for named, _ in views if named is not None), None)
        # A step that `latest` names and whose directory is gone counts as damaged: it must not be ignored silently.
        steps = {step for _, published in views for step in published} | ({latest} if latest is not None else set())
        return layout.by_preference(steps, latest)

    def _find_damage(self, checkpoint: Path) -> list[str]:
        """What is wrong with `checkpoint`. With several ranks, missing files get a few seconds to become visible."""
        deadline = time.monotonic() + (SETTLING_SECONDS if self.ranks.world_size > 1 else 0.0)
        while find_damage(checkpoint, self.ranks, hashes=False):
            # Clocks differ, so rank 0 decides when all stop waiting.
            if self._on_first_rank("waiting for files", lambda: time.monotonic() > deadline):
                break
            time.sleep(0.1)
        return find_damage(checkpoint, self.ranks)

    def _expired(self, newest: int) -> list[int]:
        self.may_write()
        self._point_best()
        # Steps above `newest` are from before `latest` was moved back. They stay until the run replaces them.
        steps = [step for step in layout.published_steps(self.directory) if step <= newest]
        losses = read_losses(self.directory) if self.keep.best else {}
        return self.keep.expired(steps, self._damaged - {newest}, losses)

    def _delete(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.on_stage("expiring")
            try:
                commit.delete(self.directory / layout.step_name(step))
            except OSError as error:  # costs disk space, but the save has succeeded
                log.error("can't delete the expired checkpoint of step %d: %s", step, describe(error))

    def _point_best(self) -> None:
        """Let `best` point to the published checkpoint with the lowest loss."""
        if not self.keep.best:
            return
        with self._best_lock:
            ranked = Retention.ranked(layout.published_steps(self.directory), read_losses(self.directory))
            if ranked:
                commit.point(self.directory / layout.BEST, layout.step_name(ranked[0]))

    def _visible(self, step: int) -> Path:
        """The whole checkpoint of `step`, once every rank sees it."""
        checkpoint = self.directory / layout.step_name(step)
        self.ranks.run_on_all(f"looking for {checkpoint}", partial(_wait_until, _is_visible, checkpoint))
        return checkpoint

    def _on_first_rank(self, what: str, action: Callable[[], T]) -> T:
        """Result of `action` on rank 0, on every rank; a failure there is a failure everywhere."""
        result: T = self.ranks.run_on_all(what, action if self.ranks.rank == 0 else None)[0]
        return result


def _is_visible(checkpoint: Path) -> bool:
    """Whether this process sees every file at its full size, whatever the other ranks see."""
    return not find_damage(checkpoint, hashes=False)


def _wait_until(visible: Callable[[Path], bool], directory: Path) -> None:
    """Wait for a directory that another node made: network file systems cache that a name doesn't exist."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_SECONDS
    while not visible(directory):
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{directory} is not visible on this node after {VISIBILITY_TIMEOUT_SECONDS:.0f} s; set run.dir to a "
                "directory that all nodes share"
            )
        time.sleep(0.05)


def _add_files(draft: Path, files: Mapping[str, str | bytes | Path]) -> None:
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, draft / name)
        else:
            write_durably(draft / name, content)


def _call(writer: Writer, draft: Path) -> None:
    """Run a writer and drop its result, which would be sent to every rank."""
    writer(draft)
