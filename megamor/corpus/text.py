"""Raw text as chunks, from `.jsonl`, `.jsonl.zst`, `.jsonl.gz`, `.txt` and `.parquet` files.

Reading is sequential and cheap; parsing and tokenizing, the expensive part, is done on whole chunks by other threads.
A chunk is some complete lines of JSON, documents of a text file or rows of a table, and how the input is cut into
chunks depends on the input alone: neither on who works on them nor on where an interrupted run goes on.
"""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import zstandard

from megamor.corpus.parquet import parquet_batches
from megamor.errors import DataError

CHUNK_BYTES = 2**20
MAX_DOCUMENT_BYTES = 2**27
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt", ".parquet")
# Decompressed at a time. Small, because a few bytes of zstd can stand for thousands of times as many.
_ZSTD_BYTES = 2**13

Kind = Literal["jsonl", "txt", "rows"]


class Place(NamedTuple):
    """A chunk's address: its source, and its number within the source."""

    source: int
    number: int


@dataclass(frozen=True)
class TextChunk:
    """Complete lines of JSON (`kind` jsonl), text (txt, documents between separators) or values of a column (rows).

    Bytes are UTF-8 unless the input is broken. `source` indexes the names of the input, `place` says where the chunk
    stands, `name` is what an error message calls the source, `first_record` numbers its first line, document or row
    from 1, `size` is its size in bytes, and `position` is how far the input had been read by its end, in the units of
    `TextInput.size`.
    """

    place: Place
    name: str
    first_record: int
    kind: Kind
    data: bytes | list[Any]
    size: int
    position: int


