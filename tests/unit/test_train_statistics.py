"""The figures of a step compared with values calculated by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megamor.evaluate.loss import perplexity
from megamor.model import ModelOutput
from megamor.routing import Ratio
from megamor.train.step_statistics import StepStatistics, StepSummary


def output(loss: float, tokens: int, aux: float, agree: float, depth: list[int]) -> ModelOutput:
    """The output of a micro-batch of one sequence."""
    return ModelOutput(
        logits=None,
        loss_sum=torch.tensor(loss),
        num_tokens=torch.tensor(tokens),
        router_losses={"aux_loss": torch.tensor(aux)},
        ratios={"agreement": Ratio(torch.tensor(agree), torch.tensor(float(len(depth))))},
        totals={"depth_choices": torch.bincount(torch.tensor(depth), minlength=4)[1:].float()},
        depth=torch.tensor([depth]),
        work=torch.tensor([[sum(d > r for d in depth), 10.0] for r in range(3)]),
    )


def summary(counts: list[float]) -> StepSummary:
    """A step in which `counts` tokens took each number of recursions."""
    return StepSummary(1.0, 1, {}, {}, counts, [])


def test_sums_over_micro_batches() -> None:
    statistics = StepStatistics(3)
    statistics.add(output(loss=6.0, tokens=3, aux=0.5, agree=4.0, depth=[1, 2, 3, 3]))
    statistics.add(output(loss=2.0, tokens=1, aux=0.1, agree=1.0, depth=[1, 1, 1, 2]))
    pending = statistics.reduce(torch.tensor(0.5))
    step = pending.wait()
    assert step.loss == 2.0
    assert step.num_tokens == 4
    assert step.grad_norm == 0.5
    assert step.router_losses == {"aux_loss": pytest.approx(0.3)}
    assert step.ratios == {"agreement": 5 / 8}
    assert step.depth_counts == [0, 4, 2, 2]
    assert step.work == [(8, 20), (4, 20), (2, 20)]
    assert pending.totals["depth_choices"].tolist() == [4, 2, 2]
    assert step.mean_depth == (4 * 1 + 2 * 2 + 2 * 3) / 8


def test_padding_has_no_depth() -> None:
    """Padding is marked by -1; a token that skips the core has depth 0."""
    statistics = StepStatistics(3)
    for depths in ([1, 3, -1, -1], [0, 2, 2, -1]):
        one = output(loss=1.0, tokens=2, aux=0.0, agree=0.0, depth=[1])
        statistics.add(one._replace(depth=torch.tensor([depths])))
    step = statistics.reduce(torch.tensor(0.5)).wait()
    assert step.depth_counts == [1, 1, 2, 1]
    assert step.mean_depth == (1 + 2 * 2 + 3) / 5


def test_every_token_has_the_same_weight() -> None:
    statistics = StepStatistics(3)
    statistics.add(output(loss=9.0, tokens=3, aux=0.0, agree=0.0, depth=[1]))
    statistics.add(output(loss=1.0, tokens=1, aux=0.0, agree=0.0, depth=[1]))
    assert statistics.reduce(torch.tensor(0.5)).wait().loss == 2.5


def test_counts_stay_exact_beyond_fp32() -> None:
    statistics = StepStatistics(3)
    for tokens in (2**24, 1):
        statistics.add(output(loss=1.0, tokens=tokens, aux=0.0, agree=0.0, depth=[1]))
    assert statistics.reduce(torch.tensor(0.5)).wait().num_tokens == 2**24 + 1


def test_balanced_depths() -> None:
    metrics = summary([0, 5, 5, 5]).routing_metrics()
    assert metrics["routing/entropy"] == pytest.approx(math.log(3))
    assert metrics["routing/max_violation"] == pytest.approx(0)
    assert metrics["routing/dead_depths"] == 0
    assert metrics["routing/mean_depth"] == pytest.approx(2)


def test_collapsed_depths() -> None:
    metrics = summary([0, 0, 12, 0]).routing_metrics()
    assert metrics["routing/entropy"] == 0
    assert metrics["routing/max_violation"] == pytest.approx(2)  # three times its target fraction
    assert metrics["routing/dead_depths"] == pytest.approx(2 / 3)
    assert metrics["depth/2"] == 1


def test_a_depth_below_a_thousandth_is_dead() -> None:
    assert summary([0, 9989, 0, 11]).routing_metrics()["routing/dead_depths"] == pytest.approx(1 / 3)
    assert summary([0, 9991, 0, 9]).routing_metrics()["routing/dead_depths"] == pytest.approx(2 / 3)


def test_tokens_that_skip_the_core_are_a_depth_of_their_own() -> None:
    metrics = summary([2, 6, 0, 0]).routing_metrics()
    assert metrics["depth/0"] == 0.25
    assert metrics["routing/mean_depth"] == 0.75
    assert metrics["routing/entropy"] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert metrics["routing/max_violation"] == pytest.approx(2)


def test_a_vanilla_model_has_no_routing() -> None:
    step = summary([])
    assert step.routing_metrics() == {}
    assert step.mean_depth is None


def test_perplexity_of_a_lost_run_is_infinite() -> None:
    assert perplexity(math.log(50.0)) == pytest.approx(50)
    assert perplexity(1000.0) == math.inf
