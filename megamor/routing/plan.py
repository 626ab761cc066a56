"""Routing plans: which tokens go through the core in one recursion, and how its output is combined into the stream.

The recursion stage (`megamor/model/recursion.py`) executes every plan in the same way: gather, core, combine. The
stream holds the tokens of B sequences one after another, a row each: T rows, B·S if every sequence has S tokens.
Padding has no row. Rows in ascending order therefore keep sequences together and tokens in order, which is all that
causal attention needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class Incoming:
    """Integers being copied to the host while the device continues; `tolist` waits for that copy only."""

    # Work queued on the device after the copy is not waited for: the earlier a copy starts, the less its wait costs.
    def __init__(self, numbers: Tensor) -> None:
        self.copy = numbers.to("cpu", non_blocking=True)
        self.arrival = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None

    def tolist(self) -> list[Any]:
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy.tolist()


def to_device(
    numbers: Sequence[Any] | NDArray[Any], device: torch.device, dtype: type[np.generic] = np.int64
) -> Tensor:
    """`numbers`, or lists of equal length of them, copied to a tensor on `device`."""
    # NumPy reads Python lists several times faster than torch does. A copy from pageable memory would wait until the
    # GPU has finished everything before it; from pinned memory it is queued like a kernel.
    tensor = torch.from_numpy(np.array(numbers, dtype))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class TokenSet:
    """A subset of the rows of a stream of B sequences of up to S tokens, in ascending order.

    `index` [N] holds the rows; None means all of them. `lengths` [B] is the number of tokens from each sequence where
    these differ (ragged); None means exactly `max_length` from each (rectangular), which keeps shapes static.
    `max_length` is the largest of these numbers. `counts` are the lengths on the host, where it knows them.
    """

    batch: int
    seq_len: int
    max_length: int
    index: Tensor | None = None
    lengths: Tensor | None = None
    counts: tuple[int, ...] | None = None

    @staticmethod
    def all(
        batch: int, seq_len: int, counts: tuple[int, ...] | None = None, device: torch.device | str = "cpu"
    ) -> TokenSet:
        """Every token of the stream: `seq_len` in each sequence, or as many as `counts` says."""
        if counts is None:
            return TokenSet(batch, seq_len, seq_len)
        lengths = to_device(counts, torch.device(device))
        return TokenSet(batch, max(counts), max(counts), lengths=lengths, counts=counts)

    def pick(self, chosen: Tensor) -> TokenSet:
        """The rows of this set at `chosen` [B, k]: ascending indices among the rows of each sequence (0-based).

        Needs a rectangular set; the result is rectangular.
        """
        assert self.lengths is None
        # Rectangular in, rectangular out: no size has to be read from the device.
        indices = (chosen + self.bounds(chosen.device)[:-1].unsqueeze(1)).flatten()
        index = indices if self.index is None else self.index[indices]
        return replace(self, max_length=chosen.shape[1], index=index)

    def sizes(self, keep: Tensor) -> Incoming | None:
        """The `size` that `where` needs for each column of `keep` [N, K]: [K, 2], for one wait.

        None where sequences are single tokens, as in serving: nothing is hidden there, and a graph can't record a copy.
        """
        if self.seq_len == 1:
            return None
        numbers = self.number_in(keep)
        return Incoming(torch.stack((numbers.sum(0), numbers.amax(0)), dim=1))

    def where(self, keep: Tensor, size: Sequence[int] | None = None) -> tuple[TokenSet, Tensor]:
        """The ragged set of the rows for which `keep` [N] is true, and their indices [n] in this set.

        `size` is the number of kept rows, in total and at most in one sequence. If the caller does not know it, it is
        read from the device, and the host waits.
        """
        kept_before = F.pad(keep.cumsum(0), (1, 0))
        lengths = kept_before[self.bounds(keep.device)].diff()
        count, longest = Incoming(torch.stack((kept_before[-1], lengths.max()))).tolist() if size is None else size
        # The i-th kept row is the first with i kept rows up to and including it. `nonzero` would give the same, but it
        # always waits for the device, also where `size` is known.
        indices = torch.searchsorted(kept_before[1:], torch.arange(1, count + 1, device=keep.device))
        index = indices if self.index is None else self.index[indices]
        return TokenSet(self.batch, self.seq_len, longest, index, lengths), indices

    def top(self, scores: Tensor, numbers: Sequence[int]) -> tuple[TokenSet, Tensor]:
        """The `numbers[b]` highest of `scores` [N] in each sequence b, and their indices [n] in this set.

        Needs `counts`, and so does not wait for the device; the result has them too.
        """
        assert self.counts is not None
        sequences, device = self.sequences(scores.device), scores.device
        # Sorted by score, then (stably) by sequence: each sequence's rows, the highest first.
        ranked = scores.argsort(descending=True, stable=True)
        ranked = ranked[sequences[ranked].argsort(stable=True)]
        wanted = to_device(numbers, device)
        rank = torch.arange(len(self), device=device) - self.bounds(device)[sequences]
        keep = torch.zeros_like(ranked, dtype=torch.bool).index_copy(0, ranked, rank < wanted[sequences])
        tokens, indices = self.where(keep, (sum(numbers), max(numbers)))
        return replace(tokens, counts=tuple(numbers)), indices

    def bounds(self, device: torch.device) -> Tensor:
        """Indices [batch + 1] among the rows of this set at which the sequences begin, and the end."""
        if self.lengths is None:
            return torch.arange(self.batch + 1, device=device) * self.max_length
        return F.pad(self.lengths.cumsum(0), (1, 0))

    def sequences(self, device: torch.device) -> Tensor:
        """The sequence of each row of this set, [N]."""
        if self.lengths is None:
            return torch.arange(len(self), device=device) // self.max_length
        # The size of the result is given, or the host would wait for it.
        return torch.arange(self.batch, device=device).repeat_interleave(self.lengths, output_size=len(self))

    def number_in(self, marks: Tensor) -> Tensor:
        """How many rows are marked in each sequence, [B, ...]; `marks` [N, ...] are booleans."""
        if self.lengths is None:
            return marks.view(self.batch, self.max_length, *marks.shape[1:]).sum(1)
        before = torch.cat((marks.new_zeros(1, *marks.shape[1:], dtype=torch.int64), marks.cumsum(0)))
        return before[self.bounds(marks.device)].diff(dim=0)

    def __len__(self) -> int:
        if self.index is not None:
            return self.index.shape[0]
        return self.batch * self.seq_len if self.counts is None else sum(self.counts)

    def find(self, subset: TokenSet) -> Tensor | None:
        """Indices [n] of the tokens of `subset` among the rows of this set; None if both are the same set."""
        if subset is self or (subset.index is None and self.index is None):
            return None
        assert subset.index is not None
        return subset.index if self.index is None else torch.searchsorted(self.index, subset.index)

    def rank_of(self, subset: TokenSet, device: torch.device) -> Tensor:
        """How many tokens of this set come before each token of `subset` in its sequence, [n]."""
        indices = self.find(subset)
        indices = torch.arange(len(subset), device=device) if indices is None else indices
        return indices - self.bounds(device)[subset.sequences(device)]

    def rows(self, device: torch.device) -> Tensor:
        """The rows as a tensor [N], also if the set is the whole stream."""
        return torch.arange(len(self), device=device) if self.index is None else self.index

    def gather(self, stream: Tensor) -> Tensor:
        """The rows [N, ...] of `stream` [T, ...]."""
        return stream if self.index is None else stream.index_select(0, self.index)

    def scatter(self, stream: Tensor, values: Tensor) -> Tensor:
        """`stream` [T, ...] with the rows of this set replaced by `values` [N, ...]."""
        values = values.to(stream.dtype)
        return values if self.index is None else stream.index_copy(0, self.index, values)

    def scatter_add(self, stream: Tensor, values: Tensor) -> Tensor:
        """`stream` [T, ...] with `values` [N, ...] added to the rows of this set."""
        values = values.to(stream.dtype)
        return stream + values if self.index is None else stream.index_add(0, self.index, values)


@dataclass(frozen=True)
class MarkedSet(TokenSet):
    """A subset that keeps all rows in the tensor and marks those that belong to it, `kept` [N] (None: all).

    Serving selects with it: shapes stay the same and the host need not wait for the number of selected rows. Results
    for unmarked rows are computed and ignored, which is correct because rows are independent in the causal mode.
    `indices` [N] are those of all rows.
    """

    indices: Tensor | None = None
    kept: Tensor | None = None

    @staticmethod
    def of(indices: Tensor) -> MarkedSet:
        """Every row as a sequence of one token; `indices` is 0, 1, …, N - 1, allocated by the caller."""
        return MarkedSet(len(indices), 1, 1, indices=indices)

    def where(self, keep: Tensor, size: Sequence[int] | None = None) -> tuple[TokenSet, Tensor]:
        """As `TokenSet.where`, but no row is removed: the indices are those of all rows."""
        assert self.indices is not None
        return replace(self, kept=keep if self.kept is None else self.kept & keep), self.indices

    def scatter(self, stream: Tensor, values: Tensor) -> Tensor:
        """As `TokenSet.scatter`; `values` [N, ...] has all rows, and only the marked ones are used."""
        values = values.to(stream.dtype)
        if self.kept is None:
            return values
        return torch.where(self.kept.view(-1, *(1,) * (stream.dim() - 1)), values, stream)


Weight = Tensor | float | None


@dataclass(frozen=True)
class Mix:
    """How the rows of the selected tokens are combined: next = from_input·x_in + from_stream·x + from_core·y.

    x_in is the input of the whole recursion stage, x the stream before this recursion, y the core's output (its
    residuals included). A weight is None (no such term), a number, or a tensor [N] over the selected tokens. `emit`
    adds emit·y to the stage's result; once any recursion emits, the result is the sum of what was emitted instead of
    the final stream.
    """

    from_core: Weight = 1.0
    from_stream: Weight = None
    from_input: Weight = None
    emit: Weight = None


@dataclass(frozen=True)
class RoutingPlan:
    """One recursion: the tokens that the core processes, and how the result is combined.

    `indices` [N] are the tokens' indices in the candidates' rows; None means that all candidates are selected.
    """

    tokens: TokenSet
    indices: Tensor | None
    mix: Mix
