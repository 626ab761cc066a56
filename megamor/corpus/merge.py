"""Merging shards into one: streams are joined, offsets recomputed, side files merged. Memory stays constant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamor.corpus.array import require_complete
from megamor.corpus.verify import block_faults, verify_index
from megamor.corpus.writer import ShardWriter
from megamor.data.meta import BlockHasher, ShardMeta, meta_path, read_meta
from megamor.data.shard import HEADER, TokenShard, read_blocks
from megamor.errors import DataError

# Fields that describe a shard itself. All others describe how it was made, which must be the same for all shards.
_OWN_FIELDS = {"sources", "dtype", "documents", "tokens"}
_OWN_FIELDS |= {"idx_sha256", "bin_block_bytes", "bin_block_sha256", "loss_mask_sha256"}
# The name of the tokenizer's file doesn't matter: its hash must be the same.
_IGNORED_FIELDS = {"tokenizer_name"}
_ENTRIES = 2**20


def merge_shards(
    prefixes: Sequence[str],
    output_prefix: str,
    *,
    assume_same_tokenizer: bool = False,
    advance: Callable[[int], None] = lambda size: None,
) -> TokenShard:
    """Write the documents of `prefixes`, in that order, as one data set that appears only when complete.

    If any of them has a loss mask, so has the result, in which all tokens of those without one count.

    With `assume_same_tokenizer`, foreign pairs, which have no side file, may be joined to pairs that have one.
    `advance` is called with the bytes of tokens just copied. Raises DataError if a shard is damaged (even if only found
    while copying; nothing is left then), if one of a set is missing, or if they weren't made in the same way.
    """
    require_complete(prefixes)
    _require_distinct(prefixes, output_prefix)
    shards = [TokenShard.open(prefix) for prefix in prefixes]
    metas = [read_meta(prefix) for prefix in prefixes]
    meta = merge_metas(shards, metas, assume_same_tokenizer=assume_same_tokenizer)
    for shard, own in zip(shards, metas, strict=True):
        _require_mergeable(shard, shards[0])
        # The index is checked before anything is written; the tokens, whose hashes need a pass, while they are copied.
        verify_index(shard, own)
    masked = any(shard.loss_mask is not None for shard in shards)
    with ShardWriter(output_prefix, shards[0].dtype, loss_mask=masked) as writer:
        for shard, own in zip(shards, metas, strict=True):
            _append(writer, shard, own, advance)
        writer.commit(meta, _document_starts(shards))
    return TokenShard.open(output_prefix)


def merge_metas(
    shards: Sequence[TokenShard], metas: Sequence[ShardMeta | None], *, assume_same_tokenizer: bool
) -> ShardMeta:
    """The side file of the merged data, except counts and hashes. Counts of sources with the same name are added up;
    a source is marked as `scattered` if its tokens are not where its place in the list says.

    Raises DataError naming two shards that were not made in the same way, such as with different tokenizers.
    """
    known = [(shard, meta) for shard, meta in zip(shards, metas, strict=True) if meta]
    foreign = [shard for shard, meta in zip(shards, metas, strict=True) if not meta]
    if known and foreign and not assume_same_tokenizer:
        raise DataError(
            f"{foreign[0].prefix} has no side file, {known[0][0].prefix} has one, so whether one tokenizer wrote both "
            "can't be checked; if it did, give --assume-same-tokenizer"
        )
    merged = known[0][1] if known else ShardMeta()
    for shard, meta in known[1:]:
        for name in (f.name for f in fields(ShardMeta) if f.name not in _OWN_FIELDS | _IGNORED_FIELDS):
            ours, theirs = getattr(merged, name), getattr(meta, name)
            if ours != theirs:
                raise DataError(
                    f"{meta_path(known[0][0].prefix)} and {meta_path(shard.prefix)} differ in {name} ({ours!r} and "
                    f"{theirs!r}): such shards can't be merged; preprocess one of them again with the other's settings"
                )
    sources: dict[str, dict[str, Any]] = {}
    order: dict[str, int] = {}
    latest = 0  # the last source, in that order, that has tokens so far
    for shard, own in zip(shards, metas, strict=True):
        whole = dict[str, Any](name=Path(shard.prefix).name, documents=shard.num_documents, tokens=shard.num_tokens)
        for source in own.sources if own else [whole]:
            total = sources.setdefault(source["name"], {**source, "documents": 0, "tokens": 0})
            index = order.setdefault(source["name"], len(order))
            if source.get("tokens"):
                latest = max(latest, index)
                if index < latest:
                    total["scattered"] = True
            for count in ("documents", "tokens"):
                total[count] += source.get(count, 0)
    return replace(merged, sources=list(sources.values()))


def _require_distinct(prefixes: Sequence[str], output_prefix: str) -> None:
    if not prefixes:
        raise DataError("there is nothing to merge; name at least one shard")
    seen: dict[str, str] = {}
    for prefix in prefixes:
        real = os.path.realpath(f"{prefix}.idx")
        if real in seen:
            raise DataError(f"{seen[real]} and {prefix} are the same shard; name it once")
        seen[real] = prefix
    if os.path.realpath(f"{output_prefix}.idx") in seen:
        raise DataError(f"{output_prefix} is one of the shards to merge; choose another --output-prefix")


def _require_mergeable(shard: TokenShard, first: TokenShard) -> None:
    if shard.dtype != first.dtype:
        raise DataError(
            f"{first.prefix}.bin holds {first.dtype.name} and {shard.prefix}.bin {shard.dtype.name}: they can't be "
            "merged; preprocess one of them again"
        )
    with open(f"{shard.prefix}.idx", "rb") as file:
        *_, entries = HEADER.unpack(file.read(HEADER.size))
        if file.seek(0, os.SEEK_END) != HEADER.size + 12 * shard.num_sequences + 8 * entries:
            raise DataError(f"{shard.prefix}.idx has a mode for each sequence (multimodal data), which can't be merged")


def _append(writer: ShardWriter, shard: TokenShard, meta: ShardMeta | None, advance: Callable[[int], None]) -> None:
    """Copy lengths and tokens. Raises DataError if the tokens don't have the hashes of the side file."""
    # Offsets aren't copied: `finish` computes them anew from the lengths.
    for lengths in read_blocks(f"{shard.prefix}.idx", "<i4", shard.num_sequences, HEADER.size):
        writer.add_lengths(lengths)
    hasher, before = BlockHasher(meta.bin_block_bytes) if meta else None, writer.num_tokens
    for tokens in read_blocks(f"{shard.prefix}.bin", shard.dtype, shard.num_tokens):
        done = writer.num_tokens - before
        writer.add_tokens(tokens, None if shard.loss_mask is None else shard.loss_mask[done : done + len(tokens)])
        if hasher:
            hasher.update(tokens.view(np.uint8).data)
        advance(tokens.nbytes)
    for fault in block_faults(shard, meta, hasher) if meta and hasher else ():
        raise DataError(fault)


def _document_starts(shards: Sequence[TokenShard]) -> Iterator[NDArray[np.int64]]:
    """The document index of all shards together, in arrays."""
    before = 0
    for shard in shards:
        for first in range(0, shard.num_documents, _ENTRIES):
            end = min(first + _ENTRIES, shard.num_documents)
            own = shard.document_index
            yield before + (np.arange(first, end) if own is None else own[first:end])
        before += shard.num_sequences
    yield np.array([before])
