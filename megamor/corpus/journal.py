"""How far a run of preprocessing has come: a small file from which it goes on after any interruption.

`<prefix>.journal` lies beside the partial files. It says what the run is (options and inputs), which chunk comes next,
and how much of each partial file was on disk by then. It is replaced as a whole, after those files have been synced, so
it never promises more than there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamor.corpus.text import Place
from megamor.errors import DataError
from megamor.files import replace_file

FORMAT = "megamor-preprocess-journal/1"


@dataclass(frozen=True)
class Progress:
    """A point of a run: the next chunk, (documents, tokens) of each shard, and counts of any kind.

    `complete` says that all shards are finished, and nothing is left but giving them their names.
    """

    next: Place
    written: Sequence[tuple[int, int]]
    counts: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False


class Journal:
    """Writes and reads `<prefix>.journal` for the run that `identity` describes: plain values under plain names."""

    def __init__(self, prefix: str, identity: Mapping[str, Any]) -> None:
        self.path = Path(f"{prefix}.journal")
        # As it will be read: lists for tuples.
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.exists = False

    def read(self) -> tuple[Progress | None, str]:
        """How far an interrupted run of this identity came, or None and the reason why there is nothing to go on from.

        The reason is empty where there was no such run.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                return None, f"{self.path} was written by another version"
            saved = content["progress"]
            differing = sorted(
                name
                for name in {*content["identity"], *self._identity}
                if content["identity"].get(name) != self._identity.get(name)
            )
            progress = Progress(Place(*saved["next"]), saved["written"], saved["counts"], saved["complete"])
        except (FileNotFoundError, NotADirectoryError):
            return None, ""
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            return None, f"{self.path} is damaged"
        if differing:
            return None, f"{self.path} is of a run that differs in: {', '.join(differing)}"
        self.exists = True
        return progress, ""

    def write(self, progress: Progress) -> None:
        """Record `progress`; what it speaks of must be on disk. Raises DataError if it can't be written."""
        content = {"format": FORMAT, "identity": self._identity, "progress": asdict(progress)}
        try:
            replace_file(self.path, json.dumps(content).encode())
        except OSError as error:
            raise DataError(
                f"{self.path} can't be written: {error.strerror}; free space or mend permissions"
            ) from error
        self.exists = True

    def remove(self) -> None:
        """Forget the run."""
        self.path.unlink(missing_ok=True)
        self.exists = False
