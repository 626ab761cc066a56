"""Rows of a batch, filled from pieces of token shards: inputs, labels and the documents that attention stays inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamor.data.packing import ranges
from megamor.data.shard import TokenShard
from megamor.data.source import Pieces
from megamor.errors import DataError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Rows:
    """Arrays to fill, [n, seq_len] int64 and contiguous: `inputs`, the token after each (`labels`), document numbers.

    Equal numbers in a row mean the same document; numbers ascend through the rows and say nothing else. Where there is
    nothing to put, inputs become 0 and labels -100, and the padding counts as a document of its own.
    """

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    documents: NDArray[np.int64] | None = None

    @classmethod
    def empty(cls, num_rows: int, seq_len: int, *, documents: bool) -> Rows:
        """Rows of any contents."""
        inputs, labels, numbers = np.empty((3, num_rows, seq_len), np.int64)
        return cls(inputs, labels, numbers if documents else None)


@dataclass(frozen=True)
class Filling:
    """What one shard gives to the rows. `inside_documents`: no piece reaches from one document into another."""

    shard: TokenShard
    pieces: Pieces
    inside_documents: bool


def fill_rows(rows: Rows, fillings: Sequence[Filling], vocab_size: int) -> None:
    """Write `fillings` and padding into all of `rows`.

    Raises DataError naming the file if a token id isn't in the model's vocabulary.
    """
    if not rows.inputs.size:
        return
    for filling in fillings:
        _copy(filling, rows)
    padding = _gaps(fillings, rows.inputs.size)
    for start, end in padding:
        rows.inputs.ravel()[start:end] = 0
        rows.labels.ravel()[start:end] = 0
    _check_ids(rows, fillings, vocab_size)
    for start, end in padding:
        rows.labels.ravel()[start:end] = IGNORED_LABEL
    if rows.documents is not None:
        _number_documents(rows.documents, fillings)


def _copy(filling: Filling, rows: Rows) -> None:
    inputs, labels, tokens, pieces = rows.inputs.ravel(), rows.labels.ravel(), filling.shard.tokens, filling.pieces
    columns = map(np.ndarray.tolist, (pieces.places, pieces.starts, pieces.lengths))
    for place, start, length in zip(*columns, strict=True):
        inputs[place : place + length] = tokens[start : start + length]
        labels[place : place + length] = tokens[start + 1 : start + length + 1]


def _gaps(fillings: Sequence[Filling], size: int) -> list[tuple[int, int]]:
    """Stretches (first place, end) of the rows that no piece fills."""
    places = np.concatenate([f.pieces.places for f in fillings])
    lengths = np.concatenate([f.pieces.lengths for f in fillings])
    if lengths.sum() == size:
        return []
    order = np.argsort(places)
    ends = np.concatenate(([0], (places + lengths)[order]))
    begins = np.concatenate((places[order], [size]))
    return [(int(end), int(begin)) for end, begin in zip(ends, begins, strict=True) if end < begin]


def _check_ids(rows: Rows, fillings: Sequence[Filling], vocab_size: int) -> None:
    if all(f.shard.dtype.kind == "u" and np.iinfo(f.shard.dtype).max < vocab_size for f in fillings):
        return
    # Negative ids are huge as unsigned ones. An input is the label before it, but for the first one of a piece.
    highest = int(rows.labels.view(np.uint64).max())
    for filling in fillings:
        highest = max(highest, int(rows.inputs.ravel()[filling.pieces.places].view(np.uint64).max(initial=0)))
    if highest < vocab_size:
        return
    for filling in fillings:
        for start, length in zip(filling.pieces.starts, filling.pieces.lengths, strict=True):
            check_ids(filling.shard, filling.shard.tokens[start : start + length + 1], vocab_size)


def check_ids(shard: TokenShard, tokens: NDArray, vocab_size: int) -> None:
    """Raise DataError naming the file of `shard` if one of its `tokens` isn't in the model's vocabulary."""
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{shard.prefix}.bin holds token id {low if low < 0 else high}, but the model's ids are 0 to "
            f"{vocab_size - 1} (model.vocab_size); raise it or preprocess with the model's tokenizer"
        )


def _number_documents(documents: NDArray[np.int64], fillings: Sequence[Filling]) -> None:
    """Mark every place at which another document (or piece, or padding) begins, and count the marks."""
    begins = documents.ravel()
    begins[:] = 0
    documents[:, 0] = 1
    for filling in fillings:
        pieces = filling.pieces
        ends = pieces.places + pieces.lengths
        begins[pieces.places] = 1
        begins[ends[ends < len(begins)]] = 1
        if not filling.inside_documents:
            begins[_document_begins(filling.shard, pieces)] = 1
    np.cumsum(begins, out=begins)


def _document_begins(shard: TokenShard, pieces: Pieces) -> NDArray[np.int64]:
    """Places inside `pieces` at which a document begins."""
    both = shard.documents_at(np.concatenate((pieces.starts, pieces.starts + pieces.lengths - 1)))
    first, last = both[: len(pieces.starts)], both[len(pieces.starts) :]
    documents, _ = ranges(first + 1, last - first)
    shift = np.repeat(pieces.places - pieces.starts, last - first)
    return shard.starts_of(documents) + shift
