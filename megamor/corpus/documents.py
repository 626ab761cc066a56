"""From a chunk of raw text to documents: parsing, and what is wrong with a line that can't be parsed.

JSON is decoded by msgspec, which reads only the wanted key and is about five times as fast as `json`; what it can't
read is given to `json`, whose word is final and whose messages are for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import msgspec

from megamor.corpus.text import TextChunk
from megamor.errors import DataError

_UNITS = {"jsonl": "line", "txt": "document", "rows": "row"}


@dataclass
class Documents:
    """The texts of a chunk as strings and as UTF-8. Without text were `empty` documents and `blank` lines.

    `bad` describes the records that were skipped.
    """

    texts: list[str] = field(default_factory=list)
    encoded: list[bytes] = field(default_factory=list)
    empty: int = 0
    blank: int = 0
    bad: list[str] = field(default_factory=list)


def document_hash(encoded: bytes) -> int:
    """64 bits of a document's UTF-8: the first 16 hexadecimal digits that `b2sum --length 64` prints for it."""
    return int.from_bytes(blake2b(encoded, digest_size=8).digest(), "big")


def parse_chunk(chunk: TextChunk, key: str, separator: str | None = None, *, skip_bad: bool = False) -> Documents:
    """The documents of `chunk`, whose JSON holds them under `key`; `separator` stands between documents in a text.

    Raises DataError naming file and line of the first bad record, unless such records are skipped.
    """
    found = Documents()
    for number, record in enumerate(_records(chunk, separator), start=chunk.first_record):
        if chunk.kind == "jsonl" and not record.strip():
            found.blank += 1
            continue
        try:
            text = _parse(record, chunk.kind, key)
            parts = [text] if not separator or chunk.kind == "txt" else _split(text, separator)
            encoded = [_encode(part) for part in parts]
        except ValueError as error:
            message = f"{chunk.name}, {_UNITS[chunk.kind]} {number}: {error}"
            if not skip_bad:
                raise DataError(f"{message}; mend it, or leave such records out with --on-bad-line skip") from error
            found.bad.append(message)
            continue
        for part, data in zip(parts, encoded, strict=True):
            if not part or part.isspace():
                found.empty += 1
            else:
                found.texts.append(part)
                found.encoded.append(data)
    return found


def _records(chunk: TextChunk, separator: str | None) -> Iterator[Any]:
    if isinstance(chunk.data, list):
        yield from chunk.data
        return
    if chunk.kind == "txt" and not separator:
        yield chunk.data
        return
    between = separator.encode() if separator and chunk.kind == "txt" else b"\n"
    records = chunk.data.split(between)
    # What follows the last separator is the next chunk's, or nothing.
    yield from records[:-1] if records[-1] == b"" else records


def _split(text: str, separator: str) -> list[str]:
    parts = text.split(separator)
    return parts[:-1] if len(parts) > 1 and not parts[-1] else parts


def _parse(record: Any, kind: str, key: str) -> str:
    """The text of one record; ValueError says what is wrong with it."""
    if kind == "rows":
        return _require_text(record, key)
    try:
        # Also where the decoder would do without: it doesn't look into what it skips.
        decoded = record.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} (0x{record[error.start]:02x}) is not UTF-8") from error
    if kind == "txt":
        return decoded
    try:
        return _decoder(key).decode(record).text
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _parse_with_json(decoded, key)


def _parse_with_json(line: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no key {key!r} (found: {keys}); name the right one with --json-key")
    return _require_text(record[key], key)


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
    """A decoder of objects for their text under `key`; it skips all else. Shared by threads, which it allows."""
    return msgspec.json.Decoder(msgspec.defstruct("Record", [("text", str, msgspec.field(name=key))]))
