"""What a router tells the recursion engine: which tokens go through the core, and how the result is combined.

The engine (`megamor/model/recursion.py`) executes any plan the same way: gather, core, combine. Tokens live in a stream
of B sequences of S tokens each, flattened to N = B·S rows; token t of sequence b is row b·S + t.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Incoming:
    """Integers on their way to the host: the device goes on meanwhile, `tolist` waits for the copy alone.

    What the device was given to do after them is not waited for, so the longer ago they left, the less it costs.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.copy = numbers.to("cpu", non_blocking=True)
        self.arrival: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> list[Any]:
        """The numbers."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy.tolist()


@dataclass(frozen=True)
class TokenSet:
    """A subset of the rows of a [B, S] stream, in ascending order.

    `index` [N] holds the rows; None means all of them. `max_length` is the largest number of tokens that one sequence
    contributes. `lengths` [B] says how many each contributes where they differ (ragged); None means that every sequence
    contributes exactly `max_length` (rectangular), which keeps shapes static.
    """

    batch: int
    seq_len: int
    max_length: int
    index: Tensor | None = None
    lengths: Tensor | None = None

    @staticmethod
    def all(batch: int, seq_len: int) -> TokenSet:
        """Every token of the stream."""
        return TokenSet(batch, seq_len, seq_len)

    def pick(self, chosen: Tensor) -> TokenSet:
        """The rows of this set at `chosen` [B, k]: per sequence, ascending indices among its own rows (0-based).

        Needs a rectangular set; the result is rectangular.
        """
        assert self.lengths is None
        offsets = torch.arange(self.batch, device=chosen.device).unsqueeze(1) * self.max_length
        indices = (chosen + offsets).flatten()
        index = indices if self.index is None else self.index[indices]
        return replace(self, max_length=chosen.shape[1], index=index)

    def where(self, keep: Tensor, size: tuple[int, int] | None = None) -> tuple[TokenSet, Tensor]:
        """The rows of this set for which `keep` [N] is true, and their indices [n] in this set. The result is ragged.

        `size` is how many there are, in all and at most in one sequence; a caller who knows it spares the device from
        being asked.
        """
        kept_before = F.pad(keep.cumsum(0), (1, 0))
        lengths = kept_before[self.bounds(keep.device)].diff()
        count, longest = Incoming(torch.stack((kept_before[-1], lengths.max()))).tolist() if size is None else size
        # The i-th kept row is the first that has i before and including itself.
        indices = torch.searchsorted(kept_before[1:], torch.arange(1, count + 1, device=keep.device))
        index = indices if self.index is None else self.index[indices]
        return TokenSet(self.batch, self.seq_len, longest, index, lengths), indices

    def bounds(self, device: torch.device) -> Tensor:
        """Places [batch + 1] among the rows of this set at which the sequences begin, and the end."""
        if self.lengths is None:
            return torch.arange(self.batch + 1, device=device) * self.max_length
        return F.pad(self.lengths.cumsum(0), (1, 0))

    @property
    def is_everything(self) -> bool:
        """Whether this is the whole stream."""
        return self.index is None

    def __len__(self) -> int:
        return self.batch * self.seq_len if self.index is None else self.index.shape[0]

    def find(self, subset: TokenSet) -> Tensor | None:
        """Places [n] of the tokens of `subset` among the rows of this set; None where they are the same set."""
        if subset is self or (subset.is_everything and self.is_everything):
            return None
        assert subset.index is not None
        return subset.index if self.index is None else torch.searchsorted(self.index, subset.index)

    def rank_of(self, subset: TokenSet, device: torch.device) -> Tensor:
        """How many tokens of this set stand before each token of `subset` in its sequence, [n]."""
        rows = subset.rows(device)
        sequence = rows // self.seq_len
        indices = self.find(subset)
        indices = torch.arange(len(rows), device=device) if indices is None else indices
        if self.lengths is None:
            return indices - sequence * self.max_length
        return indices - (self.lengths.cumsum(0) - self.lengths)[sequence]

    def rows(self, device: torch.device) -> Tensor:
        """The rows as a tensor [N], also where the set is everything."""
        return torch.arange(len(self), device=device) if self.index is None else self.index

    def gather(self, stream: Tensor) -> Tensor:
        """The rows [N, ...] of `stream` [B·S, ...]."""
        return stream if self.index is None else stream.index_select(0, self.index)

    def scatter(self, stream: Tensor, values: Tensor) -> Tensor:
        """`stream` [B·S, ...] with the rows of this set replaced by `values` [N, ...]."""
        values = values.to(stream.dtype)
        return values if self.index is None else stream.index_copy(0, self.index, values)

    def scatter_add(self, stream: Tensor, values: Tensor) -> Tensor:
        """`stream` [B·S, ...] with `values` [N, ...] added to the rows of this set."""
        values = values.to(stream.dtype)
        return stream + values if self.index is None else stream.index_add(0, self.index, values)


@dataclass(frozen=True)
class MarkedSet(TokenSet):
    """All rows of the stream, of which those `kept` [N] belong to the set: choosing among them moves none of them.

    In the causal mode what is computed for the others is never looked at, and the device isn't asked how many there
    are, as serving wants it. `indices` [N] are those of all rows.
    """

    indices: Tensor | None = None
    kept: Tensor | None = None

    @staticmethod
    def of(indices: Tensor) -> MarkedSet:
        """Every row, [N] in all, as sequences of one token each."""
        return MarkedSet(len(indices), 1, 1, indices=indices)

    def where(self, keep: Tensor, size: tuple[int, int] | None = None) -> tuple[TokenSet, Tensor]:
        """As `TokenSet.where`, but the indices are those of all rows."""
        assert self.indices is not None
        return replace(self, kept=keep if self.kept is None else self.kept & keep), self.indices

    def scatter(self, stream: Tensor, values: Tensor) -> Tensor:
        """As `TokenSet.scatter`, from `values` [N, ...] of all rows."""
        values = values.to(stream.dtype)
        if self.kept is None:
            return values
        return torch.where(self.kept.view(-1, *(1,) * (stream.dim() - 1)), values, stream)


Weight = Tensor | float | None


@dataclass(frozen=True)
class Mix:
    """How the engine combines a recursion: next stream = from_input·x_in + from_stream·x + from_core·y.

    Each weight is None (leave the term out), a number, or a tensor [N] over the tokens that the core has seen; x_in is
    the input of the whole recursion stage, x the stream before this recursion, y the core's output (its residuals
    included).
    `emit` adds emit·y to the stage's result; once any recursion emits, the result is the sum of what was emitted
    instead of the final stream.
    """

    from_core: Weight = 1.0
    from_stream: Weight = None
    from_input: Weight = None
    emit: Weight = None


@dataclass(frozen=True)
class Idle:
    """Tokens whose rows of the stream are multiplied by `weight` [n]: of value one, there to carry a gradient."""

    tokens: TokenSet
    weight: Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """One recursion: the tokens that the core sees, and where they stand among the candidates.

    `indices` [N] are positions in the candidates' rows; None means that all candidates are selected. `idle` are
    candidates that are not selected, where the router learns from having left them alone.
    """

    tokens: TokenSet
    indices: Tensor | None
    mix: Mix
    idle: Idle | None = None
