"""Raw text in chunks, from files of JSON lines or JSON, text and parquet, compressed or not.

One thread reads, which is cheap; other threads parse and tokenize whole chunks, which is not. A chunk is some complete
lines of JSON, documents of a text file or rows of a table. Where the input is cut into chunks depends on the input
alone, not on the number of threads or on where a run resumes: this is what makes the output reproducible.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import zstandard

from megamor.errors import DataError

CHUNK_BYTES = 2**20
MAX_DOCUMENT_BYTES = 2**27
BOM = b"\xef\xbb\xbf"
"""Byte-order mark: no text, wherever files with one were joined."""
_BETWEEN_ELEMENTS = re.compile(rf"(?:[\s,\[\]]|{BOM.decode('latin-1')})*")
_OPENERS: dict[str, Any] = {".gz": lambda file: gzip.GzipFile(fileobj=file), ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
COMPRESSIONS = ("", ".zst", *_OPENERS)
SUFFIXES = (*(kind + each for kind in (".jsonl", ".ndjson", ".json", ".txt") for each in COMPRESSIONS), ".parquet")
"""Endings of the files that are read, in lower case; a name may have capitals."""
# Compressed bytes read at a time. Few, because a few bytes of zstd can expand to thousands of times as many.
_ZSTD_BYTES = 2**13
_PARQUET_ROWS = 64

Kind = Literal["jsonl", "json", "txt", "rows"]


class ChunkId(NamedTuple):
    """The index of a chunk's source among the input's names, and the number of the chunk within the source."""

    source: int
    number: int


@dataclass(frozen=True)
class TextChunk:
    """Lines of JSON (`kind` jsonl; json: made of an array or an object), text (txt, documents between separators) or
    values of a column (rows).

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
        size, kind = self._sizes[source], kind_of(path)
        if kind == "rows":
            for number, (first, values, length, read) in enumerate(_parquet_rows(path, self._column)):
                yield TextChunk(ChunkId(source, number), path, first, "rows", values, length, begin + int(read * size))
            return
        # Lines of JSON always end with a line feed; --document-separator then splits within the decoded text.
        separator = (self._separator.encode() if self._separator else None) if kind == "txt" else b"\n"
        try:
            with open(path, "rb") as file:
                blocks = _decompressed(path, file)
                if kind == "json":
                    kind, blocks = _json_lines(path, blocks)
                groups = _whole_records(path, blocks, separator)
                for number, (record, data) in enumerate(groups):
                    position = begin + min(file.tell(), size)
                    yield TextChunk(ChunkId(source, number), path, record, kind, data, len(data), position)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise DataError(f"{path} can't be read to its end: {error}; download the file again") from error


def kind_of(path: str) -> Kind:
    """What a file holds, by its name; `.json` may hold lines of JSON, too."""
    name = path.lower()
    for compression in COMPRESSIONS[1:]:
        name = name.removesuffix(compression)
    kinds: dict[str, Kind] = {".parquet": "rows", ".txt": "txt", ".json": "json"}
    return kinds.get(os.path.splitext(name)[1], "jsonl")


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
        if not path.lower().endswith(SUFFIXES):
            known = f".parquet, and .jsonl, .ndjson, .json and .txt, also with {', '.join(COMPRESSIONS[1:])}"
            raise DataError(f"{option} {path}: unknown kind of file; known are {known}")
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
            column = column_of(column, table.schema_arrow.names, path)
            arrays = (batch.column(column) for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]))
            batches = ((array.to_pylist(), array.get_total_buffer_size()) for array in arrays)
            for first, values, size, row in group_rows(batches):
                yield first, values, size, row / table.metadata.num_rows
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} can't be read to its end: {error}; download the file again") from error


def column_of(key: str, columns: Sequence[str], name: str) -> str:
    """The column that holds `key`, which may name a field of a nested column. Raises DataError, naming the source."""
    found = next((each for each in (key, key.partition(".")[0]) if each in columns), None)
    if found is None:
        raise DataError(
            f"{name} has no column {key!r} but {', '.join(columns[:8])}; name the right one with --json-key"
        )
    return found


