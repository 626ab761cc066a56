"""Is a shard still what was written? Reads all of it, which opening a shard doesn't.

Faults come as messages, each with file, place and fix, so that a damaged data set can be described whole;
`verify_index` and `verify_tokens` raise the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from megamor.data.meta import BlockHasher, ShardMeta
from megamor.data.shard import HEADER, TokenShard, read_blocks
from megamor.errors import DataError
from megamor.files import sha256_of_file

_CHUNK = 2**22


def verify_index(shard: TokenShard, meta: ShardMeta | None) -> None:
    """Check the whole `.idx`, see `index_faults`. Raises DataError with the first fault."""
    for fault in index_faults(shard, meta):
        raise DataError(fault)


def verify_tokens(shard: TokenShard, meta: ShardMeta | None) -> None:
    """Check the whole `.bin`, see `token_faults`. Raises DataError with the first fault."""
    for fault in token_faults(shard, meta):
        raise DataError(fault)


def index_faults(shard: TokenShard, meta: ShardMeta | None) -> Iterator[str]:
    """What is wrong with the `.idx`: lengths, running sum of offsets, order of documents; its hash and counts."""
    yield from _length_and_offset_faults(shard)
    yield from _document_faults(shard)
    if meta is None:
        return
    path = f"{shard.prefix}.idx"
    found = (shard.num_documents, shard.num_tokens, shard.dtype.name)
    if found != (meta.documents, meta.tokens, meta.dtype):
        yield (
            f"{path} has {found[0]} documents, {found[1]} tokens of {found[2]}, but {shard.prefix}.meta.json says "
            f"{meta.documents}, {meta.tokens} of {meta.dtype}; they don't belong together: copy the data again"
        )
    if sha256_of_file(path) != meta.idx_sha256:
        yield f"{path} is not the file that {shard.prefix}.meta.json describes (SHA-256); copy the data again"


def token_faults(
    shard: TokenShard, meta: ShardMeta | None, advance: Callable[[int], None] = lambda size: None
) -> Iterator[str]:
    """What is wrong with the `.bin`: ids outside the vocabulary and hashes of blocks, as far as the meta knows them.

    `advance` is told how many bytes have been read since the last time.
    """
    path = f"{shard.prefix}.bin"
    limit = meta.vocab_size if meta else None
    hasher = BlockHasher(meta.bin_block_bytes) if meta else None
    position, outside, example = 0, 0, ""
    for tokens in read_blocks(path, shard.dtype, shard.num_tokens):
        if hasher:
            hasher.update(tokens.view(np.uint8).data)
        if int(tokens.min()) < 0 or (limit and int(tokens.max()) >= limit):
            wrong = np.flatnonzero((tokens < 0) | (tokens >= limit) if limit else tokens < 0)
            example = example or f"token id {tokens[wrong[0]]} at token {position + int(wrong[0])}"
            outside += len(wrong)
        position += len(tokens)
        advance(tokens.nbytes)
    if outside:
        more = f" (and {outside - 1} others)" if outside > 1 else ""
        yield f"{path} is damaged: {example}{more} is outside the vocabulary{f' of {limit}' if limit else ''}"
    if hasher and meta:
        yield from block_faults(shard, meta, hasher)


def block_faults(shard: TokenShard, meta: ShardMeta, hasher: BlockHasher) -> Iterator[str]:
    """Which blocks of the `.bin`, all of which went through `hasher`, differ from those that the meta describes."""
    path, digests = f"{shard.prefix}.bin", hasher.digests()
    for number, (found, expected) in enumerate(zip(digests, meta.bin_block_sha256, strict=False)):
        if found != expected:
            start = number * meta.bin_block_bytes
            end = min(start + meta.bin_block_bytes, shard.tokens.nbytes)
            yield (
                f"{path} is damaged: bytes {start} to {end - 1} are not those that were "
                f"written (SHA-256 in {shard.prefix}.meta.json); copy or preprocess the data again"
            )
    if len(digests) != len(meta.bin_block_sha256):
        yield f"{path} has {len(digests)} blocks, {shard.prefix}.meta.json {len(meta.bin_block_sha256)}"


def _length_and_offset_faults(shard: TokenShard) -> Iterator[str]:
    negative, misplaced = _Places(), _Places()
    offset = 0
    for first in range(0, shard.num_sequences, _CHUNK):
        lengths = shard.lengths[first : first + _CHUNK].astype(np.int64)
        ends = offset + np.cumsum(lengths * shard.dtype.itemsize)
        starts = np.concatenate(([offset], ends[:-1]))
        negative.add(first, lengths < 0)
        misplaced.add(first, shard.offsets[first : first + _CHUNK] != starts)
        offset = int(ends[-1])
    if negative:
        yield f"{shard.prefix}.idx is damaged: sequence {negative} has a negative length; copy the data again"
    if misplaced:
        yield f"{shard.prefix}.idx is damaged: the offset of sequence {misplaced} is not its place; copy the data again"


def _document_faults(shard: TokenShard) -> Iterator[str]:
    stored = _stored_document_index(shard)
    # Opening a shard takes an index of one entry a sequence (and the last) for the numbers of the sequences unseen.
    one_each = len(stored) == shard.num_sequences + 1
    wrong = _Places()
    for first in range(0, len(stored), _CHUNK):
        starts = stored[first : first + _CHUNK + 1]
        if one_each:
            wrong.add(first, starts[:_CHUNK] != np.arange(first, first + len(starts[:_CHUNK])))
        else:
            wrong.add(first + 1, np.diff(starts) < 0)
    if wrong:
        yield (
            f"{shard.prefix}.idx is damaged: documents don't follow each other in its document index at entry {wrong}; "
            "copy the data again"
        )


def _stored_document_index(shard: TokenShard) -> NDArray[np.int64]:
    """The document index as it is in the file."""
    with open(f"{shard.prefix}.idx", "rb") as file:
        *_, entries = HEADER.unpack(file.read(HEADER.size))
    return np.memmap(f"{shard.prefix}.idx", "<i8", "r", offset=HEADER.size + 12 * shard.num_sequences, shape=(entries,))


class _Places:
    """Counts places, remembers the first."""

    def __init__(self) -> None:
        self._first = 0
        self._count = 0

    def add(self, start: int, found: NDArray[np.bool_]) -> None:
        """Add those places, from number `start` on, where `found` is true."""
        if not self._count and found.any():
            self._first = start + int(found.argmax())
        self._count += int(found.sum())

    def __bool__(self) -> bool:
        return self._count > 0

    def __str__(self) -> str:
        return f"{self._first}" + (f" (and {self._count - 1} others)" if self._count > 1 else "")