@dataclass(frozen=True)
class Share:
    """Part `index` of `count` of an input: the chunks that end in that stretch of it.

    The parts are contiguous, so that one after the other they are the whole, whatever files it consists of.
    """

    index: int = 0
    count: int = 1

    def part_of(self, position: int, size: int) -> int:
        """The part that a chunk which ends at `position` (of `size`) belongs to."""
        return min(max(0, -(-position * self.count // max(size, 1)) - 1), self.count - 1)


class TextInput(Protocol):
    """Something to tokenize."""

    @property
    def names(self) -> Sequence[str]:
        """What its parts are called in the side file."""

    @property
    def size(self) -> int:
        """How much there is, in any unit, for progress; 0 if unknown."""

    @property
    def identity(self) -> Sequence[Any]:
        """What has changed if the texts have: plain values, to be kept in a file and compared."""

    def chunks(self, share: Share = Share(), start: Place = Place(0, 0)) -> Iterator[TextChunk]:  # noqa: B008
        """Everything in `share` from `start` on, in order. Raises DataError naming the place if it is damaged."""
        ...


@dataclass(frozen=True)
class FileInput:
    """Text files, one after the other.

    `column` is the one that holds the texts of a table; `separator` stands between the documents of a `.txt` file,
    which is one document without it.
    """

    paths: Sequence[str]
    column: str = "text"
    separator: str | None = None
    names: Sequence[str] = field(init=False)
    size: int = field(init=False)
    identity: Sequence[Any] = field(init=False)
    _sizes: Sequence[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        status = [os.stat(path) for path in self.paths]
        # Names only: where the texts lay must not change the side file, hence the fingerprint of the data.
        object.__setattr__(self, "names", [os.path.basename(path) for path in self.paths])
        object.__setattr__(self, "_sizes", [each.st_size for each in status])
        object.__setattr__(self, "size", sum(self._sizes))
        identity = [
            [os.path.abspath(path), each.st_size, each.st_mtime_ns]
            for path, each in zip(self.paths, status, strict=True)
        ]
        object.__setattr__(self, "identity", identity)

    def chunks(self, share: Share = Share(), start: Place = Place(0, 0)) -> Iterator[TextChunk]:  # noqa: B008
        """Chunks of about a MiB, each of one file."""
        end = 0
        for source, path in enumerate(self.paths):
            begin, end = end, end + self._sizes[source]
            if source < start.source or share.part_of(end, self.size) < share.index:
                continue
            if share.part_of(begin, self.size) > share.index:
                return
            yield from select_chunks(self._chunks_of(source, path, begin), self.size, share, start)

    def _chunks_of(self, source: int, path: str, begin: int) -> Iterator[TextChunk]:
        if path.endswith(".parquet"):
            for number, (row, values, size, share_read) in enumerate(parquet_batches(path, self.column, CHUNK_BYTES)):
                position = begin + int(share_read * self._sizes[source])
                yield TextChunk(Place(source, number), path, row, "rows", values, size, position)
            return
        kind: Kind = "txt" if path.endswith(".txt") else "jsonl"
        separator = (self.separator.encode() if self.separator else None) if kind == "txt" else b"\n"
        try:
            with open(path, "rb") as file:
                pieces = _whole_records(path, _decompressed(path, file), separator)
                for number, (record, data) in enumerate(pieces):
                    position = begin + min(file.tell(), self._sizes[source])
                    yield TextChunk(Place(source, number), path, record, kind, data, len(data), position)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{path} can't be read to its end: {error}; fetch the file again") from error


def select_chunks(chunks: Iterable[TextChunk], size: int, share: Share, start: Place) -> Iterator[TextChunk]:
    """Those of a source's `chunks` that are in `share` of an input of `size`, from `start` on."""
    for chunk in chunks:
        part = share.part_of(chunk.position, size)
        if part > share.index:
            return
        if part == share.index and chunk.place >= start:
            yield chunk


def find_files(
    patterns: Sequence[str], column: str = "text", separator: str | None = None, option: str = "--input"
) -> FileInput:
    """Expand paths and glob patterns (`**` crosses directories); files of one pattern are sorted by name.

    Raises DataError, naming `option`, for a pattern without a match, an unknown kind of file, or a file named twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"{option} {pattern}: no such file")
        paths += found
    seen: dict[str, str] = {}
    for path in paths:
        if os.path.isdir(path):
            raise DataError(f"{option} {path} is a directory; name its files with a pattern such as '{path}/*.jsonl'")
        if not path.endswith(_SUFFIXES):
            raise DataError(f"{option} {path}: unknown kind of file; known are {', '.join(_SUFFIXES)}")
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(f"{option} names one file twice, as {seen[real]} and {path}; name it once")
        seen[real] = path
    return FileInput(paths, column, separator)


def _decompressed(path: str, file: BinaryIO) -> Iterator[bytes]:
    """Contents of the file in blocks."""
    if path.endswith(".zst"):
        yield from _zstd_blocks(file)
        return
    stream = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
    while block := stream.read(CHUNK_BYTES):
        yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Contents of all frames. The library's own stream reader takes a truncated frame for the end of the file."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    complete = True
    while block := file.read(_ZSTD_BYTES):
        while block:
            data = frame.decompress(block)
            complete, block = frame.eof, frame.unused_data
            if complete:
                frame = decompressor.decompressobj()
            for begin in range(0, len(data), CHUNK_BYTES):
                yield data[begin : begin + CHUNK_BYTES]
    if not complete:
        raise EOFError("the last zstd frame is cut short")


def _whole_records(path: str, blocks: Iterator[bytes], separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Pieces that end with a separator (without one: at the end), each with the number of its first record."""
    first, parts, size, tail = 1, [], 0, b""
    for number, block in enumerate(blocks):
        parts.append(block.removeprefix(_BOM) if number == 0 else block)
        size += len(block)
        # Joined only if it can be cut: joining a long line again and again would take the square of its length.
        if separator and size >= CHUNK_BYTES and separator in tail + block:
            data = b"".join(parts)
            end = data.rindex(separator) + len(separator)
            yield first, data[:end]
            first += data.count(separator, 0, end)
            parts, size = [data[end:]], len(data) - end
        tail = (tail + block)[1 - len(separator) :] if separator and len(separator) > 1 else b""
        if size > MAX_DOCUMENT_BYTES:
            what = f"record {first} or one soon after it" if separator else "the file"
            raise DataError(
                f"{path}: {what} is a document of over {MAX_DOCUMENT_BYTES // 2**20} MiB, too much to tokenize in one "
                "piece; split it into documents, one JSON object a line"
            )
    if size or not separator:
        yield first, b"".join(parts)
