"""Loss, accuracy and depth of groups of tokens: by their position, or by the source that they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.data.loader import MicroBatch, ValidationSet
from megamor.data.meta import read_meta
from megamor.errors import DataError
from megamor.model import ModelOutput
from megamor.model.loss import IGNORE


class TokenGroups:
    """Sums over the tokens of each group, whose `names` begin the rows of `figures`.

    `group_of` maps a batch to the group of each label [B, S]. It is called for the batches of a set in order.
    """

    def __init__(self, names: Sequence[Mapping[str, Any]], group_of: Callable[[MicroBatch], Tensor]) -> None:
        self._names, self._group_of = names, group_of
        self._sums = torch.zeros(len(names), 4, dtype=torch.float64)

    def add(self, batch: MicroBatch, out: ModelOutput) -> None:
        """Add the scored tokens of a batch."""
        assert out.scores is not None
        depth = torch.zeros_like(out.scores.nll) if out.depth is None else out.depth
        figures = torch.stack((torch.ones_like(depth), out.scores.nll, out.scores.correct, depth), -1)
        valid = batch.labels != IGNORE
        self._sums.index_add_(0, self._group_of(batch)[valid], figures.cpu().double()[valid])

    def figures(self) -> list[dict[str, Any]]:
        """`tokens`, `loss` in nats, `accuracy` of the likeliest token and `mean_depth` of each group that has any."""
        found = []
        for name, (tokens, nats, correct, recursions) in zip(self._names, self._sums.tolist(), strict=True):
            if tokens:
                means = {"loss": nats / tokens, "accuracy": correct / tokens, "mean_depth": recursions / tokens}
                found.append({**name, "tokens": int(tokens), **means})
        return found


def everything() -> TokenGroups:
    """One group of all tokens."""
    return TokenGroups([{}], lambda batch: torch.zeros_like(batch.labels))


def by_position(seq_len: int) -> TokenGroups:
    """Groups of positions 0, 1, 2–3, 4–7, …: how many tokens of its document the predicting one can look back at.

    Without document masks the window counts as one document.
    """
    limits = [0, *(2**power for power in range((seq_len - 1).bit_length()))]
    names = [{"first": a, "last": b - 1} for a, b in zip(limits, [*limits[1:], seq_len], strict=True)]

    def group_of(batch: MicroBatch) -> Tensor:
        return torch.bucketize(context_lengths(batch), torch.tensor(limits[1:]), right=True)

    return TokenGroups(names, group_of)


def context_lengths(batch: MicroBatch) -> Tensor:
    """How many tokens before it each token can look back at, [B, S]."""
    positions = torch.arange(batch.labels.shape[1]).repeat(len(batch.labels), 1)
    if batch.documents is not None:
        begins = F.pad(batch.documents[:, 1:] != batch.documents[:, :-1], (1, 0), value=True)
        positions = positions - torch.where(begins, positions, 0).cummax(1).values
    return positions


def by_source(prefix: str, data: ValidationSet, sequences: int | None) -> TokenGroups:
    """Groups of the sources that the side file of `prefix` lists, for one pass over `sequences` windows of `data`.

    Raises:
        DataError: the side file doesn't say which tokens come from which source.
    """
    meta = read_meta(prefix)
    sources = meta.sources if meta else ()
    ends = np.cumsum([source.get("tokens", 0) for source in sources])
    if not sources or any(source.get("scattered") for source in sources) or ends[-1] != data.shard.num_tokens:
        raise DataError(
            f"{prefix}.meta.json doesn't say which tokens come from which source: leave out --by-source, or give each "
            "source as a data set of its own"
        )
    starts = iter(data.starts(sequences).tolist())

    def group_of(batch: MicroBatch) -> Tensor:
        rows = len(batch.labels) if batch.lengths is None else int((batch.lengths > 0).sum())
        first = np.array([*islice(starts, rows), *[0] * (len(batch.labels) - rows)])
        # A label is the token after its input.
        index = first[:, None] + np.arange(1, batch.labels.shape[1] + 1)
        return torch.from_numpy(np.searchsorted(ends, index, side="right"))

    return TokenGroups([{"source": source["name"]} for source in sources], group_of)
