"""gigatoken in place of `tokenizers`: the same ids many times faster, checked while it runs.

It is young and mostly one person's work, so nothing rests on trust: of every file, and all along it, a sample of what
it returned is compared with what `tokenizers` says, and a difference stops the run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from megamor.corpus.cuts import first_and_last
from megamor.corpus.documents import Documents
from megamor.corpus.text import TextChunk
from megamor.corpus.tokenizer import TextEncoder
from megamor.errors import ConfigError, DataError

ACCELERATORS = ("auto", "none", "gigatoken")
# Resident memory above which gigatoken's table of known words, which only grows, is thrown away.
_MEMORY_LIMIT = 700 * 2**20
_BYTES_BETWEEN_RENEWALS = 64 * 2**20
# Checked characters: of a source's first chunk one in 64, later one in 1024, but never more or less than this.
_FIRST_SAMPLE = (2**8, 2**15)
_LATER_SAMPLE = (2**8, 2**10)
_LONGEST_CHECKED = 2**16


class Encoder(Protocol):
    """Whatever turns the documents of a chunk into ids."""

    def encode(self, chunk: TextChunk, documents: Documents) -> list[NDArray]:
        """Ids of each document [n], in any integer type. Called by several threads at a time."""
        ...


class PlainEncoder:
    """`tokenizers` itself."""

    def __init__(self, reference: TextEncoder) -> None:
        self._reference = reference

    def encode(self, chunk: TextChunk, documents: Documents) -> list[NDArray]:
        """See `Encoder`."""
        with _naming(chunk):
            return self._reference.encode(documents.texts)


class GigatokenEncoder:
    """gigatoken, and `tokenizers` to check it.

    Raises ConfigError if the library is missing or can't do this tokenizer.
    """

    def __init__(self, reference: TextEncoder) -> None:
        self._reference = reference
        self._spec = msgspec.json.encode(_without_special_tokens(reference))
        self._tokenizer: Any = self._load()
        self._bytes_since_renewal = 0
        self._lock = threading.Lock()

    def encode(self, chunk: TextChunk, documents: Documents) -> list[NDArray]:
        """See `Encoder`. Raises DataError if the sample of this chunk differs."""
        with _naming(chunk):
            for text in documents.texts if self._reference.cuts else ():
                self._reference.require_cuttable(text)
        # One call at a time, which the library asks for. It is far from being what others wait for, and several
        # tokenizers would each have a table of known words.
        with self._lock:
            self._renew_if_large(chunk.size)
            ids = [self._tokenizer.encode(data) for data in documents.encoded]
        self._check(chunk, documents, ids)
        return ids

    def _load(self) -> Any:
        try:
            import gigatoken
        except ImportError as error:
            raise ConfigError(
                "--accelerator gigatoken: it is not installed; pip install 'megamor[fast]', or leave the option out"
            ) from error
        try:
            return gigatoken.Tokenizer.from_json(self._spec)
        except Exception as error:  # the library raises RuntimeError, ValueError and its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"--accelerator gigatoken can't do this tokenizer: {reason}") from error

    def _renew_if_large(self, size: int) -> None:
        self._bytes_since_renewal += size
        if self._bytes_since_renewal > _BYTES_BETWEEN_RENEWALS and resident_bytes() > _MEMORY_LIMIT:
            self._bytes_since_renewal = 0
            self._tokenizer = self._load()

    def _check(self, chunk: TextChunk, documents: Documents, ids: Sequence[NDArray]) -> None:
        for number in sample(chunk, documents.texts):
            if not self._agree(documents.texts[number], ids[number]):
                raise DataError(
                    f"gigatoken and tokenizers give different ids for document {number + 1} of those that start at "
                    f"record {chunk.first_record} of {chunk.name} (beginning {documents.texts[number][:40]!r}); use "
                    "--accelerator none"
                )

    def _agree(self, text: str, ids: NDArray) -> bool:
        """Whether `tokenizers` gives `ids` for `text`: at both ends, and all of it if it can't be cut."""
        parts = first_and_last(text, _LATER_SAMPLE[1] // 2, self._reference.cuts)
        if max(map(len, parts)) > _LONGEST_CHECKED:  # too dear: something shorter, by both
            parts = [text[: _LATER_SAMPLE[1]]]
            with self._lock:
                ids = self._tokenizer.encode(parts[0].encode())
        head, *rest = self._reference.encode(parts)
        if not rest:
            return np.array_equal(ids, head)
        return np.array_equal(ids[: len(head)], head) and np.array_equal(ids[len(ids) - len(rest[0]) :], rest[0])


def make_encoder(accelerator: str, reference: TextEncoder) -> tuple[Encoder, str]:
    """The encoder that `accelerator` asks for, and what to tell the user about it."""
    if accelerator == "none":
        return PlainEncoder(reference), "none"
    try:
        return GigatokenEncoder(reference), "gigatoken"
    except ConfigError as error:
        if accelerator == "auto":
            return PlainEncoder(reference), f"none ({error})"
        raise


def sample(chunk: TextChunk, texts: Sequence[str]) -> list[int]:
    """Numbers of the documents of a chunk to check: some, spread over it, and other ones in each chunk."""
    if not texts:
        return []
    first = chunk.place.number == 0
    low, high = _FIRST_SAMPLE if first else _LATER_SAMPLE
    budget = min(max(chunk.size // (64 if first else 1024), low), high)
    count, start = len(texts), 0 if first else chunk.place.number * 7919
    stride = max(1, int(count * 0.618))
    chosen: list[int] = []
    for step in range(count):
        number = (start + step * stride) % count
        if number not in chosen:
            chosen.append(number)
            budget -= min(len(texts[number]), _LATER_SAMPLE[1])
        if budget <= 0:
            break
    return chosen


def resident_bytes() -> int:
    """Memory of this process; 0 where the system doesn't say, which is where gigatoken's table may grow."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


@contextmanager
def _naming(chunk: TextChunk) -> Iterator[None]:
    """Say where it was that an error occurred."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{chunk.name}, among the records from {chunk.first_record} on: {error}") from error


def _without_special_tokens(reference: TextEncoder) -> dict[str, Any]:
    """The tokenizer as JSON, but special tokens are not recognised: in a corpus they are text."""
    spec: dict[str, Any] = msgspec.json.decode(reference.tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    spec["post_processor"] = None
    return spec
