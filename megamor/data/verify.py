"""Is a shard still what was written? Reads all of it, which opening a shard doesn't."""

from __future__ import annotations

import numpy as np

from megamor.data.indexed import TokenShard
from megamor.data.meta import BlockHasher, ShardMeta, sha256_of_file
from megamor.errors import DataError

_CHUNK = 2**22


def verify_index(shard: TokenShard, meta: ShardMeta | None) -> None:
    """Check the whole `.idx`: lengths, running sum of offsets, order of documents, and its hash and counts in the meta.

    Raises DataError naming the file and what is wrong.
    """
    path = f"{shard.prefix}.idx"
    offset = 0
    for first in range(0, shard.num_sequences, _CHUNK):
        lengths = shard.lengths[first : first + _CHUNK].astype(np.int64)
        if (lengths < 0).any():
            raise DataError(f"{path} is damaged: sequence {first + int((lengths < 0).argmax())} has a negative length")
        ends = offset + np.cumsum(lengths * shard.dtype.itemsize)
        expected = np.concatenate(([offset], ends[:-1]))
        wrong = shard.offsets[first : first + _CHUNK] != expected
        if wrong.any():
            raise DataError(f"{path} is damaged: the offset of sequence {first + int(wrong.argmax())} is not its place")
        offset = int(ends[-1])
    if shard.document_index is not None and (np.diff(shard.document_index) < 0).any():
        raise DataError(f"{path} is damaged: documents don't follow each other in its document index")
    if meta is None:
        return
    found = (shard.num_documents, shard.num_tokens, shard.dtype.name)
    if found != (meta.documents, meta.tokens, meta.dtype):
        raise DataError(
            f"{path} has {found[0]} documents, {found[1]} tokens of {found[2]}, but {shard.prefix}.meta.json says "
            f"{meta.documents}, {meta.tokens} of {meta.dtype}; they don't belong together: copy the data again"
        )
    if sha256_of_file(path) != meta.idx_sha256:
        raise DataError(
            f"{path} is not the file that {shard.prefix}.meta.json describes (SHA-256); copy the data again"
        )


def verify_tokens(shard: TokenShard, meta: ShardMeta | None) -> None:
    """Check the whole `.bin`: hashes of its blocks, and that all ids are in the vocabulary, as far as the meta knows.

    Raises DataError naming the file and the place.
    """
    path = f"{shard.prefix}.bin"
    hasher = BlockHasher(meta.bin_block_bytes) if meta else None
    for first in range(0, shard.num_tokens, _CHUNK):
        tokens = shard.tokens[first : first + _CHUNK]
        if hasher:
            hasher.update(tokens.view(np.uint8).data)
        low, high = int(tokens.min()), int(tokens.max())
        limit = meta.vocab_size if meta and meta.vocab_size else None
        if low < 0 or (limit is not None and high >= limit):
            raise DataError(
                f"{path} is damaged: token id {low if low < 0 else high} among tokens {first} to "
                f"{first + len(tokens) - 1} is outside the vocabulary{f' of {limit}' if limit else ''}"
            )
    if hasher is None or meta is None:
        return
    digests = hasher.digests()
    for number, (found, expected) in enumerate(zip(digests, meta.bin_block_sha256, strict=False)):
        if found != expected:
            start = number * meta.bin_block_bytes
            end = min(start + meta.bin_block_bytes, shard.tokens.nbytes)
            raise DataError(
                f"{path} is damaged: bytes {start} to {end - 1} are not those that were "
                f"written (SHA-256 in {shard.prefix}.meta.json); copy or preprocess the data again"
            )
    if len(digests) != len(meta.bin_block_sha256):
        raise DataError(f"{path} has {len(digests)} blocks, {shard.prefix}.meta.json {len(meta.bin_block_sha256)}")
