"""N-gram language models: the baseline that a trained network has to beat.

A model of order n is estimated from the windows that the network was trained on and evaluated at the positions where
the network is evaluated, so their losses can be compared directly. Smoothing is interpolated Kneser-Ney with three
discounts per order (Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling",
sections 4.1.6 and 4.1.7), which is hard to improve on at these orders.

An n-gram is stored as one int64 key: its tokens are the digits of a number in base `vocab_size`. A table is a sorted
array of keys, so counting is a sort and a lookup is a binary search.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamor.errors import DataError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
PADDING = -100
"""What follows a window that is shorter than the others."""
Windows = npt.NDArray[np.integer] | Iterable[npt.NDArray[np.integer]]


@dataclass(frozen=True)
class _Level:
    """p(token | context) for one context length, before interpolation with the next shorter context.

    `grams` and `contexts` are sorted keys. `weight[i]` is (count - discount) / total of gram i, and `backoff[j]` is the
    probability mass that the discounts take from context j and give to the shorter context.
    """

    grams: IntArray
    weight: FloatArray
    contexts: IntArray
    backoff: FloatArray

    @classmethod
    def from_counts(cls, grams: IntArray, counts: IntArray, vocab_size: int) -> _Level:
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        # Keys are sorted, so the grams of one context are neighbours: `first` is where each context begins.
        contexts, first = np.unique(grams // vocab_size, return_index=True)
        if not len(grams):
            return cls(grams, np.zeros(0), contexts, np.zeros(0))
        totals = np.add.reduceat(counts, first)
        members = np.diff(np.append(first, len(grams)))
        weight = (counts - discounts) / np.repeat(totals, members)
        return cls(grams, weight, contexts, np.add.reduceat(discounts, first) / totals)

    def interpolate(self, grams: IntArray, shorter: FloatArray, vocab_size: int) -> FloatArray:
        """Mix this level's estimate of each gram with that of the `shorter` context; unseen contexts get only that."""
        weight = _look_up(self.grams, self.weight, grams, missing=0.0)
        backoff = _look_up(self.contexts, self.backoff, grams // vocab_size, missing=1.0)
        return weight + backoff * shorter


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

        Counts the tokens that a network predicts, positions 1 to seq_len of each window, each with up to `order - 1`
        tokens before it in the same window; -100 follows a window that is shorter. Neighbouring windows overlap by one
        token: it is a target in one and only context in the other. Pass each window once, even if the network has seen
        it in two epochs.

        Raises:
            DataError: there are no windows, they are too short, or a token lies outside the vocabulary.
        """
        windows = _checked(windows, vocab_size)
        grams, counts = np.unique(_grams(windows, order, vocab_size), return_counts=True)
        levels = [_Level.from_counts(grams, counts, vocab_size)]
        for length in range(order - 1, 0, -1):
            # Kneser-Ney: a shorter gram counts once for each different token that it follows.
            grams, counts = np.unique(grams % vocab_size**length, return_counts=True)
            levels.append(_Level.from_counts(grams, counts, vocab_size))
        # The first targets of a window have fewer than order - 1 tokens before them: a lower order predicts them.
        shorter = cls.fit(windows, order - 1, vocab_size) if order > 1 else None
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
        return self._nll_sum(checked) / float((checked[:, 1:] != PADDING).sum())

    def _nll_sum(self, windows: IntArray) -> float:
        nats = -float(np.log(self._probabilities(_grams(windows, self.order, self.vocab_size))).sum())
        # The first targets of a window have too few tokens before them: the next lower order predicts those.
        if self._shorter is not None and self.order > 2:
            nats += self._shorter._nll_sum(windows[:, : self.order - 1])
        return nats

    def _probabilities(self, grams: IntArray) -> FloatArray:
        # From the uniform distribution up: each level corrects the estimate of the one below.
        probability = np.full(len(grams), 1.0 / self.vocab_size)
        for length, level in enumerate(self._levels, start=1):
            probability = level.interpolate(grams % self.vocab_size**length, probability, self.vocab_size)
        return probability


def count_table_accuracy(
    train_ids: npt.ArrayLike, test_ids: npt.ArrayLike, context: int, vocab_size: int, back_off: bool = False
) -> float:
    """Fraction of the tokens of `test_ids` [m] that a table of counts over `train_ids` [n] predicts.

    The prediction is the token that followed the last `context` tokens most often in training, of several the first
    that did; `context` 0 is the most frequent token. A context that training doesn't have counts as a wrong prediction,
    so a longer table can be worse; with `back_off` its longest suffix that training has predicts instead, which is the
    harder floor. Only test tokens with `context` tokens before them count.

    Raises:
        DataError: fewer than `context` + 1 tokens in either, or a token lies outside the vocabulary.
    """
    train, test = np.asarray(train_ids, dtype=np.int64), np.asarray(test_ids, dtype=np.int64)
    if min(len(train), len(test)) <= context:
        raise DataError(
            f"a table of {context} tokens of context needs more tokens than {len(train)} for training and {len(test)} "
            "for the test: use a shorter context"
        )
    ids = _in_vocabulary(np.concatenate([train, test]), vocab_size)
    targets = np.arange(len(train) + context, len(ids))
    # number[i] stands for the `length` tokens before ids[i]. Numbered anew at each length, they never overflow.
    number = np.zeros(len(ids), dtype=np.int64)
    predicted = np.full(len(targets), -1)
    for length in range(context + 1):
        if length:
            grams = np.roll(number * vocab_size + ids, 1)
            number = np.unique(grams, return_inverse=True)[1].reshape(-1)
        seen = slice(length, len(train))
        grams, first, counts = np.unique(number[seen] * vocab_size + ids[seen], return_index=True, return_counts=True)
        by_count = grams[np.lexsort((-first, counts))]
        likeliest = np.full(len(ids), -1)
        likeliest[by_count // vocab_size] = by_count % vocab_size  # of repeated indices, the last one stays
        found = likeliest[number[targets]]
        predicted = np.where(found < 0, predicted, found) if back_off else found
    return float((predicted == ids[targets]).mean())


def _checked(windows: Windows, vocab_size: int) -> IntArray:
    """The windows as one int64 array [n, seq_len + 1] whose tokens all lie in the vocabulary."""
    array = np.asarray(windows if isinstance(windows, np.ndarray) else list(windows), dtype=np.int64)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] < 2:
        raise DataError(
            f"an n-gram model needs windows [n >= 1, seq_len + 1 >= 2], found shape {array.shape}: "
            "check that the data set has at least one whole window"
        )
    _in_vocabulary(array[array != PADDING], vocab_size)
    return array


def _in_vocabulary(ids: IntArray, vocab_size: int) -> IntArray:
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise DataError(
            f"token ids span {ids.min()} to {ids.max()}, the vocabulary has {vocab_size} entries: "
            "use the tokenizer that wrote the data"
        )
    return ids


def _grams(windows: IntArray, order: int, vocab_size: int) -> IntArray:
    """Return the keys of all targets that have `order - 1` tokens before them in their window, as a flat array.

    Position 0 is never a target, so unigrams are counted from position 1.
    """
    first = max(order - 1, 1)
    width = max(windows.shape[1] - first, 0)
    grams = np.zeros((windows.shape[0], width), dtype=np.int64)
    for offset in range(order):
        start = first - order + 1 + offset
        grams = grams * vocab_size + windows[:, start : start + width]
    found: IntArray = grams[windows[:, first:] != PADDING]
    return found


def _discounts(counts: IntArray) -> FloatArray:
    """Discounts for counts 0, 1, 2 and 3-or-more, from the counts of counts (Chen and Goodman 1999, equation 26).

    If one of the four counts of counts is zero, as in a small corpus, all three are Ney's single discount instead, or
    0.5 if even that can't be estimated.
    """
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    single = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, single, single, single])
    estimates = [1 - 2 * single * n2 / n1, 2 - 3 * single * n3 / n2, 3 - 4 * single * n4 / n3]
    # The discount must stay positive, or a token never seen after its context would get probability 0.
    return np.array([0.0, *(min(max(estimate, 0.05), bound) for bound, estimate in enumerate(estimates, start=1))])


def _look_up(keys: IntArray, values: FloatArray, wanted: IntArray, missing: float) -> FloatArray:
    """Return `values` at the `wanted` keys, `missing` where the sorted `keys` lack one."""
    if not len(keys):
        return np.full(len(wanted), missing)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], missing)
