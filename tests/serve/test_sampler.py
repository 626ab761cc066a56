"""Sampling follows the requested distribution and doesn't depend on the rest of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from megamor.serve.engine import sampler
from megamor.serve.engine.request import SamplingParams
from megamor.serve.engine.sampler import Draw, adjusted, gumbel, logprobs_of, sample, truncated

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
    assert bool(gumbel([1, 2], logits).isfinite().all())
