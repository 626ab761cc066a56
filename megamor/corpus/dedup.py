"""Duplicate and held-out documents, recognised by 64-bit hashes of their text in plain arrays."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megamor.corpus.documents import document_hash, parse_chunk
from megamor.corpus.encode import EncodedChunk
from megamor.corpus.text import SUFFIXES, find_files
from megamor.errors import DataError

_BUCKET_BITS = 4
_HASH_LINE = re.compile(r"[0-9a-fA-F]{16}")


def hash_log_path(prefix: str) -> Path:
    """Path of the `HashLog` of `prefix`."""
    return Path(f"{prefix}.hashes.partial")


class HashLog:
    """The hashes of the documents that a shard has so far, in memory and in `<prefix>.hashes.partial`.

    A resumed run reads the file. As a context manager it removes the file if `keep_partial` has been reset.
    """

    def __init__(self, prefix: str) -> None:
        self.path = hash_log_path(prefix)
        self.keep_partial = True
        self._seen = SeenHashes()
        self.path.touch()
        self._file = self.path.open("r+b")

    def __enter__(self) -> HashLog:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.keep_partial:
            self.path.unlink(missing_ok=True)
        # Closing writes what is buffered, which on a full disk fails a second time.
        with contextlib.suppress(OSError):
            self._file.close()

    def rewind(self, count: int) -> bool:
        """Truncate to the first `count` documents. Returns False, changing nothing, if there are fewer."""
        if os.fstat(self._file.fileno()).st_size < 8 * count:
            return False
        self._file.truncate(8 * count)
        self._file.seek(0)
        self._seen = SeenHashes()
        while block := self._file.read(2**23):
            self._seen.add(np.frombuffer(block, "<u8").astype(np.uint64))
        return True

    def drop_seen(self, chunk: EncodedChunk, split: int) -> int:
        """Remove the documents seen before from one split of `chunk`, and return how many they were."""
        hashes, lengths = chunk.hashes[split], chunk.lengths[split]
        new = self._seen.add(hashes)
        # One hash for each document that is kept, so that `rewind` can cut the file at the journal's document count.
        self._file.write(hashes[new].astype("<u8").tobytes())
        if not new.all():
            chunk.tokens[split] = chunk.tokens[split][np.repeat(new, lengths)]
            chunk.lengths[split], chunk.prompts[split] = lengths[new], chunk.prompts[split][new]
        return int(np.count_nonzero(~new))

    def sync(self) -> None:
        """Wait until everything is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


class SeenHashes:
    """A growing set of 64-bit hashes that takes 8 bytes for each.

    Sixteen buckets by the highest bits, each a few sorted arrays ("runs") of which every one is at least twice as long
    as the next; two that aren't are merged. So at most a sixteenth of the set is copied at a time, and a look-up is a
    few binary searches.
    """

    def __init__(self) -> None:
        self._buckets: list[list[NDArray[np.uint64]]] = [[] for _ in range(2**_BUCKET_BITS)]

    def __len__(self) -> int:
        return sum(len(run) for runs in self._buckets for run in runs)

    def add(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add hashes [n]. Returns True for each that is new; of several equal ones only the first is."""
        new = np.zeros(len(hashes), np.bool_)
        unique, first = np.unique(hashes, return_index=True)
        bounds = np.searchsorted(unique >> np.uint64(64 - _BUCKET_BITS), np.arange(2**_BUCKET_BITS + 1))
        for runs, begin, end in zip(self._buckets, bounds[:-1], bounds[1:], strict=True):
            own = unique[begin:end]
            unseen = np.ones(len(own), np.bool_)
            for run in runs:
                unseen &= run[np.minimum(np.searchsorted(run, own), len(run) - 1)] != own
            if unseen.any():
                new[first[begin:end][unseen]] = True
                runs.append(own[unseen])
            while len(runs) > 1 and len(runs[-2]) < 2 * len(runs[-1]):
                runs.append(np.sort(np.concatenate([runs.pop(), runs.pop()]), kind="stable"))
        return new


def read_held_out(
    path: str, key: str, separator: str | None = None, answer_key: str | None = None
) -> NDArray[np.uint64]:
    """Sorted hashes [n] of the documents to leave out.

    `path` holds the documents themselves, in any form that is accepted as input, or under another name (`.hashes`, say)
    one hash per line: 16 hexadecimal digits as printed by `b2sum --length 64`. Raises DataError for anything else.
    """
    texts = path.lower().endswith(SUFFIXES)
    hashes = _hashes_of_texts(path, key, separator, answer_key) if texts else _hashes_of_lines(path)
    found = np.unique(np.fromiter(hashes, np.uint64))
    if not len(found):
        raise DataError(f"--holdout {path} names no document; give texts or hashes, or leave the option out")
    return found


def _hashes_of_texts(path: str, key: str, separator: str | None, answer_key: str | None) -> Iterator[int]:
    for chunk in find_files([path], key, separator, option="--holdout").chunks():
        yield from map(document_hash, parse_chunk(chunk, key, separator, answer_key=answer_key).encoded)


def _hashes_of_lines(path: str) -> Iterator[int]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--holdout {path} can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        word = line.split()[0] if line.strip() else ""
        if not word:
            continue
        if not _HASH_LINE.fullmatch(word):
            raise DataError(f"--holdout {path}, line {number}: {word[:40]!r} is not a hash of 16 hexadecimal digits")
        yield int(word, 16)
