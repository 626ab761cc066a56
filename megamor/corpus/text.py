"""Raw text in chunks, from `.jsonl`, `.jsonl.zst`, `.jsonl.gz`, `.txt` and `.parquet` files.

One thread reads, which is cheap; other threads parse and tokenize whole chunks, which is not. A chunk is some complete
lines of JSON, documents of a text file or rows of a table. Where the input is cut into chunks depends on the input
alone, not on the number of threads or on where a run resumes: this is what makes the output reproducible.
"""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import zstandard

from megamor.errors import DataError

CHUNK_BYTES = 2**20
MAX_DOCUMENT_BYTES = 2**27
_BOM = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt", ".parquet")
# Compressed bytes read at a time. Few, because a few bytes of zstd can expand to thousands of times as many.
_ZSTD_BYTES = 2**13
_PARQUET_ROWS = 64

Kind = Literal["jsonl", "txt", "rows"]


class ChunkId(NamedTuple):
    """The index of a chunk's source among the input's names, and the number of the chunk within the source."""

    source: int
    number: int


@dataclass(frozen=True)
class TextChunk:
    """Complete lines of JSON (`kind` jsonl), text (txt, documents between separators) or values of a column (rows).

    Bytes are UTF-8 unless the input is broken. `name` is what error messages call the source, `first_record` the number
    of its first line, document or row (from 1), `size` its size in bytes. `position` is how far the input had been read
    at its end, in the unit of `TextInput.size`.
    """

    id: ChunkId
    name: str
    first_record: int
    kind: Kind
    data: bytes | list[Any]
    size: int
    position: int


