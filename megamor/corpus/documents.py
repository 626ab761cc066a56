"""From a chunk of raw text to documents, and what is wrong with a record that can't be parsed.

JSON is decoded by msgspec, which decodes only the wanted key and is about five times as fast as `json`. Usually all
lines of a chunk are in order and are decoded where they are. Otherwise they are cut out and looked at one by one: what
msgspec rejects is parsed again by `json`, which accepts a little more and has error messages for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from megamor.corpus.text import BOM, TextChunk
from megamor.errors import DataError

UNITS = {"jsonl": "line", "json": "object", "txt": "document", "rows": "row"}
_BAD_SHOWN = 10


@dataclass
class Counts:
    """Bytes of text, and how much was left out and why; of one chunk, or added up over a run.

    Left out were `empty` documents without text, `blank` lines, documents that were `short`, `held_out` or
    `duplicates`, and `bad` records, of which `bad_shown` describes the first ten. `separators` of documents were found.
    """

    text_bytes: int = 0
    separators: int = 0
    empty: int = 0
    blank: int = 0
    short: int = 0
    held_out: int = 0
    duplicates: int = 0
    bad: int = 0
    bad_shown: list[str] = field(default_factory=list)

    def __add__(self, other: Counts) -> Counts:
        total = Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Counts)))
        total.bad_shown = total.bad_shown[:_BAD_SHOWN]
        return total


@dataclass
class Documents:
    """The texts of a chunk as strings and as UTF-8, the number of each one's record, and the counts of what was left
    out. Of records with an answer also the `prompts`, with which the texts begin."""

    texts: list[str] = field(default_factory=list)
    encoded: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def chosen(self, indices: Sequence[int]) -> Documents:
        """Those at `indices`, with the same counts."""
        rows = [(self.texts[i], self.encoded[i], self.numbers[i]) for i in indices]
        prompts = [self.prompts[i] for i in indices] if self.prompts else []
        return Documents([t for t, _, _ in rows], [e for _, e, _ in rows], [n for *_, n in rows], prompts, self.counts)


def document_hash(encoded: bytes) -> int:
    """64 bits of a document's UTF-8: the first 16 hexadecimal digits that `b2sum --length 64` prints for it."""
    return int.from_bytes(blake2b(encoded, digest_size=8).digest(), "big")


def parse_chunk(
    chunk: TextChunk,
    key: str,
    separator: str | None = None,
    *,
    skip_bad: bool = False,
    keep_empty: bool = False,
    answer_key: str | None = None,
) -> Documents:
    """The documents of `chunk`. JSON objects hold them under `key`; `separator` comes between documents in a text.

    `a.b` is the key `b` of the object `a`, unless there is a key `a.b`. Documents without text are left out unless
    `keep_empty`. With `answer_key`, `key` is that of a prompt, and a text is the prompt followed by the answer; white
    space between them belongs to the answer, as in lm-eval. Raises DataError naming file and line of the first bad
    record, unless such records are skipped.
    """
    found = Documents()
    if chunk.kind in ("jsonl", "json") and not separator and answer_key is None:
        texts = _texts_of_lines(chunk.data, key)
        if texts is not None:
            rows = [(n, t) for n, t in enumerate(texts, chunk.first_record) if keep_empty or (t and not t.isspace())]
            found.numbers, found.texts = [number for number, _ in rows], [text for _, text in rows]
            found.encoded = [text.encode() for text in found.texts]
            found.counts.empty = len(texts) - len(rows)
            return found
    if separator and isinstance(chunk.data, bytes) and chunk.kind == "txt":
        found.counts.separators = chunk.data.count(separator.encode())
    for number, record in enumerate(_records(chunk, separator), start=chunk.first_record):
        if chunk.kind == "jsonl" and not record.strip():
            found.counts.blank += 1
            continue
        try:
            text = prompt = _parse(record, chunk.kind, key)
            if answer_key is not None:
                answer = _parse(record, chunk.kind, answer_key)
                if not answer or answer.isspace():
                    raise ValueError(f"the answer {answer_key!r} is empty, so no token of it would count")
                prompt, text = prompt.rstrip(), prompt + answer
            texts = [text] if not separator or chunk.kind == "txt" else _split(text, separator)
            encoded = [_encode(each) for each in texts]
        except ValueError as error:
            message = f"{chunk.name}, {UNITS[chunk.kind]} {number}: {error}"
            if not skip_bad:
                raise DataError(f"{message}; fix it, or leave such records out with --on-bad-line skip") from error
            found.counts += Counts(bad=1, bad_shown=[message])
            continue
        if separator and chunk.kind != "txt":
            found.counts.separators += text.count(separator)
        for text, data in zip(texts, encoded, strict=True):
            if not keep_empty and (not text or text.isspace()):
                found.counts.empty += 1
            else:
                found.texts.append(text)
                found.encoded.append(data)
                found.numbers.append(number)
                found.prompts += [prompt] if answer_key is not None else []
    return found


