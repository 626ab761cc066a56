"""How far a run of preprocessing has come: a small file from which it resumes after any interruption.

`<prefix>.journal` is next to the partial files. It identifies the run (options and inputs) and records which chunk
comes next and how much of each partial file was on disk by then. It is replaced atomically, after those files have been
synced, so it never promises more than there is. What the files hold beyond it is cut off when the run resumes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamor.corpus.text import ChunkId
from megamor.errors import DataError
from megamor.files import replace_file

FORMAT = "megamor-preprocess-journal/1"


@dataclass(frozen=True)
class JournalEntry:
    """A point of a run: the next chunk, (documents, tokens) of each shard, and any counts as plain data.

    `complete`: all shards are finished and only need to be renamed.
    """

    next: ChunkId
    written: Sequence[tuple[int, int]]
    counts: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False


class Journal:
    """Writes and reads `<prefix>.journal` for the run that `identity` describes, a mapping of plain data."""

    def __init__(self, prefix: str, identity: Mapping[str, Any]) -> None:
        self.path = Path(f"{prefix}.journal")
        # In the form in which it will be read: tuples have become lists.
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))

    def read(self) -> tuple[JournalEntry | None, str]:
        """The entry of an interrupted run of this identity, or None and why there is nothing to resume.

        The reason is empty if there was no such run. Raises DataError if the file exists but can't be read.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                return None, f"{self.path} was written by another version"
            theirs, saved = content["identity"], content["progress"]
            names = sorted({*theirs, *self._identity})
            differing = [name for name in names if theirs.get(name) != self._identity.get(name)]
            entry = JournalEntry(ChunkId(*saved["next"]), saved["written"], saved["counts"], saved["complete"])
        except (FileNotFoundError, NotADirectoryError):
            return None, ""
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            return None, f"{self.path} is damaged"
        if differing:
            return None, f"{self.path} is of a run that differs in: {', '.join(differing)}"
        return entry, ""

    def write(self, entry: JournalEntry) -> None:
        """Record `entry`; what it describes must be on disk. Raises DataError if it can't be written."""
        content = {"format": FORMAT, "identity": self._identity, "progress": asdict(entry)}
        try:
            replace_file(self.path, json.dumps(content))
        except OSError as error:
            raise DataError(f"{self.path} can't be written: {error.strerror}; free space or fix permissions") from error

    def remove(self) -> None:
        """Forget the run."""
        self.path.unlink(missing_ok=True)
