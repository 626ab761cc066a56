"""A data set as an endless shuffled stream of pairs, an input token and the token that follows it, cut into samples.

The stream consists of *chunks* of `chunk_len` pairs, shuffled anew in each epoch. A sample of `seq_len` pairs is the
next `seq_len` pairs of that stream. A position counted in tokens is therefore the whole state of a source, and the
sequence length may change anywhere without losing or repeating a pair. If `seq_len` equals `chunk_len` or divides it, a
sample is one run of neighbours on disk; otherwise it may be joined from several chunks.

What a chunk is depends on the packing: a range of the data set as it is on disk, or a bin filled with documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from megamor.data.order import shuffled_in_blocks, shuffled_windows
from megamor.data.packing import best_fit, count_bins, ranges
from megamor.data.shard import TokenShard

DOCUMENTS_PER_BLOCK = 2**19
"""Documents that are packed together. More would hardly save padding. A packed block takes about 12 MB and a tenth of a
second to compute, and the more blocks there are, the longer the first pass over all lengths takes."""


@dataclass(frozen=True)
class Spans:
    """What to copy: `lengths[i]` pairs that start at token `starts[i]` of the shard, to slot `slots[i]` and following.

    Slots number the positions of a batch row after row; `slots` ascends.
    """

    slots: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Slot, start and length of each."""
        # Plain integers: slicing with NumPy scalars would take most of the time of short spans.
        return zip(self.slots.tolist(), self.starts.tolist(), self.lengths.tolist(), strict=True)


@dataclass(frozen=True)
class _ChunkSpans:
    """Samples cut at chunk boundaries: `lengths[i]` pairs from `offsets[i]` of the chunk at `positions[i]`.

    `positions` count chunks in the shuffled order; which chunk that is, only the source knows.
    """

    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]


class Source(ABC):
    """A shard whose chunks of `chunk_len` pairs are read in shuffled order.

    `inside_documents`: no span crosses from one document into the next.
    """

    inside_documents: bool

    def __init__(self, shard: TokenShard, chunk_len: int) -> None:
        self.shard = shard
        self.chunk_len = chunk_len

    @property
    @abstractmethod
    def num_chunks(self) -> int:
        """Chunks in an epoch."""

    @property
    def num_pairs(self) -> int:
        """Pairs in an epoch, padding not counted."""
        return self.num_chunks * self.chunk_len

    @property
    def epoch_tokens(self) -> int:
        """Length of an epoch in the stream, padding included."""
        return self.num_chunks * self.chunk_len

    def spans(self, positions: NDArray[np.int64], slots: NDArray[np.int64], seq_len: int, seed: int) -> Spans:
        """Samples of `seq_len` pairs that begin at `positions` [n] of the stream, to be written from `slots` [n] on."""
        return self._find(_cut_at_chunks(positions, slots, seq_len, self.chunk_len), seed)

    @abstractmethod
    def _find(self, wanted: _ChunkSpans, seed: int) -> Spans:
        """Where `wanted` is in the shard."""


def _cut_at_chunks(positions: NDArray[np.int64], slots: NDArray[np.int64], seq_len: int, chunk_len: int) -> _ChunkSpans:
    first, last = positions // chunk_len, (positions + seq_len - 1) // chunk_len
    chunks, within = ranges(first, last - first + 1)
    sample = np.repeat(np.arange(len(positions)), last - first + 1)
    # The first span of a sample starts where the sample does, the others at the start of their chunk.
    begins = np.where(within == 0, positions[sample], chunks * chunk_len)
    ends = np.minimum((chunks + 1) * chunk_len, positions[sample] + seq_len)
    return _ChunkSpans(slots[sample] + begins - positions[sample], chunks, begins - chunks * chunk_len, ends - begins)


