"""A data set as an endless shuffled stream of pairs, an input token and the token that follows it, cut into samples.

The stream is made of *chunks* of `chunk_len` pairs, shuffled anew in each epoch. A sample of `seq_len` pairs is what
stands at its place in that stream, whatever the sequence length, so a position counted in tokens is the whole state of
a source: the sequence length may change anywhere without a pair that is lost or seen twice. With `seq_len` equal to
`chunk_len`, or a divisor of it, a sample is a run of neighbours; else it may be joined from pieces of several chunks.

What a chunk is depends on the packing: a stretch of the data set as it lies on disk, or a bin filled with documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megamor.data.order import shuffled_in_blocks, shuffled_windows
from megamor.data.packing import Packing, best_fit, count_bins, ranges
from megamor.data.shard import TokenShard

DOCUMENTS_PER_BLOCK = 2**19
"""Documents that are packed together. More would hardly save padding; a plan takes about 12 MB and a tenth of a second,
and the first pass over all lengths takes longer the more blocks there are."""
_PLANS_KEPT = 2


@dataclass(frozen=True)
class Pieces:
    """Runs of neighbouring pairs: `lengths[i]` pairs from token `starts[i]` of the shard on go to `places[i]` and on.

    Places count through the rows of a batch one after the other; they ascend.
    """

    places: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class _Parts:
    """Samples cut where chunks meet: `lengths[i]` pairs from `offsets[i]` of the chunk whose turn is `turns[i]`."""

    places: NDArray[np.int64]
    turns: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]


class Source(ABC):
    """A shard whose chunks of `chunk_len` pairs are read in shuffled order.

    `inside_documents`: no piece reaches from one document into another.
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

    def pieces(self, positions: NDArray[np.int64], places: NDArray[np.int64], seq_len: int, seed: int) -> Pieces:
        """Samples that begin at `positions` [n] of the stream, to be written to `places` [n] and on."""
        return self._find(_parts(positions, places, seq_len, self.chunk_len), seed)

    @abstractmethod
    def _find(self, parts: _Parts, seed: int) -> Pieces:
        """Where the parts lie in the shard."""


def _parts(positions: NDArray[np.int64], places: NDArray[np.int64], seq_len: int, chunk_len: int) -> _Parts:
    first, last = positions // chunk_len, (positions + seq_len - 1) // chunk_len
    turns, within = ranges(first, last - first + 1)
    sample = np.repeat(np.arange(len(positions)), last - first + 1)
    begins = np.where(within == 0, positions[sample], turns * chunk_len)
    ends = np.minimum((turns + 1) * chunk_len, positions[sample] + seq_len)
    return _Parts(places[sample] + begins - positions[sample], turns, begins - turns * chunk_len, ends - begins)


class StreamSource(Source):
    """Documents one after the other, as they lie on disk; chunk i is the pairs from token i * chunk_len on.

    Every token but the first is a label exactly once an epoch. The tail that doesn't fill a chunk is left out.
    """

    inside_documents = False

    @property
    def num_chunks(self) -> int:
        return max(0, (self.shard.num_tokens - 1) // self.chunk_len)

    def _find(self, parts: _Parts, seed: int) -> Pieces:
        chunks = shuffled_windows(parts.turns, self.num_chunks, seed)
        return Pieces(parts.places, chunks * self.chunk_len + parts.offsets, parts.lengths)


@dataclass(frozen=True)
class _Plan:
    """The bins of one block of documents: `packing` of pieces, listed in its order.

    Pieces begin at `starts` [n] of the shard, at `columns` [n] of their bin, and have `lengths` [n] pairs.
    """

    bounds: NDArray[np.int64]
    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    lengths: NDArray[np.int32]


class PackedSource(Source):
    """Chunks are bins of whole documents, padded at the end; only documents longer than a chunk are cut.

    A document of n tokens has n - 1 pairs; it is cut into as many full chunks as it fills, and a rest. With `join` the
    rests are packed by best fit, else each has a chunk of its own. Packing is done block by block: document d is in
    block d modulo the number of blocks, so that every block is a fair sample of the data set. The number of bins in
    each is found by a pass over the lengths of all documents when it is first needed; which document is in which bin
    of a block, when the block is read.
    """

    inside_documents = True

    def __init__(self, shard: TokenShard, chunk_len: int, *, join: bool) -> None:
        super().__init__(shard, chunk_len)
        self._join = join
        self._num_blocks = -(-shard.num_documents // DOCUMENTS_PER_BLOCK)
        self._plans: OrderedDict[int, _Plan] = OrderedDict()

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
            bins.append(int(full.sum()) + (count_bins(counts) if self._join else int(counts[1:].sum())))
            total += int(pairs.sum())
        return np.array(bins, np.int64), total

    def _pairs_of(self, block: int) -> NDArray[np.int64]:
        """Number of pairs of each document of a block."""
        lengths = self.shard.lengths_of(slice(block, None, self._num_blocks))
        return np.maximum(lengths - 1, 0)

    def _plan(self, block: int) -> _Plan:
        if block in self._plans:
            self._plans.move_to_end(block)
        else:
            self._plans[block] = self._make_plan(block)
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        return self._plans[block]

    def _make_plan(self, block: int) -> _Plan:
        pairs = self._pairs_of(block)
        starts = self.shard.starts_of(np.arange(block, self.shard.num_documents, self._num_blocks))
        num_cuts = -(-pairs // self.chunk_len)
        document = np.repeat(np.arange(len(pairs)), num_cuts)
        number, _ = ranges(np.zeros_like(pairs), num_cuts)
        lengths = np.minimum(pairs[document] - number * self.chunk_len, self.chunk_len)
        if self._join:
            packing = best_fit(lengths, self.chunk_len)
        else:
            packing = Packing(np.arange(len(lengths)), np.arange(len(lengths) + 1))
        items, bounds = packing.items, packing.bounds
        before = np.cumsum(lengths[items]) - lengths[items]
        columns = before - np.repeat(before[bounds[:-1]], np.diff(bounds))
        starts = (starts[document] + number * self.chunk_len)[items]
        return _Plan(bounds, starts, columns.astype(np.int32), lengths[items].astype(np.int32))

    def _find(self, parts: _Parts, seed: int) -> Pieces:
        blocks, bins = shuffled_in_blocks(parts.turns, self._bins_and_pairs[0], seed)
        found = []
        for block in np.unique(blocks):
            plan, of_block = self._plan(int(block)), np.flatnonzero(blocks == block)
            first, end = plan.bounds[bins[of_block]], plan.bounds[bins[of_block] + 1]
            counts = end - first
            pieces, _ = ranges(first, counts)
            part = np.repeat(of_block, counts)
            columns, begins = plan.columns[pieces], parts.offsets[part]
            shown = np.maximum(columns, begins)
            lengths = np.minimum(columns + plan.lengths[pieces], begins + parts.lengths[part]) - shown
            found.append((parts.places[part] + shown - begins, plan.starts[pieces] + shown - columns, lengths))
        places, starts, lengths = map(np.concatenate, zip(*found, strict=True))
        order = np.argsort(places)
        order = order[lengths[order] > 0]
        return Pieces(places[order], starts[order], lengths[order])
