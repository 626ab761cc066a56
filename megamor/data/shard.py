"""Token shards in the `.bin`/`.idx` format of Megatron-LM and GPT-NeoX: layout and memory-mapped reader.

`.bin` is the ids of all sequences one after the other. `.idx` is a header of 34 bytes, then for S sequences and D - 1
documents: lengths (int32 [S]), byte offsets (int64 [S]) and the sequence at which each document starts (int64 [D]).
Everything is little-endian and unpadded, so the sizes of both files follow from the header; opening checks them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megamor.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floats, swapped between the two projects, and no type for token ids.
DTYPE_OF_CODE = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
# Below this, both projects use two-byte ids; a little under 2^16.
UINT16_VOCAB_LIMIT = 65_500
_READ_BYTES = 2**22


def dtype_for_vocab(vocab_size: int) -> np.dtype:
    """The item type for ids of `vocab_size` entries: uint16 below `UINT16_VOCAB_LIMIT`, else int32."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def mask_path(prefix: str) -> str:
    """Path of the loss mask of `prefix`: one byte for each token, in the order of `.bin`."""
    return f"{prefix}.loss_mask"


@dataclass(frozen=True, eq=False)
class TokenShard:
    """A memory-mapped data set.

    `tokens` [T] is the whole stream in the dtype of the file, `lengths` [S] in tokens, `offsets` [S] in bytes.
    `document_index` [D] is None where each sequence is a document (also for GPT-NeoX's merged files, whose index is
    just `[0]`). `loss_mask` [T] is 0 where a token has no loss as a label; None means that every token counts.
    """

    prefix: str
    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    document_index: NDArray[np.int64] | None
    loss_mask: NDArray[np.uint8] | None = None

    @classmethod
    def open(cls, prefix: str | os.PathLike[str]) -> TokenShard:
        """Map `<prefix>.bin`, `<prefix>.idx` and, where there is one, `<prefix>.loss_mask`.

        Constant time: only sizes and the ends of the index are checked.

        Raises DataError naming the file if either is missing, of another format, or not of the size the index says.
        """
        prefix = os.fspath(prefix)
        index = _map_bytes(f"{prefix}.idx", prefix)
        dtype, num_sequences, index_length = _parse_header(index, f"{prefix}.idx")
        lengths_end = HEADER.size + 4 * num_sequences
        offsets_end = lengths_end + 8 * num_sequences
        lengths = np.frombuffer(index, "<i4", num_sequences, HEADER.size)
        offsets = np.frombuffer(index, "<i8", num_sequences, lengths_end)
        document_index = np.frombuffer(index, "<i8", index_length, offsets_end)
        short = index_length == 1 and num_sequences > 0
        if document_index[0] != 0 or (not short and document_index[-1] != num_sequences):
            raise DataError(
                f"{prefix}.idx is damaged: its document index runs from {document_index[0]} to {document_index[-1]}, "
                f"not from 0 to {num_sequences}; copy or preprocess the data again"
            )
        # Dropped if it says nothing: an array of a billion entries is then never read.
        one_each = short or index_length == num_sequences + 1
        tokens = _map_tokens(prefix, dtype, lengths, offsets)
        path = mask_path(prefix)
        mask = _map_bytes(path, prefix) if os.path.exists(path) else None
        if mask is not None and len(mask) != len(tokens):
            raise DataError(
                f"{path} has {len(mask)} bytes, {prefix}.bin {len(tokens)} tokens; copy or preprocess the data again"
            )
        return cls(prefix, tokens, lengths, offsets, None if one_each else document_index, mask)

    @property
    def dtype(self) -> np.dtype:
        """Item type of `.bin`."""
        return self.tokens.dtype

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the stream."""
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """Number of sequences in the index."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents in the index."""
        return self.num_sequences if self.document_index is None else len(self.document_index) - 1

    def starts_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token at which each of `documents` [n] starts; for document `num_documents`, the end of the stream."""
        sequences = documents if self.document_index is None else self.document_index[documents]
        starts = np.full(len(sequences), self.num_tokens, np.int64)
        inside = sequences < self.num_sequences
        starts[inside] = self.offsets[sequences[inside]] // self.dtype.itemsize
        return starts

    def lengths_of(self, documents: slice) -> NDArray[np.int64]:
        """Number of tokens of each document in a range [n]."""
        if self.document_index is None:
            return self.lengths[documents].astype(np.int64)
        numbers = np.arange(*documents.indices(self.num_documents))
        return self.starts_of(numbers + 1) - self.starts_of(numbers)

    def documents_at(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the document that each of the `tokens` [n] of the stream belongs to."""
        sequences = _last_up_to(self.offsets, tokens * self.dtype.itemsize)
        return sequences if self.document_index is None else _last_up_to(self.document_index[:-1], sequences)

    def document(self, number: int) -> NDArray[Any]:
        """The ids of one document, a view of the mapped file; its sequences are contiguous."""
        start, end = self.starts_of(np.array([number, number + 1])).tolist()
        return self.tokens[start:end]


