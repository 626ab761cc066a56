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
    """A [batch, seq_len] stream whose sequences begin at position `start` (earlier tokens are in a cache).

    `positions` [B·S] are the positions that RoPE encodes, `angles` their cosines and sines, for all B·S rows.
    `documents` [B·S] are ids that attention must not cross. `dtype` is the type that attention computes in. Where
    attention can run packed (by a kernel, or `bucketed` on a CPU), `bounds` [segments + 1] are the rows at which the
    documents begin (without any, the sequences), and the end.
    """

    batch: int
    seq_len: int
    positions: Tensor
    angles: RotaryAngles
    documents: Tensor | None = None
    start: int = 0
    dtype: torch.dtype = torch.float32
    bounds: Tensor | None = None
    bucketed: bool = False

    @staticmethod
    def of(
        tokens: Tensor, config: ModelConfig, dtype: torch.dtype, documents: Tensor | None = None, start: int = 0
    ) -> Geometry:
        """Geometry of token ids [B, S]; positions count from `start`, or restart in each document if configured.

        `dtype` is that of the weights; autocast may lower what attention computes in.
        """
        batch, seq_len = tokens.shape
        positions = torch.arange(start, start + seq_len, device=tokens.device).expand(batch, seq_len)
        if documents is not None and config.document_positions == "restart":
            positions = positions - document_starts(documents)
        positions = positions.flatten()
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, dtype)
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
        bounds, kernel = None, has_packed_kernel(tokens.device, dtype, config.head_dim)
        bucketed = not kernel and tokens.device.type == "cpu"
        if kernel or bucketed:
            bounds = segment_bounds(documents, batch, seq_len, tokens.device)
        documents = None if documents is None else documents.flatten()
        return Geometry(batch, seq_len, positions, angles, documents, start, dtype, bounds, bucketed)

    def angles_of(self, tokens: TokenSet) -> RotaryAngles:
        """RoPE angles of the original positions of `tokens`."""
        return self.angles.select(tokens.index)

    def order_of(self, tokens: TokenSet) -> Tensor:
        """Positions [N] of `tokens` in their sequences; unlike `positions`, they never restart."""
        return tokens.rows(self.angles.cos.device) % self.seq_len + self.start

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
        chunks = self.query_chunks(query_order) if queries.lengths is None and keys.index is None else ()
        return AttentionLayout(query_grid, key_grid, mask, chunks)

    def query_chunks(self, query_order: Tensor) -> tuple[tuple[int, int, int], ...]:
        """Ranges of queries, and how many of all keys each range needs; `query_order` [batch, K] is ascending."""
        # Early queries see few keys. SDPA computes all scores under a mask, so giving each chunk only the keys that it
        # can see skips up to half of them. Chunks of too few rows would cost more in kernel launches than they save.
        length = query_order.shape[1]
        count = max(1, min(MAX_CHUNKS, length // ROWS_PER_CHUNK))
        ends = [length * number // count for number in range(count + 1)]
        if query_order.device.type == "cpu":
            last = query_order[:, [end - 1 for end in ends[1:]]].amax(0) - self.start + 1
            needed = [min(self.seq_len, -(-keys // KEY_MULTIPLE) * KEY_MULTIPLE) for keys in last.tolist()]
        else:
            # Reading positions would make the host wait for the device. Without reading: the j-th of K tokens
            # selected from S is at position S - K + j at most, because K - j more must follow it.
            needed = [self.seq_len - length + end for end in ends[1:]]
        return tuple(zip(ends[:-1], ends[1:], needed, strict=True))

    def segments(self, tokens: TokenSet, bounds: Tensor) -> Segments:
        """The segments among the rows of `tokens`, some perhaps empty; `bounds` are those of the whole stream."""
        if tokens.index is not None:
            bounds = torch.searchsorted(tokens.index, bounds)
        if self.bucketed:
            return Segments(bounds, tokens.max_length, Buckets.of(bounds))
        # A ragged set's own maximum changes from step to step, and would recompile whatever depends on it.
        longest = tokens.max_length if tokens.lengths is None else self.seq_len
        return Segments(bounds.int(), longest)

    def visible_pairs(self, queries: TokenSet, keys: TokenSet) -> Tensor:
        """Pairs (query, key) that attention cannot skip, from which its FLOPs are counted.

        The key is not after the query and, where documents are kept apart, in its document. `queries` are among `keys`.
        A scalar in fp32 on the device; the host does not wait for it.
        """
        device = self.positions.device
        if self.documents is not None:
            return self._pairs_inside_documents(queries, keys, self.documents).float()
        if keys is not queries:
            return (keys.rank_of(queries, device) + 1).sum().float()
        if queries.lengths is None:
            total = queries.batch * queries.max_length * (queries.max_length + 1) / 2
            return torch.full((), total, device=device)
        lengths = queries.lengths.float()
        return (lengths * (lengths + 1) / 2).sum()

    def _pairs_inside_documents(self, queries: TokenSet, keys: TokenSet, documents: Tensor) -> Tensor:
        """Keys from the row at which a query's document begins to the query itself, summed over the queries."""
        begins = document_starts(documents.view(self.batch, self.seq_len))
        offsets = torch.arange(self.batch, device=documents.device).unsqueeze(1) * self.seq_len
        rows = queries.rows(documents.device)
        first = (begins + offsets).flatten()[rows]
        if keys.index is None:
            return (rows - first + 1).sum()
        return (torch.searchsorted(keys.index, rows, right=True) - torch.searchsorted(keys.index, first)).sum()

    def _order_and_document(self, tokens: TokenSet, grid: Grid, fill: int) -> tuple[Tensor, Tensor | None]:
        """Order and document of each cell of `grid`, [batch, length]; `fill` marks padding."""
        order = grid.pad(self.order_of(tokens), fill)
        if self.documents is None:
            return order, None
        return order, grid.pad(tokens.gather(self.documents), fill)


def document_begins(documents: Tensor) -> Tensor:
    """Whether a document begins at each token, [B, S]; `documents` [B, S] are ids, equal ones adjacent."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins


def document_starts(documents: Tensor) -> Tensor:
    """Position [B, S] at which each token's document begins; `documents` [B, S] are ids, equal ones adjacent."""
    positions = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return positions.masked_fill(~document_begins(documents), 0).cummax(dim=1).values


def segment_bounds(documents: Tensor | None, batch: int, seq_len: int, device: torch.device) -> Tensor:
    """Rows of a [B, S] stream at which documents (without any, sequences) begin, and its end."""
    if documents is None:
        return torch.arange(batch + 1, device=device) * seq_len
    # Only the device knows how many documents there are. `nonzero` waits for that number: the one wait in a forward
    # pass with documents.
    return F.pad(document_begins(documents).flatten().nonzero().squeeze(1), (0, 1), value=batch * seq_len)
