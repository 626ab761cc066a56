"""Where the rows of a batch are in their sequences and documents, and the attention layouts that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import ModelConfig
from megamor.model.attention import AttentionLayout, Grid, Segments, has_packed_kernel, visibility_mask
from megamor.model.blocks import RotaryAngles, rotary_angles
from megamor.model.buckets import Buckets
from megamor.routing import TokenSet

BEYOND = torch.iinfo(torch.int64).max
"""Order of an empty key slot: after every query."""

ROWS_PER_CHUNK, MAX_CHUNKS, KEY_MULTIPLE = 64, 8, 16
"""Fewest queries per chunk, most chunks, and the multiple to which a chunk's number of keys is rounded up."""


@dataclass(frozen=True)
class Geometry:
    """Where the T rows of a stream are; its sequences begin at position `start` (earlier tokens are in a cache).

    `everything` are all tokens, and `window` lays them out as the [B, S] of the input. `order` [T] are their
    positions in their sequences, `positions` [T] those that RoPE encodes, `angles` their cosines and sines.
    `documents` [T] are ids that attention must not cross, and `begins` [T] the row at which each token's document
    begins. `dtype` is the type that attention computes in. Where attention can run packed (by a kernel, or
    `bucketed` on a CPU), `bounds` [segments + 1] are the rows at which the documents begin (without any, the
    sequences), and the end.
    """

    everything: TokenSet
    window: Grid
    order: Tensor
    positions: Tensor
    angles: RotaryAngles
    documents: Tensor | None = None
    begins: Tensor | None = None
    start: int = 0
    dtype: torch.dtype = torch.float32
    bounds: Tensor | None = None
    bucketed: bool = False

    @staticmethod
    def of(
        tokens: Tensor,
        config: ModelConfig,
        dtype: torch.dtype,
        documents: Tensor | None = None,
        start: int = 0,
        lengths: tuple[int, ...] | None = None,
    ) -> Geometry:
        """Geometry of token ids [B, S]; positions count from `start`, or restart in each document if configured.

        `documents` [B, S] are ids, equal ones adjacent. Sequence b has `lengths[b]` tokens; what follows them is
        padding. `dtype` is that of the weights; autocast may lower what attention computes in.
        """
        (batch, seq_len), device = tokens.shape, tokens.device
        everything = TokenSet.all(batch, seq_len, lengths, device)
        order = everything.rank_of(everything, device)
        cells = None if lengths is None else everything.sequences(device) * seq_len + order
        window = Grid(batch, seq_len, cells)
        documents = None if documents is None else window.unpad(documents)
        begins = None if documents is None else document_begins(documents, order)
        if start:
            order = order + start
        positions = order
        if begins is not None and config.document_positions == "restart":
            positions = everything.rows(device) - begins
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, dtype)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        bounds, kernel = None, has_packed_kernel(device, dtype, config.head_dim)
        bucketed = not kernel and device.type == "cpu"
        if kernel or bucketed:
            bounds = everything.bounds(device) if begins is None else segment_bounds(begins)
        return Geometry(everything, window, order, positions, angles, documents, begins, start, dtype, bounds, bucketed)

    def angles_of(self, tokens: TokenSet) -> RotaryAngles:
        """RoPE angles of the original positions of `tokens`."""
        return self.angles.select(tokens.index)

    def order_of(self, tokens: TokenSet) -> Tensor:
        """Positions [N] of `tokens` in their sequences; unlike `positions`, they never restart."""
        return tokens.gather(self.order)

    def layout(self, queries: TokenSet, keys: TokenSet) -> AttentionLayout:
        """Causal attention of `queries` to `keys`, inside documents."""
        uneven = queries.lengths is not None or self.documents is not None
        if queries is keys and uneven and self.bounds is not None:
            return AttentionLayout(Grid(1, len(queries)), None, segments=self.segments(queries, self.bounds))
        query_grid, key_grid = Grid.of(queries), Grid.of(keys)
        if queries is keys and self.documents is None:
            # Padding sits at the end of each sequence, where a causal kernel shows it to padded queries alone.
            return AttentionLayout(query_grid, key_grid)
        query_order, query_document = self._order_and_document(queries, query_grid, -1)
        key_order, key_document = self._order_and_document(keys, key_grid, BEYOND)
        mask = visibility_mask(query_order, key_order, query_document, key_document, self.dtype)
        chunkable = keys.index is None and (queries.lengths is None or query_order.device.type == "cpu")
        chunks = self.query_chunks(query_order) if chunkable else ()
        return AttentionLayout(query_grid, key_grid, mask, chunks)

    def query_chunks(self, query_order: Tensor) -> tuple[tuple[int, int, int], ...]:
        """Ranges of queries, and how many of all keys each range needs; `query_order` [batch, K] is ascending up to
        padding."""
        # Early queries see few keys. SDPA computes all scores under a mask, so giving each chunk only the keys that it
        # can see skips up to half of them. Chunks of too few rows would cost more in kernel launches than they save.
        length = query_order.shape[1]
        count = max(1, min(MAX_CHUNKS, length // ROWS_PER_CHUNK))
        ends = [length * number // count for number in range(count + 1)]
        if query_order.device.type == "cpu":
            last = query_order.amax(0).cummax(0).values[[end - 1 for end in ends[1:]]] - self.start + 1
            most = self.everything.max_length
            needed = [min(most, -(-keys // KEY_MULTIPLE) * KEY_MULTIPLE) for keys in last.tolist()]
        else:
            # Reading positions would make the host wait for the device. Without reading: the j-th of K tokens
            # selected from S is at position S - K + j at most, because K - j more must follow it.
            needed = [self.everything.max_length - length + end for end in ends[1:]]
        return tuple(zip(ends[:-1], ends[1:], needed, strict=True))

    def segments(self, tokens: TokenSet, bounds: Tensor) -> Segments:
        """The segments among the rows of `tokens`, some perhaps empty; `bounds` are those of the whole stream."""
        if tokens.index is not None:
            bounds = torch.searchsorted(tokens.index, bounds)
        if self.bucketed:
            return Segments(bounds, tokens.max_length, Buckets.of(bounds))
        # A ragged set's own maximum changes from step to step, and would recompile whatever depends on it.
        longest = tokens.max_length if tokens.lengths is None else self.window.length
        return Segments(bounds.int(), longest)

    def visible_pairs(self, queries: TokenSet, keys: TokenSet) -> Tensor:
        """Pairs (query, key) that attention cannot skip, from which its FLOPs are counted.

        The key is not after the query and, where documents are kept apart, in its document. `queries` are among `keys`.
        A scalar in fp32 on the device; the host does not wait for it.
        """
        device = self.positions.device
        if self.begins is not None:
            # Keys from the row at which a query's document begins to the query itself, summed over the queries.
            rows, first = queries.rows(device), queries.gather(self.begins)
            if keys.index is None:
                return (rows - first + 1).sum().float()
            ends = torch.searchsorted(keys.index, rows, right=True)
            return (ends - torch.searchsorted(keys.index, first)).sum().float()
        if keys is not queries:
            return (keys.rank_of(queries, device) + 1).sum().float()
        if queries.lengths is None:
            total = queries.batch * queries.max_length * (queries.max_length + 1) / 2
            return torch.full((), total, device=device)
        lengths = queries.lengths.float()
        return (lengths * (lengths + 1) / 2).sum()

    def _order_and_document(self, tokens: TokenSet, grid: Grid, fill: int) -> tuple[Tensor, Tensor | None]:
        """Order and document of each cell of `grid`, [batch, length]; `fill` marks padding."""
        order = grid.pad(self.order_of(tokens), fill)
        if self.documents is None:
            return order, None
        return order, grid.pad(tokens.gather(self.documents), fill)


def document_begins(documents: Tensor, order: Tensor) -> Tensor:
    """The row at which each token's document begins, [T].

    `documents` [T] are ids, equal ones adjacent; `order` [T] are the tokens' positions in their sequences.
    """
    first = order == 0
    first[1:] |= documents[1:] != documents[:-1]
    rows = torch.arange(len(documents), device=documents.device)
    return rows.masked_fill(~first, 0).cummax(dim=0).values


def segment_bounds(begins: Tensor) -> Tensor:
    """Rows at which documents begin, and the end; `begins` [T] is that row for each token."""
    # Only the device knows how many documents there are. `unique_consecutive` waits for that number: the one wait in a
    # forward pass with documents.
    starts: Tensor = begins.unique_consecutive()  # type: ignore[no-untyped-call]
    return F.pad(starts, (0, 1), value=len(begins))
