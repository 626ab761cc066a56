"""Raw text as chunks of bytes, from `.jsonl`, `.jsonl.zst`, `.jsonl.gz` and `.txt` files.

Reading is sequential and cheap; parsing and tokenizing, the expensive part, is done on whole chunks by other processes.
A chunk is some complete lines of JSON, or one whole text file, so its contents don't depend on who works on it.
"""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, Protocol

import zstandard

from megamor.errors import DataError

CHUNK_BYTES = 2**20
# The tokenizer needs about 130 bytes of memory for each byte of a document.
MAX_DOCUMENT_BYTES = 2**27
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt")


@dataclass(frozen=True)
class TextChunk:
    """Complete lines of JSON (`kind` jsonl) or one document (txt), in UTF-8 unless the input is broken.

    `source` indexes the names of the input, `place` is what an error message calls it, `first_line` counts from 1, and
    `position` is how far the input had been read by its end, in the units of `TextInput.size`.
    """

    source: int
    place: str
    first_line: int
    kind: Literal["jsonl", "txt"]
    data: bytes
    position: int


class TextInput(Protocol):
    """Something to tokenize."""

    @property
    def names(self) -> Sequence[str]:
        """What its parts are called in the side file."""

    @property
    def size(self) -> int:
        """How much there is, in any unit, for progress; 0 if unknown."""

    def chunks(self) -> Iterator[TextChunk]:
        """Everything, in order. Raises DataError naming the place if the input is damaged."""
        ...


@dataclass(frozen=True)
class FileInput:
    """Text files, one after the other."""

    paths: Sequence[str]
    names: Sequence[str] = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        # Names only: where the texts lay must not change the side file, hence the fingerprint of the data.
        object.__setattr__(self, "names", [os.path.basename(path) for path in self.paths])
        object.__setattr__(self, "size", sum(os.path.getsize(path) for path in self.paths))

    def chunks(self) -> Iterator[TextChunk]:
        """Lines of the files in chunks of about a MiB; a `.txt` file is one document."""
        done = 0
        for source, path in enumerate(self.paths):
            try:
                with open(path, "rb") as file:
                    for first_line, data in _whole_lines(path, _decompressed(path, file)):
                        kind: Literal["jsonl", "txt"] = "txt" if path.endswith(".txt") else "jsonl"
                        yield TextChunk(source, path, first_line, kind, data, done + file.tell())
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                raise DataError(f"{path} can't be read to its end: {error}; fetch the file again") from error
            done += os.path.getsize(path)


def find_files(patterns: Sequence[str]) -> FileInput:
    """Expand paths and glob patterns (`**` crosses directories); files of one pattern are sorted by name.

    Raises DataError for a pattern without a match, an unknown kind of file, or a file named twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"--input {pattern}: no such file")
        paths += found
    seen: dict[str, str] = {}
    for path in paths:
        if os.path.isdir(path):
            raise DataError(f"--input {path} is a directory; name its files with a pattern such as '{path}/*.jsonl'")
        if not path.endswith(_SUFFIXES):
            raise DataError(f"--input {path}: unknown kind of file; known are {', '.join(_SUFFIXES)}")
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(f"--input names one file twice, as {seen[real]} and {path}; name it once")
        seen[real] = path
    return FileInput(paths)


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
    while block := file.read(2**17):
        while block:
            data = frame.decompress(block)
            complete, block = frame.eof, frame.unused_data
            if complete:
                frame = decompressor.decompressobj()
            if data:
                yield data
    if not complete:
        raise EOFError("the last zstd frame is cut short")


def _whole_lines(path: str, blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Pieces that end where a line ends (for `.txt`, where the file ends), each with the number of its first line."""
    single = path.endswith(".txt")
    first_line, parts, size = 1, [], 0
    for number, block in enumerate(blocks):
        parts.append(block.removeprefix(_BOM) if number == 0 else block)
        size += len(block)
        if size > MAX_DOCUMENT_BYTES and (single or b"\n" not in block):
            what = "the file" if single else f"line {first_line} or one soon after it"
            raise DataError(
                f"{path}: {what} is a document of over {MAX_DOCUMENT_BYTES // 2**20} MiB, too much to tokenize in one "
                "piece; split it into documents, one JSON object a line"
            )
        if single or size < CHUNK_BYTES or b"\n" not in block:
            continue
        data = b"".join(parts)
        end = data.rindex(b"\n") + 1
        yield first_line, data[:end]
        first_line += data.count(b"\n")
        parts, size = [data[end:]], len(data) - end
    if size or single:
        yield first_line, b"".join(parts)