@dataclass(frozen=True)
class InputRange:
    """The `index`-th of `count` equal contiguous ranges of an input: the chunks that end in it.

    The ranges together are the whole input, in order, whatever files it consists of.
    """

    index: int = 0
    count: int = 1

    def index_of(self, position: int, size: int) -> int:
        """Index of the range that a chunk which ends at `position` (of `size`) belongs to."""
        # Rounded up, less one: a chunk that ends exactly at a boundary belongs to the range before it.
        return min(max(0, -(-position * self.count // max(size, 1)) - 1), self.count - 1)


WHOLE = InputRange()
FIRST = ChunkId(0, 0)


class TextInput(Protocol):
    """Something to tokenize.

    `names` are what the side file calls its sources. `size` is the amount of input in `unit` ("bytes" or "rows"), for
    progress and ranges; 0 if unknown. `identity` is plain data that changes whenever the texts do.
    """

    names: Sequence[str]
    size: int
    unit: str
    identity: Sequence[Any]

    def chunks(self, within: InputRange = WHOLE, start: ChunkId = FIRST) -> Iterator[TextChunk]:
        """The chunks of the range `within` from `start` on, in order. Raises DataError naming file and position."""
        ...


class FileInput:
    """Text files, one after the other.

    `column` is the one that holds the texts of a table. `separator` comes between the documents of a `.txt` file;
    without one the file is a single document.
    """

    unit = "bytes"

    def __init__(self, paths: Sequence[str], column: str = "text", separator: str | None = None) -> None:
        status = [os.stat(path) for path in paths]
        self.paths, self._column, self._separator = paths, column, separator
        self._sizes = [each.st_size for each in status]
        # Names only: where the texts were must not change the side file, and with it the fingerprint of the data.
        self.names: Sequence[str] = [os.path.basename(path) for path in paths]
        self.size = sum(self._sizes)
        # Not a hash of the contents, which would take a pass over all of the input.
        self.identity: Sequence[Any] = [
            [os.path.abspath(path), each.st_size, each.st_mtime_ns] for path, each in zip(paths, status, strict=True)
        ]

    def chunks(self, within: InputRange = WHOLE, start: ChunkId = FIRST) -> Iterator[TextChunk]:
        """Chunks of about a MiB, each of one file. See `TextInput`."""
        end = 0
        for source, path in enumerate(self.paths):
            begin, end = end, end + self._sizes[source]
            # A file outside the range isn't opened; one that overlaps it is read from its beginning.
            if source < start.source or within.index_of(end, self.size) < within.index:
                continue
            if within.index_of(begin, self.size) > within.index:
                return
            yield from select_chunks(self._chunks_of(source, path, begin), self.size, within, start)

    def _chunks_of(self, source: int, path: str, begin: int) -> Iterator[TextChunk]:
        size = self._sizes[source]
        if path.endswith(".parquet"):
            for number, (first, values, length, read) in enumerate(_parquet_rows(path, self._column)):
                yield TextChunk(ChunkId(source, number), path, first, "rows", values, length, begin + int(read * size))
            return
        kind: Kind = "txt" if path.endswith(".txt") else "jsonl"
        # Lines of JSON always end with a line feed; --document-separator then splits within the decoded text.
        separator = (self._separator.encode() if self._separator else None) if kind == "txt" else b"\n"
        try:
            with open(path, "rb") as file:
                groups = _whole_records(path, _decompressed(path, file), separator)
                for number, (record, data) in enumerate(groups):
                    position = begin + min(file.tell(), size)
                    yield TextChunk(ChunkId(source, number), path, record, kind, data, len(data), position)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{path} can't be read to its end: {error}; download the file again") from error


def select_chunks(chunks: Iterable[TextChunk], size: int, within: InputRange, start: ChunkId) -> Iterator[TextChunk]:
    """Those of a source's `chunks` that are in the range `within` of an input of `size`, from `start` on."""
    for chunk in chunks:
        index = within.index_of(chunk.position, size)
        if index > within.index:
            return
        if index == within.index and chunk.id >= start:
            yield chunk


def find_files(
    patterns: Sequence[str], column: str = "text", separator: str | None = None, option: str = "--input"
) -> FileInput:
    """Expand paths and glob patterns (`**` crosses directories); the files of a pattern are sorted by name.

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
        if not path.endswith(SUFFIXES):
            raise DataError(f"{option} {path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(f"{option} names one file twice, as {seen[real]} and {path}; name it once")
        seen[real] = path
    return FileInput(paths, column, separator)


def group_rows(batches: Iterable[tuple[list[Any], int]]) -> Iterator[tuple[int, list[Any], int, int]]:
    """Join `batches` of (values, bytes) to about `CHUNK_BYTES`: (first row from 1, values, bytes, last row)."""
    first, row, values, size = 1, 0, list[Any](), 0
    for batch, length in batches:
        values += batch
        size += length
        row += len(batch)
        if size >= CHUNK_BYTES:
            yield first, values, size, row
            first, values, size = row + 1, [], 0
    if values:
        yield first, values, size, row


def _parquet_rows(path: str, column: str) -> Iterator[tuple[int, list[Any], int, float]]:
    """Values of a column as `group_rows` joins them, with the fraction of the file read instead of the last row.

    Raises DataError if the file is damaged or has no such column.
    """
    # pyarrow comes with `datasets` and is needed for these files only.
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        # Without pre-buffering, which reads whole row groups into memory.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as table:
            if column not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names[:8])
                raise DataError(f"{path} has no column {column!r} but {columns}; name the right one with --json-key")
            arrays = (batch.column(0) for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]))
            batches = ((array.to_pylist(), array.get_total_buffer_size()) for array in arrays)
            for first, values, size, row in group_rows(batches):
                yield first, values, size, row / table.metadata.num_rows
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} can't be read to its end: {error}; download the file again") from error


def _decompressed(path: str, file: BinaryIO) -> Iterator[bytes]:
    """Contents of the file in blocks of at most `CHUNK_BYTES`."""
    if path.endswith(".zst"):
        yield from _zstd_blocks(file)
        return
    stream = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
    while block := stream.read(CHUNK_BYTES):
        yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Contents of all frames."""
    # Not the library's stream reader, which takes a truncated frame for the end of the file.
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
    """The contents cut after separators (never, without one), each with the number of its first record."""
    first, pending, size, tail = 1, list[bytes](), 0, b""
    for number, block in enumerate(blocks):
        pending.append(block.removeprefix(_BOM) if number == 0 else block)
        size += len(block)
        # Joined only if there is a separator: joining a long line for every block would take quadratic time. `tail`
        # is the end of the previous block, for a separator that straddles two blocks.
        if separator and size >= CHUNK_BYTES and separator in tail + block:
            data = b"".join(pending)
            end = data.rindex(separator) + len(separator)
            yield first, data[:end]
            first += data.count(separator, 0, end)
            pending, size = [data[end:]], len(data) - end
        tail = (tail + block)[1 - len(separator) :] if separator and len(separator) > 1 else b""
        if size > MAX_DOCUMENT_BYTES:
            what = f"record {first} or one soon after it" if separator else "the file"
            raise DataError(
                f"{path}: {what} is a document of over {MAX_DOCUMENT_BYTES // 2**20} MiB, too large to tokenize in "
                "one go; split it into documents, one JSON object per line"
            )
    if size or not separator:
        yield first, b"".join(pending)
