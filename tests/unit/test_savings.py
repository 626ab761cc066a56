"""What routing saves: nothing at full depth, otherwise the FLOPs of the skipped recursions."""

from __future__ import annotations

import pytest
import torch

from megamor.data.loader import MicroBatch
from megamor.evaluate.savings import at_full_depth, measure_savings
from megamor.model.flops import nominal_flops
from tests.combinations import BATCH, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens


def batch() -> MicroBatch:
    ids = tokens(length=SEQ_LEN)
    return MicroBatch(ids, ids.roll(-1, dims=1))


@pytest.mark.parametrize("router", ROUTERS)
def test_full_depth_is_the_recursive_model_with_the_same_weights(router: str) -> None:
    model = lively_model(tiny_config(ROUTERS[router]))
    full = at_full_depth(model)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in full.state_dict().items())
    with torch.no_grad():
        depth = full(batch().inputs, mode="causal").depth
    assert (depth == model.config.recursion.num_recursions).all()


def test_figures_are_the_flops_of_both_models() -> None:
    config = tiny_config(ROUTERS["expert_choice"])
    figures = measure_savings(lively_model(config), [batch(), batch()], rounds=1)
    full = nominal_flops(at_full_depth(lively_model(config)).config, BATCH).forward / (BATCH * SEQ_LEN)
    assert figures["full_depth_flops_per_token"] == pytest.approx(full)
    assert figures["flops_ratio"] == pytest.approx(figures["flops_per_token"] / full)
    assert figures["flops_ratio"] < 1
    fixed = measure_savings(lively_model(tiny_config(ROUTERS["fixed"])), [batch()], rounds=1)
    assert fixed["flops_ratio"] == 1