def _decompressed(path: str, file: BinaryIO) -> Iterator[bytes]:
    """Contents of the file in blocks of at most `CHUNK_BYTES`."""
    compression = os.path.splitext(path.lower())[1]
    if compression in COMPRESSIONS and not os.fstat(file.fileno()).st_size:
        raise EOFError("it is empty, as no compressed file is")  # the decompressors take it for one of an empty file
    if compression == ".zst":
        yield from _zstd_blocks(file)
        return
    stream = _OPENERS.get(compression, lambda same: same)(file)
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


def _json_lines(path: str, blocks: Iterator[bytes]) -> tuple[Kind, Iterator[bytes]]:
    """Contents of a `.json` file as lines: of an array or one object, or (kind `jsonl`) of what are lines already."""
    start = b""
    for block in blocks:
        start = (start + block).lstrip(BOM + b" \t\r\n")
        if start.startswith(b"[") or b"\n" in start or len(start) > MAX_DOCUMENT_BYTES:
            break
    if start.startswith(b"["):
        return "json", _array_elements(path, start, blocks)
    line = start.partition(b"\n")[0].decode(errors="replace").rstrip()
    try:
        json.loads(line, parse_int=str)
    except RecursionError:
        pass  # an error of the line, when that is parsed
    except json.JSONDecodeError as error:
        # A line that is right as far as it goes begins an object of several lines. JSON has line feeds between values
        # only, so that these can be replaced.
        if error.pos >= len(line):
            return "json", (block.replace(b"\n", b" ") for block in chain([start], blocks))
    return "jsonl", chain([start], blocks)


def _array_elements(path: str, start: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The elements of the arrays in a file that begins with `start`, one a line. Raises DataError if it isn't JSON."""
    # In Latin-1 each byte is one character. Whether they are UTF-8 is found when the lines are parsed. Integers stay
    # text, because Python refuses to convert very long ones.
    text, position, decoder = start.decode("latin-1"), 0, json.JSONDecoder(parse_int=str)
    count, closed, lines = 0, False, list[bytes]()
    while True:
        gap = _BETWEEN_ELEMENTS.match(text, position)
        assert gap is not None, "the pattern matches nothing, too"
        position = gap.end()
        for bracket in re.findall(r"[\[\]]", gap[0]):
            closed = bracket == "]"
        try:
            _, end = decoder.raw_decode(text, position)
        except RecursionError as error:
            raise DataError(f"{path}, object {count + 1}: JSON nested too deeply") from error
        except json.JSONDecodeError as error:
            yield b"".join(lines)
            lines.clear()
            block = next(blocks, b"")
            if not block and closed and position == len(text):
                return
            if not block or len(text) - position > MAX_DOCUMENT_BYTES:
                reason = "the array has no end" if position == len(text) else error.msg
                raise DataError(f"{path}, object {count + 1}: not JSON ({reason})") from error
            text, position = text[position:] + block.decode("latin-1"), 0
        else:
            lines.append(text[position:end].replace("\n", " ").encode("latin-1") + b"\n")
            position, count, closed = end, count + 1, False


def _whole_records(path: str, blocks: Iterator[bytes], separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """The contents cut after separators (never, without one), each with the number of its first record."""
    first, pending, size, tail = 1, list[bytes](), 0, b""
    for block in blocks:
        pending.append(block)
        size += len(block)
        # Joined only if there is a separator: joining a long line for every block would take quadratic time. `tail`
        # is the end of the previous block, for a separator that straddles two blocks.
        if separator and size >= CHUNK_BYTES and (found := (tail + block).rfind(separator)) >= 0:
            end = found + len(separator) - len(tail)
            data = b"".join([*pending[:-1], block[:end]])
            yield first, data
            first += data.count(separator)
            block, tail = block[end:], b""
            pending, size = [block], len(block)
        tail = (tail + block)[1 - len(separator) :] if separator and len(separator) > 1 else b""
        if size > MAX_DOCUMENT_BYTES:
            what = f"record {first} or one soon after it" if separator else "the file"
            raise DataError(
                f"{path}: {what} is a document of over {MAX_DOCUMENT_BYTES // 2**20} MiB, too large to tokenize in "
                "one go; split it into documents, one JSON object per line"
            )
    if size or not separator:
        yield first, b"".join(pending)
