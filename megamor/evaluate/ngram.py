"""N-gram language models: the floor that a trained network has to beat.

A model of order n is estimated from the very windows that the network was trained on and is judged on the very
positions at which the network is judged, so that their losses can be set side by side. Smoothing is interpolated
Kneser-Ney with three discounts per order (Chen and Goodman 1999, "An empirical study of smoothing techniques for
language modeling", sections 4.1.6 and 4.1.7), which is hard to improve on at these orders.

An n-gram is one int64, its tokens read as digits in base `vocab_size`; a table is a sorted array of such keys, so that
counting is a sort and looking up is a binary search.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamor.errors import DataError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Windows = npt.NDArray[np.integer] | Iterable[npt.NDArray[np.integer]]

_NLL_CHUNK_WINDOWS = 4096


@dataclass(frozen=True)
class _Level:
    """p(token | context) of one context length, still to be interpolated with the next shorter context.

    `grams` and `contexts` are sorted keys; `share[i]` is (count - discount) / total of gram i, and `backoff[j]` is what
    the discounts of context j leave for the shorter context.
    """

    grams: IntArray
    share: FloatArray
    contexts: IntArray
    backoff: FloatArray

    @classmethod
    def from_counts(cls, grams: IntArray, counts: IntArray, vocab_size: int) -> _Level:
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        contexts, first = np.unique(grams // vocab_size, return_index=True)
        if not len(grams):
            return cls(grams, np.zeros(0), contexts, np.zeros(0))
        totals = np.add.reduceat(counts, first)
        members = np.diff(np.append(first, len(grams)))
        share = (counts - discounts) / np.repeat(totals, members)
        return cls(grams, share, contexts, np.add.reduceat(discounts, first) / totals)

    def interpolate(self, grams: IntArray, shorter: FloatArray, vocab_size: int) -> FloatArray:
        """Mix this level's estimate of each gram with the `shorter` context's; an unseen context leaves `shorter`."""
        share = _look_up(self.grams, self.share, grams, missing=0.0)
        backoff = _look_up(self.contexts, self.backoff, grams // vocab_size, missing=1.0)
        return share + backoff * shorter


class NGramModel:
    """Interpolated Kneser-Ney model of `order` tokens (1 unigram, 2 bigram, 3 trigram) over `vocab_size` entries."""

    def __init__(self, levels: list[_Level], vocab_size: int, shorter: NGramModel | None) -> None:
        self.order = len(levels)
        self.vocab_size = vocab_size
        self._levels = levels
        self._shorter = shorter

    @classmethod
    def fit(cls, windows: Windows, order: int, vocab_size: int) -> NGramModel:
        """Estimate from `windows` [n, seq_len + 1] of token ids.

        Counted are the tokens that a network predicts from a window, positions 1 to seq_len, each with up to
        `order - 1` tokens before it in the same window. Neighbouring windows share one token, which is thus a target in
        one and only a context in the other. Give each window once, even where the network has seen it in two epochs.

        Raises:
            DataError: no windows, windows too short, or a token outside the vocabulary.
        """
        return cls._fit_checked(_checked(windows, vocab_size), order, vocab_size)

    @classmethod
    def _fit_checked(cls, windows: IntArray, order: int, vocab_size: int) -> NGramModel:
        grams, counts = np.unique(_grams(windows, order, vocab_size), return_counts=True)
        levels = [_Level.from_counts(grams, counts, vocab_size)]
        for length in range(order - 1, 0, -1):
            # Kneser-Ney: a shorter gram counts once for each different token that it follows.
            grams, counts = np.unique(grams % vocab_size**length, return_counts=True)
            levels.append(_Level.from_counts(grams, counts, vocab_size))
        # The window's first targets have fewer than order - 1 tokens before them: a model of that order predicts them.
        shorter = cls._fit_checked(windows, order - 1, vocab_size) if order > 1 else None
        return cls(levels[::-1], vocab_size, shorter)

    def probabilities(self, contexts: npt.ArrayLike, tokens: npt.ArrayLike) -> FloatArray:
        """p(token | context) for `contexts` [n, order - 1] and `tokens` [n]; sums to 1 over the vocabulary."""
        grams = np.asarray(tokens, dtype=np.int64)
        contexts = np.asarray(contexts, dtype=np.int64).reshape(len(grams), self.order - 1)
        for position in range(self.order - 1):
            grams = grams + contexts[:, -1 - position] * self.vocab_size ** (position + 1)
        return self._probabilities(grams)

    def nll(self, windows: Windows) -> float:
        """Mean nats per predicted token over `windows` [n, seq_len + 1]: positions 1 to seq_len, as in `fit`."""
        checked = _checked(windows, self.vocab_size)
        total = sum(
            self._nll_sum(checked[start : start + _NLL_CHUNK_WINDOWS])
            for start in range(0, len(checked), _NLL_CHUNK_WINDOWS)
        )
        return total / (checked.shape[0] * (checked.shape[1] - 1))

    def _nll_sum(self, windows: IntArray) -> float:
        nats = -float(np.log(self._probabilities(_grams(windows, self.order, self.vocab_size))).sum())
        if self._shorter is not None and self.order > 2:
            nats += self._shorter._nll_sum(windows[:, : self.order - 1])
        return nats

    def _probabilities(self, grams: IntArray) -> FloatArray:
        probability = np.full(len(grams), 1.0 / self.vocab_size)
        for length, level in enumerate(self._levels, start=1):
            probability = level.interpolate(grams % self.vocab_size**length, probability, self.vocab_size)
        return probability


def _checked(windows: Windows, vocab_size: int) -> IntArray:
    """The windows as one int64 array [n, seq_len + 1] whose tokens all lie in the vocabulary."""
    rows = windows if isinstance(windows, np.ndarray) else list(windows)
    array = np.asarray(rows, dtype=np.int64)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] < 2:
        raise DataError(
            f"an n-gram model needs windows [n >= 1, seq_len + 1 >= 2], found shape {array.shape}: "
            "check that the data set has at least one whole window"
        )
    if array.min() < 0 or array.max() >= vocab_size:
        raise DataError(
            f"token ids span {array.min()} to {array.max()}, the vocabulary has {vocab_size} entries: "
            "use the tokenizer that wrote the data"
        )
    return array


def _grams(windows: IntArray, order: int, vocab_size: int) -> IntArray:
    """Keys of all targets that have `order - 1` tokens before them in their window, as a flat array.

    Position 0 is never a target, so unigrams are counted from position 1.
    """
    first = max(order - 1, 1)
    width = max(windows.shape[1] - first, 0)
    grams = np.zeros((windows.shape[0], width), dtype=np.int64)
    for offset in range(order):
        start = first - order + 1 + offset
        grams = grams * vocab_size + windows[:, start : start + width]
    return grams.ravel()


def _discounts(counts: IntArray) -> FloatArray:
    """Discounts for counts 0, 1, 2 and 3-or-more, from the counts of counts (Chen and Goodman 1999, equation 26).

    Where a small corpus leaves one of the four counts of counts empty, the single discount of Ney takes their place;
    0.5 where even that can't be estimated.
    """
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    single = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, single, single, single])
    estimates = [1 - 2 * single * n2 / n1, 2 - 3 * single * n3 / n2, 3 - 4 * single * n4 / n3]
    # At least a little must be left over, or a token unseen after its context has probability 0.
    return np.array([0.0, *(min(max(estimate, 0.05), bound) for bound, estimate in enumerate(estimates, start=1))])


def _look_up(keys: IntArray, values: FloatArray, wanted: IntArray, missing: float) -> FloatArray:
    """`values` of the `wanted` keys, `missing` for those that the sorted `keys` lack."""
    if not len(keys):
        return np.full(len(wanted), missing)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], missing)
