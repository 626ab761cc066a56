"""Sampling follows the requested distribution and doesn't depend on the rest of the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megamor.serve.engine import sampler
from megamor.serve.engine.request import SamplingParams
from megamor.serve.engine.sampler import MANY_TOKENS, NO_TOKEN, Draw, adjusted, logprobs_of, noised, sample, truncated

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9, -3.0, 1.9, 0.0], dtype=torch.float64)
COUNT = 20_000


def frequencies(params: SamplingParams) -> torch.Tensor:
    """Frequencies of tokens over many positions of one request."""
    draws = [Draw(params, 3, 0, range(position), 1) for position in range(1, COUNT + 1)]
    return sample(LOGITS.expand(COUNT, -1), draws).bincount(minlength=len(LOGITS)) / COUNT


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), {0, 1, 2, 3, 4, 5, 6, 7}),
        (SamplingParams(temperature=0.5), {0, 1, 2, 3, 4, 5, 6, 7}),
        (SamplingParams(top_k=3), {1, 6, 3}),
        (SamplingParams(top_p=0.6), {1, 6}),
        (SamplingParams(top_p=0.01), {1}),
        (SamplingParams(min_p=0.4), {1, 6, 3}),
        (SamplingParams(top_k=3, top_p=0.5, temperature=2.0), {1, 6}),
    ],
)
def test_tokens_have_their_probabilities(params: SamplingParams, kept: set[int]) -> None:
    wanted = torch.tensor([z / params.temperature if i in kept else -math.inf for i, z in enumerate(LOGITS.tolist())])
    found, wanted = frequencies(params), wanted.softmax(-1)
    assert set(found.nonzero().flatten().tolist()) <= kept
    # Four standard deviations of each frequency.
    assert bool(((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / COUNT).sqrt() + 1e-9).all())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.5, repetition_penalty=1.5, presence_penalty=1.0),
        SamplingParams(min_p=0.1),
    ]
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = [Draw(params, 7, number, [1, 2, 3, 3], 2) for number, params in enumerate(kinds)]
    together = sample(logits, draws).tolist()
    assert together == [sample(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
    assert together == sample(logits.flip(0), draws[::-1]).tolist()[::-1]


def test_noise_differs_by_seed_continuation_and_position() -> None:
    logits = torch.zeros(1, 10_000, dtype=torch.float64)
    places = [(seed, index, length) for seed in (1, 2) for index in (0, 1) for length in (1, 2)]
    found = {int(sample(logits, [Draw(SamplingParams(), seed, index, [0] * n, 1)])) for seed, index, n in places}
    assert len(found) == len(places)


def test_a_processor_and_bans_come_first() -> None:
    params = SamplingParams(temperature=0, logits_processor=lambda tokens, logits: -logits)
    assert sample(LOGITS.unsqueeze(0), [Draw(params, 0, 0, [0], 1)]).tolist() == [5]
    assert sample(LOGITS.unsqueeze(0), [Draw(params, 0, 0, [0], 1, banned=(5,))]).tolist() == [2]


def test_allowed_tokens() -> None:
    draw = Draw(SamplingParams(temperature=0, allowed_token_ids=(2, 7, 0), logit_bias={7: 1.0}), 0, 0, [0], 1)
    kept = adjusted(LOGITS.unsqueeze(0), [draw])[0].tolist()
    assert kept == [0.3, -math.inf, -1.0, -math.inf, -math.inf, -math.inf, -math.inf, 1.0]
    assert sample(LOGITS.unsqueeze(0), [draw]).tolist() == [7]
    assert sample(LOGITS.unsqueeze(0), [replace(draw, banned=(7,))]).tolist() == [0]
    found = frequencies(SamplingParams(allowed_token_ids=(3, 4)))
    assert found[[3, 4]].tolist() == pytest.approx(LOGITS[[3, 4]].softmax(-1).tolist(), abs=0.015)


def test_penalties_by_hand() -> None:
    """Repetition counts the prompt and makes every token less likely; presence and frequency count new tokens only."""
    before = LOGITS.unsqueeze(0).clone()
    draw = Draw(SamplingParams(repetition_penalty=2.0), 0, 0, [1, 2, 2], 1)
    assert adjusted(before, [draw])[0].tolist() == [0.3, 1.0, -2.0, 1.2, 0.9, -3.0, 1.9, 0.0]
    draw = Draw(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), 0, 0, [1, 2, 2, 6], 1)
    assert adjusted(before, [draw])[0].tolist() == [0.3, 2.0, -1.0 - 0.5 - 2 * 0.25, 1.2, 0.9, -3.0, 1.9 - 0.75, 0.0]
    assert torch.equal(before[0], LOGITS)


def test_logprobs() -> None:
    (found,) = logprobs_of(LOGITS.unsqueeze(0), [3], [2])
    table = LOGITS.log_softmax(-1)
    assert found.logprob == pytest.approx(table[3].item())
    assert found.rank == 3
    assert [token for token, _ in found.top] == [1, 6]


def test_every_token_stays_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """With top_p = 1 also those behind a sum that rounds to 1, beside a row with less; and whatever the hash is."""
    logits = torch.tensor([[60.0, 0.0, -60.0]] * 2, dtype=torch.float32)
    kept = truncated(logits, [SamplingParams(), SamplingParams(top_p=0.5)]) > -math.inf
    assert kept.tolist() == [[True, True, True], [True, False, False]]
    monkeypatch.setattr(sampler, "uniform_hash", lambda keys: torch.zeros(keys.shape, dtype=torch.float64))
    assert bool(noised(logits, [1, 2]).isfinite().all())


def large_rows() -> torch.Tensor:
    """Rows of a large vocabulary: ordinary, flat, peaked, of many equal logits, of few tokens, NaN, infinite, empty."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(8, MANY_TOKENS + 5, generator=generator)
    rows *= torch.tensor([3.0, 0.01, 30.0, 2.0, 1.0, 3.0, 3.0, 1.0]).unsqueeze(1)
    rows[3] = rows[3].round()
    rows[4, 5:] = rows[7] = -math.inf
    rows[5, 77], rows[6, 99] = math.nan, math.inf
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.2},
        {"top_k": 50},
        {"top_k": 1024},
        {"top_k": 3000, "top_p": 0.8},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"top_k": 300, "top_p": 0.5, "min_p": 0.01},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_shortcuts_of_a_cpu_change_no_token(settings: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, params = large_rows(), SamplingParams(**settings)
    # The last of the same request with neighbours of other settings.
    mixed = [SamplingParams(), SamplingParams(top_k=7), params]
    draws = [[Draw(params, seed, 0, [1], 1) for _ in rows] for seed in range(20)]
    draws.append([Draw(mixed[row % 3], 5, 0, [1], 1) for row in range(len(rows))])
    found = [sample(rows, some).tolist() for some in draws], truncated(rows, [params] * len(rows))
    monkeypatch.setattr(sampler, "MANY_TOKENS", 2 * MANY_TOKENS)
    wanted = [sample(rows, some).tolist() for some in draws], truncated(rows, [params] * len(rows))
    assert found[0] == wanted[0]
    assert {tokens[row] for tokens in found[0] for row in (5, 7)} == {NO_TOKEN}
    assert {tokens[6] for tokens in found[0]} == {99}
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0, equal_nan=True)
