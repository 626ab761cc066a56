"""Where the rows of a batch stand: places, RoPE angles and documents, and the attention layouts that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamor.config import ModelConfig
from megamor.model.attention import AttentionLayout, Grid, visibility_mask
from megamor.model.blocks import RotaryAngles, rotary_angles
from megamor.routing import TokenSet

BEYOND = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Geometry:
    """A [batch, seq_len] stream. `angles` hold all B·S rows; attention must not cross `documents` [B·S] (ids)."""

    batch: int
    seq_len: int
    angles: RotaryAngles
    documents: Tensor | None = None

    @staticmethod
    def of(tokens: Tensor, config: ModelConfig, dtype: torch.dtype, documents: Tensor | None = None) -> Geometry:
        """Geometry of a batch of token ids [B, S] whose positions count from 0."""
        batch, seq_len = tokens.shape
        positions = torch.arange(seq_len, device=tokens.device).repeat(batch)
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, dtype)
        return Geometry(batch, seq_len, angles, None if documents is None else documents.flatten())

    def angles_of(self, tokens: TokenSet) -> RotaryAngles:
        """RoPE angles of the original positions of `tokens`."""
        return self.angles.select(tokens.index)

    def layout(self, queries: TokenSet, keys: TokenSet) -> AttentionLayout:
        """Causal attention of `queries` to `keys`, inside documents."""
        query_grid, key_grid = Grid.of(queries), Grid.of(keys)
        if queries is keys and self.documents is None:
            return AttentionLayout(query_grid, key_grid)
        query_order, query_document = self.places(queries, query_grid, -1)
        key_order, key_document = self.places(keys, key_grid, BEYOND)
        mask = visibility_mask(query_order, key_order, query_document, key_document)
        return AttentionLayout(query_grid, key_grid, mask)

    def places(self, tokens: TokenSet, grid: Grid, fill: int) -> tuple[Tensor, Tensor | None]:
        """Order in the sequence and document of each place of `grid`, [batch, length]; `fill` marks padding."""
        rows = tokens.rows(self.angles.cos.device)
        order = grid.pad(rows % self.seq_len, fill)
        return order, None if self.documents is None else grid.pad(self.documents[rows], fill)
