"""Where the rows of a batch stand: order, RoPE angles and documents, and the attention layouts that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamor.config import ModelConfig
from megamor.model.attention import AttentionLayout, Grid, visibility_mask
from megamor.model.blocks import RotaryAngles, rotary_angles
from megamor.routing import TokenSet

BEYOND = torch.iinfo(torch.int64).max
"""Order of a key that doesn't exist."""


ROWS_PER_CHUNK = 128
"""Queries worth a call of their own, for the sake of keys that they needn't be given."""


@dataclass(frozen=True)
class Geometry:
    """A [batch, seq_len] stream whose sequences begin at place `start` (tokens in a cache come before).

    `positions` [B·S] are what RoPE sees; `angles` hold all B·S rows; attention must not cross `documents` [B·S] (ids).
    """

    batch: int
    seq_len: int
    positions: Tensor
    angles: RotaryAngles
    documents: Tensor | None = None
    start: int = 0

    @staticmethod
    def of(
        tokens: Tensor,
        config: ModelConfig,
        dtype: torch.dtype,
        documents: Tensor | None = None,
        start: int = 0,
    ) -> Geometry:
        """Geometry of token ids [B, S]; positions count from `start`, or anew in each document if so configured."""
        batch, seq_len = tokens.shape
        positions = torch.arange(start, start + seq_len, device=tokens.device).expand(batch, seq_len)
        if documents is not None and config.document_positions == "restart":
            positions = positions - document_starts(documents)
        positions = positions.flatten()
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, dtype)
        return Geometry(batch, seq_len, positions, angles, None if documents is None else documents.flatten(), start)

    def angles_of(self, tokens: TokenSet) -> RotaryAngles:
        """RoPE angles of the original positions of `tokens`."""
        return self.angles.select(tokens.index)

    def order_of(self, tokens: TokenSet) -> Tensor:
        """Places [N] of `tokens` in their sequences."""
        return tokens.rows(self.angles.cos.device) % self.seq_len + self.start

    def layout(self, queries: TokenSet, keys: TokenSet) -> AttentionLayout:
        """Causal attention of `queries` to `keys`, inside documents."""
        query_grid, key_grid = Grid.of(queries), Grid.of(keys)
        if queries is keys and self.documents is None:
            return AttentionLayout(query_grid, key_grid)
        query_order, query_document = self._places(queries, query_grid, -1)
        key_order, key_document = self._places(keys, key_grid, BEYOND)
        mask = visibility_mask(query_order, key_order, query_document, key_document)
        # The j-th of K tokens that were selected from S stands at place S - K + j at most: no key after that is
        # visible.
        static = queries.lengths is None and keys.is_everything
        num_chunks = max(1, min(4, queries.max_length // ROWS_PER_CHUNK)) if static else 1
        return AttentionLayout(query_grid, key_grid, mask, num_chunks)

    def _places(self, tokens: TokenSet, grid: Grid, fill: int) -> tuple[Tensor, Tensor | None]:
        """Order and document of each place of `grid`, [batch, length]; `fill` marks padding."""
        order = grid.pad(self.order_of(tokens), fill)
        if self.documents is None:
            return order, None
        return order, grid.pad(tokens.gather(self.documents), fill)


def document_starts(documents: Tensor) -> Tensor:
    """Place [B, S] at which each token's document begins; documents [B, S] are ids, equal ones adjacent."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places.masked_fill(~begins, 0).cummax(dim=1).values
