"""Chunks of raw text to token ids, in threads, by gigatoken or `tokenizers`.

Tokenizing and decompressing release Python's lock, so threads suffice: there is one tokenizer, nothing is copied
between processes, and ids are arrays from the start. The result depends on text and options alone, not on the threads.

gigatoken gives the ids of `tokenizers` many times faster. It is young, so the beginning of every source is encoded by
both, and a difference stops the run.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from megamor.corpus.documents import UNITS, Counts, Documents, document_hash, parse_chunk
from megamor.corpus.text import TextChunk
from megamor.corpus.tokenizer import TextEncoder
from megamor.errors import ConfigError, DataError, TextError

# Resident memory above which gigatoken's table of known words, which only grows, is thrown away.
_MEMORY_LIMIT = 700 * 2**20
_BYTES_BETWEEN_RENEWALS = 64 * 2**20
# Characters of each source that both libraries encode: about 30 ms of `tokenizers`.
_CHECKED_CHARACTERS = 2**16
# Raw text being encoded at a time; further chunks wait. Bounds memory where documents are huge.
_BYTES_IN_WORK = 48 * 2**20


Encode = Callable[[int, Documents], list[NDArray[Any]]]
"""From the index of a source and documents of it to the ids of each document [n], of any integer type. Thread-safe."""


class GigatokenEncoder:
    """gigatoken, checked against `tokenizers` (`reference`) on the beginning of every source.

    Raises ConfigError if the library is missing or doesn't support this tokenizer.
    """

    def __init__(self, reference: TextEncoder) -> None:
        self._reference = reference
        # Special tokens aren't recognised: in a corpus they are text. Vocabulary and merges stay as they are written.
        spec = msgspec.json.decode(reference.json, type=dict[str, msgspec.Raw])
        added = [token for token in msgspec.json.decode(spec["added_tokens"]) if not token["special"]]
        self._spec = msgspec.json.encode({**spec, "added_tokens": added, "post_processor": None})
        self._tokenizer: Any = self._load()
        self._bytes_since_renewal = 0
        self._checked: dict[int, int] = {}  # by source, the record of the earliest document that was compared
        self._lock = threading.Lock()

    def encode(self, source: int, documents: Documents) -> list[NDArray[Any]]:
        """See `Encode`. Raises DataError as `TextEncoder.encode` does, and for wrong ids at the start of a source."""
        # The limit that `tokenizers` needs holds here too: which encoder runs must not decide what is accepted.
        for text in documents.texts if self._reference.cuts else ():
            self._reference.require_cuttable(text)
        for text in documents.texts if self._reference.codec.can_lose_text else ():
            self._reference.codec.require_encodable(text)
        # The library asks for one call at a time. It is so fast that other threads hardly wait, and several tokenizers
        # would each have a table of known words.
        with self._lock:
            self._renew_if_large(sum(map(len, documents.encoded)))
            ids = self._ids_of(documents.encoded)
            # A later chunk may come here before the first one, which is checked all the same.
            first = bool(ids) and documents.numbers[0] < self._checked.get(source, documents.numbers[0] + 1)
            if first:
                self._checked[source] = documents.numbers[0]
        if first:
            self._check(documents.texts, ids)
        return ids

    def _load(self) -> Any:
        try:
            import awkward  # noqa: F401 (what `encode_batch` returns; slow, so before the threads start)
            import gigatoken
        except ImportError as error:
            raise ConfigError(
                "--accelerator gigatoken: it is not installed; pip install 'megamor[fast]', or leave the option out"
            ) from error
        try:
            return gigatoken.Tokenizer.from_json(self._spec)
        except Exception as error:  # the library raises RuntimeError, ValueError and its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"--accelerator gigatoken doesn't support this tokenizer: {reason}") from error

    def _ids_of(self, encoded: list[bytes]) -> list[NDArray[Any]]:
        """Ids of each document, as views of one array. Other threads run meanwhile, unlike during `encode`."""
        if not encoded:
            return []
        found = self._tokenizer.encode_batch(encoded, parallel=False).layout
        return [found.content.data[begin:end] for begin, end in pairwise(found.offsets.data.tolist())]

    def _renew_if_large(self, size: int) -> None:
        self._bytes_since_renewal += size
        if self._bytes_since_renewal > _BYTES_BETWEEN_RENEWALS and psutil.Process().memory_info().rss > _MEMORY_LIMIT:
            self._bytes_since_renewal = 0
            self._tokenizer = self._load()

    def _check(self, texts: Sequence[str], ids: Sequence[NDArray[Any]]) -> None:
        left = _CHECKED_CHARACTERS
        for text, whole in zip(texts, ids, strict=True):
            found, compared = whole, text[:left]
            if len(compared) < len(text):
                # The ids of a long document's beginning aren't the beginning of its ids: encode it on its own.
                with self._lock:
                    found = self._ids_of([compared.encode()])[0]
            if not np.array_equal(found, self._reference.encode([compared])[0]):
                raise DataError(
                    "gigatoken and tokenizers give different ids for the document that begins "
                    f"{text[:40]!r}; use --accelerator none"
                )
            left -= len(compared)
            if not left:
                return


def choose_encoder(accelerator: str, reference: TextEncoder) -> tuple[Encode, str]:
    """What `--accelerator` asks for, and its name for the user. Raises ConfigError if it isn't available."""

    def plain(source: int, documents: Documents) -> list[NDArray[Any]]:
        return reference.encode(documents.texts)

    if accelerator == "none":
        return plain, "none"
    try:
        return GigatokenEncoder(reference).encode, "gigatoken"
    except ConfigError as error:
        if accelerator == "auto":
            return plain, f"none ({error})"
        raise