class StreamSource(Source):
    """Documents one after the other as they are on disk; chunk i is the pairs from token i * chunk_len on.

    Every token but the first is a label exactly once per epoch. A tail that doesn't fill a chunk is left out.
    """

    inside_documents = False

    @property
    def num_chunks(self) -> int:
        return max(0, (self.shard.num_tokens - 1) // self.chunk_len)

    def _find(self, wanted: _ChunkSpans, seed: int) -> Spans:
        chunks = shuffled_windows(wanted.positions, self.num_chunks, seed)
        return Spans(wanted.slots, chunks * self.chunk_len + wanted.offsets, wanted.lengths)


@dataclass(frozen=True)
class _PackedBlock:
    """The bins of one block of documents. Items are documents or parts of long ones, listed bin by bin.

    `bounds` [bins + 1] are the item numbers at which the bins begin. Item i starts at token `starts[i]` of the shard,
    at column `columns[i]` of its bin, and has `lengths[i]` pairs.
    """

    bounds: NDArray[np.int64]
    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    lengths: NDArray[np.int32]


class PackedSource(Source):
    """Chunks are bins of whole documents, padded at the end; only documents longer than a chunk are cut.

    A document of n tokens has n - 1 pairs. It is cut into as many full chunks as it fills, and a rest. With `join` the
    rests are packed by best fit, otherwise each has a chunk of its own. Packing works block by block: document d is in
    block d modulo the number of blocks, so every block is a fair sample of the data set. The number of bins of all
    blocks is found by a pass over the lengths of all documents when it is first needed; the contents of a block's bins
    are computed when the block is read.
    """

    inside_documents = True

    def __init__(self, shard: TokenShard, chunk_len: int, *, join: bool) -> None:
        super().__init__(shard, chunk_len)
        self._join = join
        self._num_blocks = -(-shard.num_documents // DOCUMENTS_PER_BLOCK)
        # A batch may contain the end of one block and the beginning of the next.
        self._block = lru_cache(maxsize=2)(self._pack)

    @property
    def num_chunks(self) -> int:
        return int(self._bins_and_pairs[0].sum())

    @property
    def num_pairs(self) -> int:
        return self._bins_and_pairs[1]

    @cached_property
    def _bins_and_pairs(self) -> tuple[NDArray[np.int64], int]:
        """Bins of each block [blocks], and all pairs."""
        bins, total = [], 0
        for block in range(self._num_blocks):
            pairs = self._pairs_of(block)
            full, rests = np.divmod(pairs, self.chunk_len)
            counts = np.bincount(rests, minlength=self.chunk_len + 1)
            # Every full chunk of a long document is a bin of its own, so only the rests need packing.
            bins.append(int(full.sum()) + (count_bins(counts) if self._join else int(counts[1:].sum())))
            total += int(pairs.sum())
        return np.array(bins, np.int64), total

    def _pairs_of(self, block: int) -> NDArray[np.int64]:
        """Number of pairs of each document of a block."""
        lengths = self.shard.lengths_of(slice(block, None, self._num_blocks))
        return np.maximum(lengths - 1, 0)

    def _pack(self, block: int) -> _PackedBlock:
        pairs = self._pairs_of(block)
        starts = self.shard.starts_of(np.arange(block, self.shard.num_documents, self._num_blocks))
        # Items first: a document of up to one chunk is one, a longer one is cut into several.
        num_items = -(-pairs // self.chunk_len)
        document = np.repeat(np.arange(len(pairs)), num_items)
        number, _ = ranges(np.zeros_like(pairs), num_items)
        lengths = np.minimum(pairs[document] - number * self.chunk_len, self.chunk_len)
        if self._join:
            items, bounds = best_fit(lengths, self.chunk_len)
        else:
            items, bounds = np.arange(len(lengths)), np.arange(len(lengths) + 1)
        # Then the column of each item: pairs before it in the list, less those before its bin.
        before = np.cumsum(lengths[items]) - lengths[items]
        columns = before - np.repeat(before[bounds[:-1]], np.diff(bounds))
        starts = (starts[document] + number * self.chunk_len)[items]
        return _PackedBlock(bounds, starts, columns.astype(np.int32), lengths[items].astype(np.int32))

    def _find(self, wanted: _ChunkSpans, seed: int) -> Spans:
        blocks, bins = shuffled_in_blocks(wanted.positions, self._bins_and_pairs[0], seed)
        found = []
        for block in np.unique(blocks):
            packed, of_block = self._block(int(block)), np.flatnonzero(blocks == block)
            first, end = packed.bounds[bins[of_block]], packed.bounds[bins[of_block] + 1]
            items, _ = ranges(first, end - first)
            owner = np.repeat(of_block, end - first)
            # Columns of the bin that were asked for, cut to what each item covers; items outside get length <= 0.
            columns, begins = packed.columns[items], wanted.offsets[owner]
            visible = np.maximum(columns, begins)
            lengths = np.minimum(columns + packed.lengths[items], begins + wanted.lengths[owner]) - visible
            found.append((wanted.slots[owner] + visible - begins, packed.starts[items] + visible - columns, lengths))
        # Found block by block; callers rely on ascending slots.
        slots, starts, lengths = map(np.concatenate, zip(*found, strict=True))
        order = np.argsort(slots)
        order = order[lengths[order] > 0]
        return Spans(slots[order], starts[order], lengths[order])