def _last_up_to(ascending: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the last entry that isn't above each of `values` [n]; the first entry must not be above any of them."""
    # Not np.searchsorted: nothing in an `.idx` is aligned to 8 bytes, and it would copy such an array as a whole.
    low = np.zeros(len(values), np.int64)
    high = np.full(len(values), len(ascending), np.int64)
    for _ in range(len(ascending).bit_length()):
        middle = (low + high) // 2
        above = ascending[middle] > values
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return low


def read_blocks(path: str, dtype: DTypeLike, count: int, start: int = 0) -> Iterator[NDArray[Any]]:
    """The `count` items of a file from byte `start` on, in arrays of a few MiB.

    Read, not mapped, so that a pass over a large file doesn't fill the process's memory. Raises DataError if the file
    ends too early or can't be read.
    """
    dtype = np.dtype(dtype)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while count:
                block = np.fromfile(file, dtype, min(count, _READ_BYTES // dtype.itemsize))
                if not len(block):
                    raise DataError(f"{path} became shorter while it was read; is another process writing it?")
                count -= len(block)
                yield block
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _map_bytes(path: str, prefix: str) -> NDArray[np.uint8]:
    try:
        if os.path.getsize(path) == 0:
            return np.empty(0, np.uint8)
        # A plain array over the map: slicing an np.memmap itself is several times slower.
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except FileNotFoundError:
        raise DataError(f"{path} doesn't exist{_hint(prefix)}") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error


def _hint(prefix: str) -> str:
    stem, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx"):
        return f"; give the prefix without the ending: {stem}"
    parent = Path(prefix).parent
    others = sorted(str(p.with_suffix("")) for p in parent.glob("*.idx")) if parent.is_dir() else []
    if others:
        return f"; data sets in that directory: {', '.join(others[:4])}{', …' if len(others) > 4 else ''}"
    return "; write it with megamor preprocess, or correct the prefix"


def _parse_header(index: NDArray[np.uint8], path: str) -> tuple[np.dtype, int, int]:
    """Item type, S and D. Raises DataError unless the file is an index of exactly the size its header implies."""
    start = index[: HEADER.size].tobytes()
    if start.startswith(OLD_MAGIC):
        raise DataError(
            f"{path} is in the TNTIDX format (2019 and earlier); preprocess the data again with megamor preprocess"
        )
    if not start.startswith(MAGIC):
        raise DataError(f"{path} is not a Megatron index: it starts with {start[:9]!r}, not {MAGIC!r}")
    if len(start) < HEADER.size:
        raise DataError(f"{path} is cut short: {len(start)} bytes, the header alone has {HEADER.size}; copy it again")
    _, version, code, num_sequences, index_length = HEADER.unpack(start)
    if version != VERSION:
        raise DataError(f"{path} has format version {version}; this reader knows version {VERSION}")
    if code not in DTYPE_OF_CODE:
        known = ", ".join(f"{c} {d.name}" for c, d in DTYPE_OF_CODE.items())
        raise DataError(f"{path} has dtype code {code}, which isn't a type of token ids (known: {known})")
    expected = HEADER.size + 12 * num_sequences + 8 * index_length
    # Sizes are compared exactly: this finds a truncated copy without reading it.
    # Megatron's multimodal files append one mode byte for each sequence.
    if len(index) not in (expected, expected + num_sequences) or index_length < 1:
        raise DataError(
            f"{path} has {len(index)} bytes, but its header ({num_sequences} sequences, {index_length} document index "
            f"entries) needs {expected}; it was cut short or damaged: copy or preprocess the data again"
        )
    return DTYPE_OF_CODE[code], num_sequences, index_length


def _map_tokens(prefix: str, dtype: np.dtype, lengths: NDArray[Any], offsets: NDArray[Any]) -> NDArray[Any]:
    data = _map_bytes(f"{prefix}.bin", prefix)
    expected = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize if len(lengths) else 0
    if len(data) != expected or (len(offsets) and offsets[0] != 0):
        raise DataError(
            f"{prefix}.bin has {len(data)} bytes, but {prefix}.idx says {expected} ({len(lengths)} sequences of "
            f"{dtype.name}); the file was cut short or the two don't belong together: copy or preprocess the data again"
        )
    return data.view(dtype)