@dataclass(frozen=True)
class EncodeOptions:
    """What happens to a document. `fractions` are those of the splits and add up to 1.

    `held_out` are sorted hashes [n] of documents to leave out. `min_tokens` doesn't count the end-of-document token.
    `hashes` asks for the hash of every document. With `answer_key`, `json_key` is that of the prompts.
    """

    json_key: str = "text"
    separator: str | None = None
    append_eod: bool = False
    fractions: tuple[float, ...] = (1.0,)
    skip_bad: bool = False
    min_tokens: int = 0
    held_out: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    hashes: bool = False
    answer_key: str | None = None


@dataclass
class EncodedChunk:
    """The documents of a chunk: for each split the concatenated ids, the lengths, and the hashes if asked for.

    `prompts` are the tokens of each document that don't count in the loss; 0 without `EncodeOptions.answer_key`.
    """

    chunk: TextChunk
    counts: Counts
    tokens: list[NDArray[Any]] = field(default_factory=list)
    lengths: list[NDArray[np.int64]] = field(default_factory=list)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    prompts: list[NDArray[np.int64]] = field(default_factory=list)


class ChunkEncoder:
    """Turns chunks into ids: parses, leaves out, tokenizes and splits. Thread-safe."""

    def __init__(self, options: EncodeOptions, encode: Encode, reference: TextEncoder) -> None:
        self._options = options
        self._encode, self._reference = encode, reference
        self._dtype = reference.dtype
        self._eod = np.array([reference.eod_id] if options.append_eod else [], self._dtype)
        # A document belongs to the first split whose bound is above its hash.
        self._bounds = np.cumsum(options.fractions)[:-1]
        self._needs_hashes = options.hashes or len(options.fractions) > 1 or len(options.held_out) > 0

    def encode(self, chunk: TextChunk) -> EncodedChunk:
        """The ids of `chunk`. Raises DataError naming the file for a bad record, unless those are skipped."""
        options = self._options
        documents = parse_chunk(
            chunk, options.json_key, options.separator, skip_bad=options.skip_bad, answer_key=options.answer_key
        )
        result = EncodedChunk(chunk, documents.counts)
        hashes = np.array([document_hash(data) for data in documents.encoded if self._needs_hashes], np.uint64)
        if len(options.held_out):
            # Held-out documents go before tokenizing, which costs most; short ones can only be found after it.
            nearest = np.minimum(np.searchsorted(options.held_out, hashes), len(options.held_out) - 1)
            kept = np.flatnonzero(options.held_out[nearest] != hashes)
            result.counts.held_out = len(hashes) - len(kept)
            documents = documents.chosen(kept.tolist())
            hashes = hashes[kept]
        result.counts.text_bytes = sum(map(len, documents.encoded))
        ids, prompts = self._encode_documents(chunk, documents), np.zeros(len(documents.texts), np.int64)
        if options.answer_key is not None:
            ids, prompts = self._join_answers(chunk, documents, ids)
        if options.min_tokens:
            long = [number for number, own in enumerate(ids) if len(own) >= options.min_tokens]
            result.counts.short = len(ids) - len(long)
            ids, prompts = [ids[number] for number in long], prompts[long]
            hashes = hashes[long] if self._needs_hashes else hashes
        self._split(ids, prompts, hashes, result)
        return result

    def _join_answers(
        self, chunk: TextChunk, documents: Documents, whole: Sequence[NDArray[Any]]
    ) -> tuple[list[NDArray[Any]], NDArray[np.int64]]:
        """Ids of prompts and answers and the prompts' lengths [n], from the ids of prompt and answer in one (`whole`).

        As lm-eval scores them: a prompt is encoded alone, as it is when the model is asked, and its answer is the ids
        that `whole` has beyond that length. Raises DataError where that is none.
        """
        encoded = [prompt.encode() for prompt in documents.prompts]
        prompts = self._encode_documents(chunk, Documents(documents.prompts, encoded, documents.numbers))
        # Some tokenizers have a token for an empty text. No prompt is none.
        sizes = np.array([len(ids) if data else 0 for ids, data in zip(prompts, encoded, strict=True)], np.int64)
        for number, ids, size in zip(documents.numbers, whole, sizes, strict=True):
            if len(ids) <= size:
                raise DataError(
                    f"{chunk.name}, {UNITS[chunk.kind]} {number}: the tokenizer joins the answer with the end of its "
                    "prompt, so it has no token of its own; let the answer begin with a space or a line feed"
                )
        joined = [np.concatenate((p[:n], ids[n:])) for p, ids, n in zip(prompts, whole, sizes, strict=True)]
        return joined, sizes

    def _encode_documents(self, chunk: TextChunk, documents: Documents) -> list[NDArray[Any]]:
        try:
            return self._encode(chunk.id.source, documents)
        except DataError as error:
            if isinstance(error, TextError):
                # Which document it is shows when they are encoded one by one.
                for number, text in zip(documents.numbers, documents.texts, strict=True):
                    try:
                        self._reference.encode([text])
                    except TextError as own:
                        raise DataError(f"{chunk.name}, {UNITS[chunk.kind]} {number}: {own}") from own
            raise DataError(f"{chunk.name}, in the records from {chunk.first_record} on: {error}") from error

    def _split(
        self, ids: Sequence[NDArray[Any]], prompts: NDArray[np.int64], hashes: NDArray[np.uint64], result: EncodedChunk
    ) -> None:
        everything = np.arange(len(ids))
        # A hash divided by 2^64 is uniform in [0, 1), and the same for all copies of a text.
        splits = np.searchsorted(self._bounds, hashes / 2**64, side="right") if len(self._bounds) else 0 * everything
        for split in range(len(self._options.fractions)):
            chosen = everything[splits == split]
            own = [ids[number] for number in chosen]
            # One concatenation for all documents, with the end-of-document token after each.
            arrays = [array for document in own for array in (document, self._eod)]
            joined = np.concatenate(arrays, dtype=self._dtype, casting="unsafe") if arrays else self._eod[:0]
            result.tokens.append(joined)
            result.prompts.append(prompts[chosen])
            result.lengths.append(np.array([len(document) + len(self._eod) for document in own], np.int64))
            result.hashes.append(hashes[chosen] if self._options.hashes else hashes[:0])


def encode_in_order(chunks: Iterable[TextChunk], encoder: ChunkEncoder, workers: int) -> Generator[EncodedChunk]:
    """Encode chunks in `workers` threads; yields results in the order of the chunks, with few in memory at a time.

    Raises DataError for the first bad record, unless they are skipped.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    pending: deque[tuple[int, Future[EncodedChunk]]] = deque()
    in_work = 0
    # Keeps `tokenizers` from starting threads of its own in each of ours, from here on.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        for chunk in chunks:
            # Twice as many chunks as threads, so that a slow one at the head doesn't leave the others idle.
            while pending and (len(pending) > 2 * workers or in_work + chunk.size > _BYTES_IN_WORK):
                size, future = pending.popleft()
                in_work -= size
                yield future.result()
            pending.append((chunk.size, pool.submit(encoder.encode, chunk)))
            in_work += chunk.size
        while pending:
            yield pending.popleft()[1].result()
    finally:
        # Also when the consumer stops early, so that no thread outlives the run.
        pool.shutdown(wait=True, cancel_futures=True)
