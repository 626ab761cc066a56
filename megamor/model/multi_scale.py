"""Multi-scale causal attention: recent keys one by one, older ones as means of blocks (`model.attention: multi_scale`).

A document is cut into blocks of b positions, the first of which begins at position 0; the window w is a multiple of b.
A query at position p sees, in one softmax,

- fine keys: those at positions f(p) to p, where f(p) = max(0, b·⌊p/b⌋ - w);
- coarse keys: for each block that ends before f(p), the mean of its keys, whose value is the mean of its values.

Every earlier token is therefore seen exactly once, and every block that is seen is complete. Where only some tokens
take part (in a recursion, or in a bounded cache), a block's mean is over those present; a block without any isn't seen.
The score of a mean of n keys is raised by log n, so that it weighs as much as n keys of that score: if all keys and all
values of a block were equal, the result would be that of full attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import ModelConfig
from megamor.routing import TokenSet

BEYOND = torch.iinfo(torch.int64).max
"""Position of an empty key slot: after every query."""


def first_fine(position: Tensor, config: ModelConfig) -> Tensor:
    """f(p) of the positions p in their documents."""
    block = config.attention_block
    return (position // block * block - config.attention_window).clamp_min(0)


def reach(config: ModelConfig) -> int:
    """How many positions before a query its first fine key is, at most."""
    return config.attention_window + config.attention_block - 1


@dataclass(frozen=True)
class Pool:
    """Averages keys or values over blocks of `block` positions.

    `cells` [N] are the rows' cells in a grid [batch, count + 1, block], whose last block takes the rows of incomplete
    blocks and is dropped; None means that the rows are all those of `batch` sequences of equal length. `sizes`
    [batch or 1, count] are the numbers of rows in the blocks.
    """

    batch: int
    block: int
    cells: Tensor | None
    sizes: Tensor

    @staticmethod
    def of(cells: Tensor, batch: int, count: int, block: int) -> Pool:
        """The pool of rows at `cells` [N]."""
        taken = cells.new_zeros(batch * (count + 1) * block).index_fill(0, cells, 1)
        return Pool(batch, block, cells, taken.view(batch, count + 1, block).sum(2)[:, :count])

    def mean(self, rows: Tensor) -> Tensor:
        """Rows [N, ...] to the means of the blocks [batch, count, ...]; 0 for blocks without rows."""
        count = self.sizes.shape[1]
        if self.cells is None:
            complete = rows.view(self.batch, -1, *rows.shape[1:])[:, : count * self.block]
            return complete.reshape(self.batch, count, self.block, *rows.shape[1:]).mean(2)
        # No two rows share a cell that is used, so nothing is added up in an order that could vary.
        grid = rows.new_zeros(self.batch * (count + 1) * self.block, *rows.shape[1:]).index_copy(0, self.cells, rows)
        sums = grid.view(self.batch, count + 1, self.block, *rows.shape[1:])[:, :count].sum(2)
        return sums / self.sizes.clamp_min(1).to(rows.dtype).view(*sums.shape[:2], *(1,) * (rows.dim() - 1))

    def spread(self, values: Tensor) -> Tensor:
        """Values [batch, count + N / batch] of the means and the rows: each row's own and its part of its mean's."""
        assert self.cells is not None
        means, own = values.tensor_split([self.sizes.shape[1]], dim=1)
        parts = F.pad(means / self.sizes.clamp_min(1), (0, 1))
        return own + parts.flatten()[self.cells // self.block].view_as(own)

    def mask(self, first: Tensor, last: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, Q, n] of the first n blocks for queries that see those ending from `first` to `last`.

        `first` and `last` are [B, Q], `ends` [B, n]; a batch of 1 stands for sequences that are all alike.
        """
        seen = (ends.unsqueeze(1) >= first.unsqueeze(2)) & (ends.unsqueeze(1) <= last.unsqueeze(2))
        weights = self.sizes[: len(ends), : ends.shape[1]].log().to(dtype)  # of an empty block: -inf
        return weights.unsqueeze(1).masked_fill(~seen, float("-inf")).unsqueeze(1)


@dataclass(frozen=True)
class Scales:
    """What the T rows of a stream see fine and coarse; places are rows of the stream.

    For each row [T]: `begins`, where its document begins; `fine`, the first row that it sees fine; `block_ends`, the
    last row of its block (T if that is incomplete); `cells`, its cell in a `Pool`. `ends` [batch, count] are the last
    rows of the complete blocks. `alike`: all sequences are single documents of the same length.
    """

    config: ModelConfig
    begins: Tensor
    fine: Tensor
    block_ends: Tensor
    cells: Tensor
    ends: Tensor
    alike: bool

    @staticmethod
    def of(everything: TokenSet, begins: Tensor, config: ModelConfig, alike: bool) -> Scales:
        """Scales of documents that begin at the rows `begins` [T], given for each row."""
        device, block, total = begins.device, config.attention_block, len(begins)
        rows, sequences = torch.arange(total, device=device), everything.sequences(device)
        position = rows - begins
        block_ends = rows + block - 1 - position % block
        complete = (block_ends < total) & (begins[block_ends.clamp_max(total - 1)] == begins)
        block_ends = torch.where(complete, block_ends, total)
        # Complete blocks are numbered within their sequence: there are at most `count`, however many documents it has.
        count = everything.max_length // block
        before = F.pad((block_ends == rows).cumsum(0), (1, 0))
        number = before[:-1] - before[everything.bounds(device)[:-1]][sequences]
        number = torch.where(complete, number, count) + sequences * (count + 1)
        ends = rows.new_full((everything.batch * (count + 1),), BEYOND).index_copy(0, number, block_ends)
        ends = ends.view(everything.batch, count + 1)[:, :count]
        fine = begins + first_fine(position, config)
        return Scales(config, begins, fine, block_ends, number * block + position % block, ends, alike)

    def pool(self, keys: TokenSet) -> Pool:
        """The pool of the rows of `keys`."""
        (batch, count), block = self.ends.shape, self.config.attention_block
        if keys.index is None and self.alike:
            return Pool(batch, block, None, self.ends.new_full((1, count), block))
        return Pool.of(keys.gather(self.cells), batch, count, block)

    def most_blocks(self, length: int) -> int:
        """How many blocks queries among the first `length` positions see, at most."""
        blocks = (length - 1 - self.config.attention_window) // self.config.attention_block
        return min(max(0, blocks), self.ends.shape[1])

    def coarse_pairs(self, queries: TokenSet, keys: TokenSet) -> Tensor:
        """How many means of `keys` each row of `queries` sees, [N]."""
        begins = self.begins
        present = begins.new_zeros(len(begins) + 1)
        present = present.index_fill(0, keys.gather(self.block_ends), 1)
        before = F.pad(present.cumsum(0), (1, 0))
        return before[queries.gather(self.fine)] - before[queries.gather(begins)]
