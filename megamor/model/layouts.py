"""Where the rows of a batch stand: order, RoPE angles and documents, and the attention layouts that follow."""

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
"""Order of a key that doesn't exist."""


ROWS_PER_CHUNK, MAX_CHUNKS, KEY_MULTIPLE = 64, 8, 16
"""Queries worth a call of their own for the sake of keys that they needn't be given; keys are rounded up."""


@dataclass(frozen=True)
class Geometry:
    """A [batch, seq_len] stream whose sequences begin at place `start` (tokens in a cache come before).

    `positions` [B·S] are what RoPE sees; `angles` hold all B·S rows; attention must not cross `documents` [B·S] (ids),
    and computes in `dtype`. Where attention can run packed, by a kernel or `bucketed`, `edges` [pieces + 1] are the
    rows at which the sequences, or if there are `documents` these, begin, and the end.
    """

    batch: int
    seq_len: int
    positions: Tensor
    angles: RotaryAngles
    documents: Tensor | None = None
    start: int = 0
    dtype: torch.dtype = torch.float32
    edges: Tensor | None = None
    bucketed: bool = False

    @staticmethod
    def of(
        tokens: Tensor,
        config: ModelConfig,
        dtype: torch.dtype,
        documents: Tensor | None = None,
        start: int = 0,
    ) -> Geometry:
        """Geometry of token ids [B, S]; positions count from `start`, or anew in each document if so configured.

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
        edges, kernel = None, has_packed_kernel(tokens.device, dtype, config.head_dim)
        bucketed = not kernel and tokens.device.type == "cpu"
        if kernel or bucketed:
            edges = segment_bounds(documents, batch, seq_len, tokens.device)
        documents = None if documents is None else documents.flatten()
        return Geometry(batch, seq_len, positions, angles, documents, start, dtype, edges, bucketed)

    def angles_of(self, tokens: TokenSet) -> RotaryAngles:
        """RoPE angles of the original positions of `tokens`."""
        return self.angles.select(tokens.index)

    def order_of(self, tokens: TokenSet) -> Tensor:
        """Places [N] of `tokens` in their sequences."""
        return tokens.rows(self.angles.cos.device) % self.seq_len + self.start

    def layout(self, queries: TokenSet, keys: TokenSet) -> AttentionLayout:
        """Causal attention of `queries` to `keys`, inside documents."""
        uneven = queries.lengths is not None or self.documents is not None
        if queries is keys and uneven and self.edges is not None:
            return AttentionLayout(Grid(1, len(queries)), None, segments=self.segments(queries, self.edges))
        query_grid, key_grid = Grid.of(queries), Grid.of(keys)
        if queries is keys and self.documents is None:
            return AttentionLayout(query_grid, key_grid)
        query_order, query_document = self._places(queries, query_grid, -1)
        key_order, key_document = self._places(keys, key_grid, BEYOND)
        mask = visibility_mask(query_order, key_order, query_document, key_document, self.dtype)
        pieces = self.pieces(query_order) if queries.lengths is None and keys.is_everything else ()
        return AttentionLayout(query_grid, key_grid, mask, pieces)

    def pieces(self, query_order: Tensor) -> tuple[tuple[int, int, int], ...]:
        """Ranges of the queries, and how many of all keys each can see, from their ascending places [batch, K].

        On a CPU the places are looked at; elsewhere that would mean to wait, and the j-th of K tokens that were
        selected from S is only known to stand at place S - K + j at most.
        """
        length = query_order.shape[1]
        count = max(1, min(MAX_CHUNKS, length // ROWS_PER_CHUNK))
        bounds = [length * number // count for number in range(count + 1)]
        if query_order.device.type == "cpu":
            last = query_order[:, [end - 1 for end in bounds[1:]]].amax(0) - self.start + 1
            needed = [min(self.seq_len, -(-keys // KEY_MULTIPLE) * KEY_MULTIPLE) for keys in last.tolist()]
        else:
            needed = [self.seq_len - length + end for end in bounds[1:]]
        return tuple(zip(bounds[:-1], bounds[1:], needed, strict=True))

    def segments(self, tokens: TokenSet, edges: Tensor) -> Segments:
        """The pieces of the rows of `tokens`, some perhaps empty."""
        bounds = edges if tokens.index is None else torch.searchsorted(tokens.index, edges)
        if self.bucketed:
            return Segments(bounds, tokens.max_length, Buckets.of(bounds))
        # The true maximum would have to be fetched from the device, and would recompile what depends on it.
        longest = tokens.max_length if tokens.lengths is None else self.seq_len
        return Segments(bounds.int(), longest)

    def _places(self, tokens: TokenSet, grid: Grid, fill: int) -> tuple[Tensor, Tensor | None]:
        """Order and document of each place of `grid`, [batch, length]; `fill` marks padding."""
        order = grid.pad(self.order_of(tokens), fill)
        if self.documents is None:
            return order, None
        return order, grid.pad(tokens.gather(self.documents), fill)


def document_begins(documents: Tensor) -> Tensor:
    """Whether a document begins at each token, [B, S]; documents [B, S] are ids, equal ones adjacent."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins


def document_starts(documents: Tensor) -> Tensor:
    """Place [B, S] at which each token's document begins; documents [B, S] are ids, equal ones adjacent."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return places.masked_fill(~document_begins(documents), 0).cummax(dim=1).values


def segment_bounds(documents: Tensor | None, batch: int, seq_len: int, device: torch.device) -> Tensor:
    """Rows of a [B, S] stream at which documents (without any, sequences) begin, and its end.

    How many documents there are only the device knows: that is the one wait for it in a forward pass with documents.
    """
    if documents is None:
        return torch.arange(batch + 1, device=device) * seq_len
    return F.pad(document_begins(documents).flatten().nonzero().squeeze(1), (0, 1), value=batch * seq_len)
