"""Chunks of raw text to token ids, in threads. What comes out depends on text and options alone, never on the threads.

Tokenizing and decompressing happen outside Python's lock, so threads serve; there is one tokenizer, nothing is copied
between processes, and ids are arrays from the start.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megamor.corpus.accelerator import Encoder
from megamor.corpus.documents import Documents, document_hash, parse_chunk
from megamor.corpus.text import TextChunk
from megamor.corpus.tokenizer import TextEncoder

__all__ = ["ChunkEncoder", "EncodeOptions", "EncodedChunk", "TextEncoder", "encode_in_order"]

# Raw text in work at a time, beyond which a chunk waits: a bound on memory also where documents are huge.
_BYTES_IN_WORK = 48 * 2**20


@dataclass(frozen=True)
class EncodeOptions:
    """What becomes of a document. `shares` are those of the splits and add up to 1.

    `held_out` are sorted hashes [n] of documents to leave out, `min_tokens` counts without the end-of-document token.
    With `hashes` the hash of every document comes along.
    """

    json_key: str = "text"
    separator: str | None = None
    append_eod: bool = False
    shares: tuple[float, ...] = (1.0,)
    skip_bad: bool = False
    min_tokens: int = 0
    held_out: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    hashes: bool = False


@dataclass
class EncodedChunk:
    """The documents of a chunk: for each split the ids one after the other, the lengths, and the hashes if wanted.

    Left out were `empty` documents without text, `blank` lines, `short` and `held_out` documents, and the records that
    `bad` describes.
    """

    chunk: TextChunk
    tokens: list[NDArray] = field(default_factory=list)
    lengths: list[NDArray[np.int64]] = field(default_factory=list)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    text_bytes: int = 0
    empty: int = 0
    blank: int = 0
    short: int = 0
    held_out: int = 0
    bad: list[str] = field(default_factory=list)


class ChunkEncoder:
    """Turns one chunk after another into ids: parse, tokenize, leave out, split. Serves several threads at a time."""

    def __init__(self, options: EncodeOptions, encoder: Encoder, reference: TextEncoder) -> None:
        self._options = options
        self._encoder = encoder
        self._dtype = reference.dtype
        self._eod = np.array([reference.eod_id] if options.append_eod else [], self._dtype)
        # A document belongs to the first split whose bound is above its hash.
        self._bounds = np.cumsum(options.shares)[:-1]
        self._needs_hashes = options.hashes or len(options.shares) > 1 or len(options.held_out) > 0

    def encode(self, chunk: TextChunk) -> EncodedChunk:
        """The ids of `chunk`. Raises DataError for a bad record unless those are skipped."""
        options = self._options
        documents = parse_chunk(chunk, options.json_key, options.separator, skip_bad=options.skip_bad)
        result = EncodedChunk(chunk, empty=documents.empty, blank=documents.blank, bad=documents.bad)
        hashes = self._hash(documents)
        if len(options.held_out):
            hashes = _leave_out_held_out(documents, hashes, options.held_out, result)
        result.text_bytes = sum(map(len, documents.encoded))
        ids = self._encoder.encode(chunk, documents)
        if options.min_tokens:
            long = [number for number, own in enumerate(ids) if len(own) >= options.min_tokens]
            result.short = len(ids) - len(long)
            ids, hashes = [ids[number] for number in long], hashes[long] if self._needs_hashes else hashes
        self._split(ids, hashes, result)
        return result

    def _hash(self, documents: Documents) -> NDArray[np.uint64]:
        if not self._needs_hashes:
            return np.empty(0, np.uint64)
        return np.array([document_hash(data) for data in documents.encoded], np.uint64)

    def _split(self, ids: Sequence[NDArray], hashes: NDArray[np.uint64], result: EncodedChunk) -> None:
        everything = np.arange(len(ids))
        splits = np.searchsorted(self._bounds, hashes / 2**64, side="right") if len(self._bounds) else 0 * everything
        for split in range(len(self._options.shares)):
            chosen = everything[splits == split]
            own = [ids[number] for number in chosen]
            # With the end-of-document token between and after them, in one go.
            pieces = [piece for document in own for piece in (document, self._eod)]
            joined = np.concatenate(pieces, dtype=self._dtype, casting="unsafe") if pieces else np.empty(0, self._dtype)
            result.tokens.append(joined)
            result.lengths.append(np.array([len(document) + len(self._eod) for document in own], np.int64))
            result.hashes.append(hashes[chosen] if self._options.hashes else hashes[:0])


def _leave_out_held_out(
    documents: Documents, hashes: NDArray[np.uint64], held_out: NDArray[np.uint64], result: EncodedChunk
) -> NDArray[np.uint64]:
    places = np.minimum(np.searchsorted(held_out, hashes), len(held_out) - 1)
    kept = np.flatnonzero(held_out[places] != hashes)
    result.held_out = len(hashes) - len(kept)
    documents.texts = [documents.texts[number] for number in kept]
    documents.encoded = [documents.encoded[number] for number in kept]
    return hashes[kept]


def encode_in_order(
    chunks: Iterable[TextChunk], encoder: ChunkEncoder, workers: int
) -> Generator[EncodedChunk, None, None]:
    """Encode chunks in `workers` threads; results in the order of the chunks, few of them in memory at any time.

    Raises DataError for the first bad record (unless they are skipped).
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    pending: deque[tuple[int, Future[EncodedChunk]]] = deque()
    in_work = 0
    with _one_thread_each():
        try:
            for chunk in chunks:
                while pending and (len(pending) > 2 * workers or in_work + chunk.size > _BYTES_IN_WORK):
                    size, future = pending.popleft()
                    in_work -= size
                    yield future.result()
                pending.append((chunk.size, pool.submit(encoder.encode, chunk)))
                in_work += chunk.size
            while pending:
                yield pending.popleft()[1].result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """`tokenizers` would start threads of its own for each of ours."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
