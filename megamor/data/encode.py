"""Text to token ids, in worker processes. What comes out depends on text and options alone, never on the workers.

A worker gets a chunk of raw bytes and gives back arrays of ids; no Python list of ids crosses between processes.
Special tokens that a text happens to spell out (`<|endoftext|>` in a page about tokenizers) are encoded as plain text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from megamor.data.indexed import dtype_for_vocab
from megamor.data.text import TextChunk
from megamor.errors import DataError

DEFAULT_EOD_TOKENS = ("<|endoftext|>", "</s>")
_BATCH_BYTES = 2**18


@dataclass(frozen=True)
class EncodeOptions:
    """What a worker must know. `shares` are those of the splits and add up to 1."""

    tokenizer: str
    json_key: str = "text"
    eod_token: str | None = None
    append_eod: bool = False
    shares: tuple[float, ...] = (1.0,)
    skip_bad_lines: bool = False


@dataclass
class EncodedChunk:
    """The documents of a chunk: for each split the ids one after the other, and the lengths.

    `empty` counts documents without text, `blank` empty lines, `bad` describes the lines that were skipped.
    """

    source: int
    position: int
    tokens: list[NDArray]
    lengths: list[NDArray[np.int32]]
    text_bytes: int = 0
    empty: int = 0
    blank: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer set up for corpora: no truncation, no padding, nothing added, special tokens in a text are text."""

    tokenizer: Tokenizer
    vocab_size: int
    eod_token: str | None
    eod_id: int | None

    @classmethod
    def load(cls, path: str, *, eod_token: str | None = None, need_eod: bool = False) -> TextEncoder:
        """Read a `tokenizers` JSON file.

        The end-of-document token is `eod_token`, or else the first of `DEFAULT_EOD_TOKENS` that the vocabulary has.
        Raises DataError if the file isn't a tokenizer or has no such token although one is needed or named.
        """
        if not Path(path).is_file():
            raise DataError(f"--tokenizer {path}: no such file; give a tokenizer.json of the tokenizers library")
        try:
            tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"--tokenizer {path} is not a tokenizer.json of the tokenizers library: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        candidates = (eod_token,) if eod_token else DEFAULT_EOD_TOKENS
        found = next((token for token in candidates if tokenizer.token_to_id(token) is not None), None)
        if found is None and (eod_token or need_eod):
            raise DataError(
                f"{path} has no token {' or '.join(candidates)} to end documents with; name one of its own with "
                "--eod-token"
            )
        if found is not None:
            # Marked as special, or its spelling within a text would become an end of document.
            tokenizer.add_special_tokens([AddedToken(found, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True
        vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        return cls(tokenizer, vocab_size, found, tokenizer.token_to_id(found) if found else None)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encode_in_order(chunks: Iterable[TextChunk], options: EncodeOptions, workers: int) -> Iterator[EncodedChunk]:
    """Encode chunks in `workers` processes; results in the order of the chunks, few of them in memory at any time.

    Raises DataError for the first bad line (unless they are skipped) and if a worker dies.
    """
    start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(start_method), _start_worker)
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, options, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died, most likely for lack of memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


class ChunkEncoder:
    """Turns one chunk after another into ids."""

    def __init__(self, options: EncodeOptions) -> None:
        self._options = options
        self._encoder = TextEncoder.load(options.tokenizer, eod_token=options.eod_token, need_eod=options.append_eod)
        self._dtype = dtype_for_vocab(self._encoder.vocab_size)
        # A document belongs to the first split whose bound is above its hash.
        self._bounds = np.cumsum(options.shares)[:-1]

    def encode(self, chunk: TextChunk) -> EncodedChunk:
        """Parse, tokenize and split the documents of `chunk`. Raises DataError for a bad line unless skipping."""
        count = len(self._options.shares)
        result = EncodedChunk(chunk.source, chunk.position, [], [])
        pieces: list[list[NDArray]] = [[] for _ in range(count)]
        for texts in _batches(self._texts(chunk, result)):
            for text, ids in zip(texts, self._encoder.encode(texts), strict=True):
                if self._options.append_eod:
                    ids.append(self._encoder.eod_id or 0)
                pieces[self._split_of(text)].append(np.array(ids, self._dtype))
        for arrays in pieces:
            result.tokens.append(np.concatenate(arrays) if arrays else np.empty(0, self._dtype))
            result.lengths.append(np.array([len(ids) for ids in arrays], np.int32))
        return result

    def _texts(self, chunk: TextChunk, result: EncodedChunk) -> Iterator[str]:
        """The texts of the documents that have any; the others are counted in `result`."""
        lines = [chunk.data] if chunk.kind == "txt" else chunk.data.split(b"\n")
        if lines[-1] == b"" and chunk.kind == "jsonl":
            lines.pop()
        for number, line in enumerate(lines, start=chunk.first_line):
            if chunk.kind == "jsonl" and not line.strip():
                result.blank += 1
                continue
            try:
                text = _parse(line, chunk.kind, self._options.json_key)
                size = _utf8_size(text)
            except ValueError as error:
                message = f"{chunk.place}, line {number}: {error}"
                if not self._options.skip_bad_lines:
                    raise DataError(f"{message}; mend it, or leave such lines out with --on-bad-line skip") from error
                result.bad.append(message)
                continue
            if not text.strip():
                result.empty += 1
                continue
            result.text_bytes += size
            yield text

    def _split_of(self, text: str) -> int:
        if not len(self._bounds):
            return 0
        draw = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
        return int(np.searchsorted(self._bounds, draw, side="right"))


def _parse(line: bytes, kind: str, key: str) -> str:
    """The text of one line (or file); ValueError says what is wrong with it."""
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} (0x{line[error.start]:02x}) is not UTF-8") from error
    if kind == "txt":
        return decoded
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no key {key!r} (found: {keys}); name the right one with --json-key")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} holds {type(text).__name__}, not a string")
    return text


def _utf8_size(text: str) -> int:
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half a surrogate pair, which is not Unicode text") from error


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts of about `_BATCH_BYTES`, so that the tokenizer's working memory stays small."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start_worker() -> None:
    # One core a worker; Ctrl-C is the parent's to handle; and a worker must not outlive a parent that was killed.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _encode_in_worker(options: EncodeOptions, chunk: TextChunk) -> EncodedChunk:
    return _encoder_of_worker(options).encode(chunk)


@lru_cache(maxsize=1)
def _encoder_of_worker(options: EncodeOptions) -> ChunkEncoder:
    return ChunkEncoder(options)
