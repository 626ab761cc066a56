"""The n-gram floors: proper distributions, counts of exactly the predicted tokens, hand-computed probabilities."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megamor.errors import DataError
from megamor.evaluate.ngram import NGramModel, _discounts, _grams, count_table_accuracy

VOCAB = 11


@pytest.fixture
def windows() -> np.ndarray:
    """A Zipf-like sample [40, 17] in which token 10 never occurs, so unseen tokens and contexts exist."""
    rng = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, VOCAB)
    return rng.choice(VOCAB - 1, size=(40, 17), p=weights / weights.sum())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_distributions_sum_to_one(windows: np.ndarray, order: int) -> None:
    model = NGramModel.fit(windows, order, VOCAB)
    seen = windows[:30, : order - 1]
    unseen = np.full((1, order - 1), VOCAB - 1)
    half_seen = np.full((1, order - 1), VOCAB - 1)
    half_seen[:, -1:] = 0
    for context in np.concatenate([seen, unseen, half_seen]):
        probabilities = model.probabilities(np.tile(context, (VOCAB, 1)), np.arange(VOCAB))
        assert probabilities.min() > 0
        assert math.isclose(probabilities.sum(), 1.0, rel_tol=1e-12)


def test_empty_counts_of_counts_still_give_distributions() -> None:
    windows = np.array([[1, 2, 1, 2, 1, 2, 1, 2]])
    model = NGramModel.fit(windows, 2, VOCAB)
    probabilities = model.probabilities(np.full((VOCAB, 1), 1), np.arange(VOCAB))
    assert probabilities.min() > 0
    assert math.isclose(probabilities.sum(), 1.0, rel_tol=1e-12)


def test_unigram_by_hand() -> None:
    # Targets 1 1 1 2: counts 3 and 1. No count of 2, so every discount is 0.5; 2 * 0.5 of 4 goes to the uniform.
    model = NGramModel.fit(np.array([[7, 1, 1, 1, 2]]), 1, 10)
    expected = {1: 2.5 / 4 + 0.25 * 0.1, 2: 0.5 / 4 + 0.25 * 0.1, 7: 0.25 * 0.1}
    got = model.probabilities(np.zeros((3, 0)), np.array(list(expected)))
    np.testing.assert_allclose(got, list(expected.values()), rtol=1e-12)


def test_bigram_by_hand_backs_off_to_how_many_contexts_a_token_follows() -> None:
    # Bigrams 1→2 twice, 2→1 once, 1→3 once, 3→3 twice. n1 = 2, n2 = 2: Ney's discount 2 / (2 + 4) = 1/3.
    model = NGramModel.fit(np.array([[1, 2, 1, 2], [1, 3, 3, 3]]), 2, 4)
    # Distinct predecessors: token 1 one, token 2 one, token 3 two; so n1 = 2, n2 = 1: discount 2 / (2 + 2) = 1/2.
    lower = {2: (1 - 0.5) / 4 + 1.5 / 4 / 4, 3: (2 - 0.5) / 4 + 1.5 / 4 / 4, 0: 1.5 / 4 / 4}
    # Context 1 was followed three times, by two different tokens.
    left_over = 2 * (1 / 3) / 3
    expected = [(2 - 1 / 3) / 3 + left_over * lower[2], (1 - 1 / 3) / 3 + left_over * lower[3], left_over * lower[0]]
    np.testing.assert_allclose(model.probabilities([[1], [1], [1]], [2, 3, 0]), expected, rtol=1e-12)


def test_each_token_is_counted_once_although_windows_overlap() -> None:
    stream = np.arange(13)
    windows = np.stack([stream[start : start + 5] for start in (0, 4, 8)])
    assert sorted(_grams(windows, 1, 100)) == list(range(1, 13))
    # Only the grams that lie inside one window: no 3 4 5 and no 7 8 9.
    trigrams = {(gram // 10_000, gram // 100 % 100, gram % 100) for gram in _grams(windows, 3, 100).tolist()}
    assert trigrams == {(i, i + 1, i + 2) for i in range(11) if i not in (3, 7)}


def test_nll_is_the_mean_over_positions_with_the_context_of_the_window(windows: np.ndarray) -> None:
    trigram, bigram = (NGramModel.fit(windows[:30], order, VOCAB) for order in (3, 2))
    held_out = windows[30:]
    nats = []
    for row in held_out:
        nats.append(-math.log(bigram.probabilities([row[:1]], row[1:2])[0]))
        nats.extend(-math.log(trigram.probabilities([row[i - 2 : i]], row[i : i + 1])[0]) for i in range(2, len(row)))
    assert len(nats) == held_out.shape[0] * (held_out.shape[1] - 1)
    assert math.isclose(trigram.nll(held_out), sum(nats) / len(nats), rel_tol=1e-12)
    assert math.isclose(trigram.nll(iter(held_out)), trigram.nll(held_out), rel_tol=1e-12)


def test_higher_orders_learn_what_lower_orders_cannot() -> None:
    # A second-order source: the next token is the sum of the last two, so one token of context helps little.
    rng = np.random.default_rng(1)
    windows = np.zeros((300, 33), dtype=np.uint16)
    windows[:, :2] = rng.integers(0, 7, size=(300, 2))
    for position in range(2, 33):
        windows[:, position] = windows[:, position - 2 : position].sum(1) % 7
    unigram, bigram, trigram = (NGramModel.fit(windows[:200], order, 7).nll(windows[200:]) for order in (1, 2, 3))
    assert unigram == pytest.approx(math.log(7), abs=0.05)
    assert bigram == pytest.approx(math.log(7), abs=0.05)
    # Only the first target of each window, 1 in 32, stays unknown.
    assert trigram == pytest.approx(math.log(7) / 32, abs=0.02)


def test_discounts_follow_chen_and_goodman() -> None:
    counts = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] * 1 + [9])
    single = 8 / (8 + 2 * 4)
    expected = [0, 1 - 2 * single * 4 / 8, 2 - 3 * single * 2 / 4, 3 - 4 * single * 1 / 2]
    np.testing.assert_allclose(_discounts(counts), expected)


def test_bad_windows_are_refused() -> None:
    with pytest.raises(DataError, match="5 entries"):
        NGramModel.fit(np.array([[1, 2, 5]]), 2, 5)
    with pytest.raises(DataError, match="whole window"):
        NGramModel.fit(np.zeros((0, 8), dtype=np.int64), 2, 5)
    with pytest.raises(DataError, match="-1"):
        NGramModel.fit(np.array([[1, 2, 3]]), 2, 5).nll(np.array([[1, -1, 3]]))


def test_count_tables_by_hand() -> None:
    # After 1: 2 twice, 3 once. After 2: 1 twice. 1 and 2 are equally frequent, and 1 comes first.
    train = [1, 2, 1, 2, 1, 3, 3, 2]
    test = [2, 1, 2, 0, 1, 3]
    assert count_table_accuracy(train, test, 0, 4) == 2 / 6  # 1 everywhere
    assert count_table_accuracy(train, test, 1, 4) == 2 / 5  # 2→1, 1→2; 0 is new; 2→0 and 1→3 are wrong
    assert count_table_accuracy(train, test, 1, 4, back_off=True) == 3 / 5  # after 0: the most frequent token, 1
    # 21→2 is right, 12→1 wrong; 20 and 01 are new, and their last tokens predict 1 (right) and 2 (wrong).
    assert count_table_accuracy(train, test, 2, 4) == 1 / 4
    assert count_table_accuracy(train, test, 2, 4, back_off=True) == 2 / 4


def test_count_tables_take_any_vocabulary_and_context() -> None:
    """Keys never overflow: ids near 2**31 with eight tokens of context, against a plain dictionary."""
    rng = np.random.default_rng(0)
    ids = rng.choice(4, 400) + (2**31 - 5)
    train, test = ids[:300].tolist(), ids[300:].tolist()
    for context in (0, 2, 8):
        table: dict[tuple[int, ...], Counter[int]] = {}
        for index in range(context, len(train)):
            table.setdefault(tuple(train[index - context : index]), Counter())[train[index]] += 1
        best = {key: counts.most_common(1)[0][0] for key, counts in table.items()}
        hits = [best.get(tuple(test[i - context : i])) == test[i] for i in range(context, len(test))]
        assert count_table_accuracy(train, test, context, 2**31) == sum(hits) / len(hits)


def test_count_tables_of_a_known_text() -> None:
    """Tiny Shakespeare, first 90 % and last 10 % of the characters: figures that are often quoted as floors."""
    path = Path(os.environ.get("MEGAMOR_TEXTS", "../shared/data")) / "tinyshakespeare/input.txt"
    if not path.exists():
        pytest.skip("MEGAMOR_TEXTS names no directory of texts")
    characters = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    split = int(0.9 * len(characters))
    train, test = characters[:split], characters[split:]
    plain = [round(100 * count_table_accuracy(train, test, context, 256), 2) for context in (0, 1, 4, 5)]
    assert plain == [14.90, 26.98, 51.19, 49.53]
    assert round(100 * count_table_accuracy(train, test, 4, 256, back_off=True), 2) == 52.46


def test_count_tables_refuse_too_little_text() -> None:
    with pytest.raises(DataError, match="2 tokens of context needs more tokens than 2 for training and 9 for the test"):
        count_table_accuracy([0, 1], [0] * 9, 2, 2)
    with pytest.raises(DataError, match="span 0 to 2, the vocabulary has 2"):
        count_table_accuracy([0, 1, 2], [0] * 9, 1, 2)
