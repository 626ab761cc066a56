"""Whether a shard is still what was written. Reads all of it, unlike opening a shard.

Faults are messages, each with file, position and fix, so that all faults of a damaged data set can be listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from megamor.data.meta import BlockHasher, ShardMeta
from megamor.data.shard import HEADER, TokenShard, mask_path, read_blocks
from megamor.errors import DataError
from megamor.files import sha256_of_file

_ENTRIES = 2**22


def verify_index(shard: TokenShard, meta: ShardMeta | None) -> None:
    """Check the whole `.idx`, see `index_faults`. Raises DataError with the first fault."""
    for fault in index_faults(shard, meta):
        raise DataError(fault)


def index_faults(shard: TokenShard, meta: ShardMeta | None) -> Iterator[str]:
    """What is wrong with the `.idx`: lengths, running sum of offsets, order of documents; its hash and counts.

    The loss mask, where there is one, is compared with its hash.
    """
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
    if meta.loss_mask_sha256 and sha256_of_file(path := mask_path(shard.prefix)) != meta.loss_mask_sha256:
        yield f"{path} is not the file that {shard.prefix}.meta.json describes (SHA-256); copy the data again"


def token_faults(
    shard: TokenShard, meta: ShardMeta | None, advance: Callable[[int], None] = lambda size: None
) -> Iterator[str]:
    """What is wrong with the `.bin`: ids outside the vocabulary and hashes of blocks, as far as `meta` knows them.

    `advance` is called with the bytes just read.
    """
    path = f"{shard.prefix}.bin"
    limit = meta.vocab_size if meta else None
    hasher = BlockHasher(meta.bin_block_bytes) if meta else None
    position, outside = 0, _Faults()
    for tokens in read_blocks(path, shard.dtype, shard.num_tokens):
        if hasher:
            hasher.update(tokens.view(np.uint8).data)
        # The extremes first: comparing every token would cost a pass and an array more.
        if int(tokens.min()) < 0 or (limit and int(tokens.max()) >= limit):
            outside.add(position, (tokens < 0) | (tokens >= limit) if limit else tokens < 0)
        position += len(tokens)
        advance(tokens.nbytes)
    if outside:
        example = f"token id {shard.tokens[outside.first]} at token {outside}"
        yield f"{path} is damaged: {example} is outside the vocabulary{f' of {limit}' if limit else ''}"
    if hasher and meta:
        yield from block_faults(shard, meta, hasher)


def block_faults(shard: TokenShard, meta: ShardMeta, hasher: BlockHasher) -> Iterator[str]:
    """Which blocks of the `.bin` differ from those that `meta` describes. `hasher` was given the whole file."""
    path, digests = f"{shard.prefix}.bin", hasher.digests()
    for number, (found, expected) in enumerate(zip(digests, meta.bin_block_sha256, strict=False)):
        if found != expected:
            start = number * meta.bin_block_bytes
            end = min(start + meta.bin_block_bytes, shard.tokens.nbytes)
            yield (
                f"{path} is damaged: bytes {start} to {end - 1} are not those that were written (SHA-256 in "
                f"{shard.prefix}.meta.json); copy or preprocess the data again"
            )
    if len(digests) != len(meta.bin_block_sha256):
        yield f"{path} has {len(digests)} blocks, {shard.prefix}.meta.json {len(meta.bin_block_sha256)}"


def _length_and_offset_faults(shard: TokenShard) -> Iterator[str]:
    negative, wrong = _Faults(), _Faults()
    offset = 0
    for first in range(0, shard.num_sequences, _ENTRIES):
        lengths = shard.lengths[first : first + _ENTRIES].astype(np.int64)
        ends = offset + np.cumsum(lengths * shard.dtype.itemsize)
        starts = np.concatenate(([offset], ends[:-1]))
        negative.add(first, lengths < 0)
        wrong.add(first, shard.offsets[first : first + _ENTRIES] != starts)
        offset = int(ends[-1])
    if negative:
        yield f"{shard.prefix}.idx is damaged: sequence {negative} has a negative length; copy the data again"
    if wrong:
        yield f"{shard.prefix}.idx is damaged: the offset of sequence {wrong} is wrong; copy the data again"


def _document_faults(shard: TokenShard) -> Iterator[str]:
    with open(f"{shard.prefix}.idx", "rb") as file:
        *_, entries = HEADER.unpack(file.read(HEADER.size))
    # As it is in the file: the opened shard drops an index that has one entry per sequence (and the last one).
    stored = np.memmap(file.name, "<i8", "r", offset=HEADER.size + 12 * shard.num_sequences, shape=(entries,))
    one_each = len(stored) == shard.num_sequences + 1
    wrong = _Faults()
    for first in range(0, len(stored), _ENTRIES):
        starts = stored[first : first + _ENTRIES + 1]
        if one_each:
            wrong.add(first, starts[:_ENTRIES] != np.arange(first, first + len(starts[:_ENTRIES])))
        else:
            wrong.add(first + 1, np.diff(starts) < 0)
    if wrong:
        yield (
            f"{shard.prefix}.idx is damaged: documents are not in order in its document index at entry {wrong}; copy "
            "the data again"
        )


class _Faults:
    """Counts faulty entries and remembers the index of the first; true if there are any."""

    def __init__(self) -> None:
        self.first = 0
        self._count = 0

    def add(self, start: int, faulty: NDArray[np.bool_]) -> None:
        """Add the entries, numbered from `start` on, at which `faulty` is true."""
        if not self._count and faulty.any():
            self.first = start + int(faulty.argmax())
        self._count += int(faulty.sum())

    def __bool__(self) -> bool:
        return self._count > 0

    def __str__(self) -> str:
        return f"{self.first}" + (f" (and {self._count - 1} others)" if self._count > 1 else "")
