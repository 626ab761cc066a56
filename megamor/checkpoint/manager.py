"""Saving, finding and expiring the checkpoints of one run.

A checkpoint comes into being in this order, and a kill at any moment leaves at least one whole checkpoint: write all
files to a temporary directory; flush them; record every file's size and checksum in the manifest; rename the directory;
move `latest`; only then delete expired ones.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from megamor.checkpoint import commit, layout
from megamor.checkpoint.manifest import create_manifest, find_damage, summary, verify
from megamor.checkpoint.ranks import Ranks, describe
from megamor.errors import CheckpointError, ConfigError

log = logging.getLogger("megamor.checkpoint")

T = TypeVar("T")
Writer = Callable[[Path], None]
VISIBILITY_TIMEOUT_SECONDS = 60.0


class CheckpointManager:
    """Checkpoints of one run in one directory, shared by all ranks. All methods are collective.

    Args:
        directory: on a file system that every rank sees; created if missing. Leftovers of an interrupted save go.
        keep_last: how many of the newest checkpoints to keep, at least 1.
        ranks: who saves together; all processes of the run by default.
        on_stage: told the name of each stage of a save as it is reached: `"started"`, `"written"`, `"manifest"`,
            `"renamed"`, `"latest"`, `"expiring"` (each), `"done"`; the middle ones on rank 0 alone. Must not raise.

    Raises:
        ConfigError: `keep_last` below 1.
        CheckpointError: the directory can't be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        ranks: Ranks | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        if keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last is {keep_last}; at least 1 must be kept")
        self.directory = directory
        self.keep_last = keep_last
        self.ranks = ranks or Ranks.current()
        self.last_saved_step: int | None = None
        self._reached = on_stage or (lambda stage: None)
        self._damaged: set[int] = set()
        self._on_first_rank(f"preparing {directory}", self._prepare)

    def save(self, step: int, writers: Sequence[Writer], files: Mapping[str, str | bytes | Path]) -> Path:
        """Save and publish the checkpoint of `step`; on failure nothing of it stays and `latest` is untouched.

        Args:
            step: optimizer steps done. One of the same step is replaced.
            writers: called one after the other on every rank with the directory to write to; the ranks agree after
                each that it succeeded everywhere, so a writer may use collectives.
            files: what the first rank adds: name → text, bytes, or a file to copy.

        Returns:
            The published directory.

        Raises:
            CheckpointError: on every rank, when any rank failed (full disk, unwritable directory).
        """
        draft = self.directory / (layout.WRITING_PREFIX + layout.step_name(step))
        try:
            self._write(draft, writers, files)
            self._reached("written")
            final = self._commit(draft, step)
        except Exception:
            # Every rank is here and none writes any more: a failure was agreed on by all of them.
            self._on_first_rank("clearing away a failed save", self._clear)
            raise
        self.last_saved_step = step
        self._on_first_rank("expiring old checkpoints", lambda: self._expire(step))
        self._reached("done")
        return final

    def latest_valid(self) -> Path | None:
        """The checkpoint to go on from: that of `latest`, or the newest before it that is whole. None if there is none.

        Every file is read and compared with the manifest; damage is reported through logging (stderr by default).

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        candidates = self._on_first_rank("reading the directory", lambda: layout.by_preference(self.directory))
        for step in candidates:
            checkpoint = self.directory / layout.step_name(step)
            damage = find_damage(checkpoint, self.ranks)
            if not damage:
                return checkpoint
            self._damaged.add(step)
            if self.ranks.rank == 0:
                log.error("%s is damaged and not used: %s", checkpoint, summary(damage))
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.directory} is whole; restore one from a copy, "
                "or move the directory away to start from the beginning"
            )
        return None

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        commit.sweep(self.directory)

    def _clear(self) -> None:
        try:
            commit.sweep(self.directory)
        except OSError as error:  # must not hide the failure that led here
            log.error("can't clear away a failed save: %s", describe(error))

    def _write(self, draft: Path, writers: Sequence[Writer], files: Mapping[str, str | bytes | Path]) -> None:
        self._on_first_rank(f"creating {draft}", draft.mkdir)
        self.ranks.together("looking for the checkpoint directory", lambda: _wait_until_visible(draft))
        self._reached("started")
        for writer in writers:
            self.ranks.together(f"writing {draft}", partial(_call, writer, draft))
        self._on_first_rank(f"writing {draft}", lambda: _add_files(draft, files))

    def _commit(self, draft: Path, step: int) -> Path:
        final = self.directory / layout.step_name(step)
        manifest = create_manifest(draft, self.ranks)

        def publish() -> None:
            commit.write_durably(draft / layout.MANIFEST_FILE, manifest.to_json())
            commit.sync_tree(draft)
            self._reached("manifest")
            commit.publish(draft, final)
            self._reached("renamed")
            commit.point_latest(self.directory, final.name)
            self._reached("latest")

        self._on_first_rank(f"publishing {final}", publish)
        return final

    def _expire(self, newest: int) -> None:
        """Delete what `keep_last` does not keep, after a last look at the checkpoint that takes its place.

        Steps above `newest` belong to a line of training that was left behind; they stay until they are replaced.
        """
        verify(self.directory / layout.step_name(newest), hashes=False)
        steps = [step for step in layout.published_steps(self.directory) if step <= newest]
        whole = [step for step in steps if step not in self._damaged - {newest}]
        for step in steps:
            if step < whole[-self.keep_last :][0]:
                self._reached("expiring")
                try:
                    commit.delete(self.directory / layout.step_name(step))
                except OSError as error:
                    log.error("can't delete the expired checkpoint of step %d: %s", step, describe(error))

    def _on_first_rank(self, what: str, action: Callable[[], T]) -> T:
        """Result of `action` on rank 0, on every rank; a failure there is a failure everywhere."""
        result: T = self.ranks.together(what, action if self.ranks.rank == 0 else None)[0]
        return result


def _call(writer: Writer, draft: Path) -> None:
    writer(draft)  # whatever it returns is not for the other ranks


def _wait_until_visible(directory: Path) -> None:
    """Wait for a directory that another node made: network file systems cache what is not there."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_SECONDS
    while not directory.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(f"{directory} is not visible here; checkpoints need a directory that all nodes share")
        time.sleep(0.05)


def _add_files(draft: Path, files: Mapping[str, str | bytes | Path]) -> None:
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, draft / name)
        else:
            commit.write_durably(draft / name, content)