def _records(chunk: TextChunk, separator: str | None) -> Iterator[Any]:
    if isinstance(chunk.data, list):
        yield from chunk.data
        return
    if chunk.kind == "txt" and not separator:
        yield chunk.data.replace(BOM, b"")
        return
    between = separator.encode() if separator and chunk.kind == "txt" else b"\n"
    records = chunk.data.split(between)
    # After the last separator nothing follows: a chunk ends with one, unless it is the last of its file.
    for record in records[:-1] if records[-1] == b"" else records:
        yield record.replace(BOM, b"") if chunk.kind == "txt" else record.removeprefix(BOM)


def _texts_of_lines(data: Any, key: str) -> list[str] | None:
    """The texts of lines of JSON; None if one of them is bad, blank or begins with a byte-order mark."""
    # Not `decode_lines`, which takes two objects on a line, or an object on two lines, for what they look like.
    bounds = [0, *(np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1).tolist()]
    bounds += [len(data)] if bounds[-1] < len(data) else []
    lines, decode = memoryview(data), _decoder(key).decode
    try:
        # msgspec doesn't check the UTF-8 of keys that it skips.
        if not data.isascii():
            data.decode()
        return [decode(lines[begin:end]).text for begin, end in pairwise(bounds)]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _split(text: str, separator: str) -> list[str]:
    texts = text.split(separator)
    return texts[:-1] if len(texts) > 1 and not texts[-1] else texts


def _parse(record: Any, kind: str, key: str) -> str:
    """The text of one record; ValueError says what is wrong with it."""
    if kind == "rows":
        _, nested, rest = key.partition(".")
        # For the key `a.b` the column may be `a`, whose values are objects.
        return _require_text(_look_up(record, rest) if nested and isinstance(record, dict) else record, key)
    try:
        # Needed also for msgspec, which doesn't check the UTF-8 of keys that it skips.
        decoded: str = record.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} (0x{record[error.start]:02x}) is not UTF-8") from error
    if kind == "txt":
        if "\0" in decoded:
            raise ValueError("a NUL byte, as in UTF-16 or a binary file; convert the file to UTF-8")
        return decoded
    try:
        text: str = _decoder(key).decode(record).text
        return text
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _parse_with_json(decoded, key)


def _parse_with_json(line: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    return _require_text(_look_up(record, key), key)


def _look_up(record: Any, key: str) -> Any:
    """Value of `key` in nested objects; ValueError if there is none."""
    if isinstance(record, dict) and key in record:
        return record[key]
    head, _, rest = key.partition(".")
    if rest and isinstance(record, dict) and isinstance(record.get(head), dict):
        return _look_up(record[head], rest)
    keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
    options = "--json-key (or --prompt-key, --answer-key)"
    raise ValueError(f"no key {key!r} (found: {keys}); name the right one with {options}")


def _require_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key!r} holds {type(value).__name__}, not a string")
    return value


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half a surrogate pair, which is not Unicode text") from error


@lru_cache(maxsize=8)
def _decoder(key: str) -> Any:
    """A decoder of JSON objects that keeps only the value of `key`. Safe to use from several threads."""
    return msgspec.json.Decoder(msgspec.defstruct("Record", [("text", str, msgspec.field(name=key))]))
