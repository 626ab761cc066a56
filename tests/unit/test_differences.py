"""Recursions of a shared core that differ by an embedding, by their own norms or by LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamor.config import Config
from megamor.config.derive import derive
from megamor.model import build_model
from megamor.model.flops import executed_flops
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens
from tests.decoding.test_cached_decoding import check as check_decoding
from tests.learning.test_learning import profile, rectangular_work

OPTIONS: dict[str, dict[str, Any]] = {
    "embedding": {"recursion_embedding": True},
    "norms": {"separate_norms": True},
    "lora": {"lora_rank": 3},
    "injection": {"input_injection": True},
    "all": {"recursion_embedding": True, "separate_norms": True, "lora_rank": 3, "input_injection": True},
}


def config_with(option: str, router: str = "expert_choice", kv_policy: str = "recursion_wise") -> Config:
    config = tiny_config(ROUTERS[router], kv_policy)
    return replace(config, recursion=replace(config.recursion, **OPTIONS[option]))


@pytest.mark.parametrize("option", OPTIONS)
def test_parameters_follow_the_formula(option: str) -> None:
    config = config_with(option)
    assert build_model(config).num_parameters() == derive(config, 1).unique_parameters_with_embedding


@pytest.mark.parametrize("option", OPTIONS)
def test_starts_as_the_plain_model(option: str) -> None:
    """At first embeddings and updates are zero and norms one, so the model equals one without them."""
    model, plain = build_model(config_with(option)), build_model(tiny_config(ROUTERS["expert_choice"]))
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, atol=0, rtol=0)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_recursion_learns_its_own(option: str) -> None:
    model, ids = build_model(config_with(option)), tokens(length=SEQ_LEN + 1)
    markers = ("others", ".up.", "_embedding", "injection")
    own = [name for name in model.state_dict() if any(marker in name for marker in markers)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).loss_sum.backward()
        optimizer.step()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert own
    assert all(gradients[name] is not None and gradients[name].abs().max() > 0 for name in own)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_cached_decoding(kv_policy: str) -> None:
    check_decoding(lively_model(config_with("all", kv_policy=kv_policy)), [9] + [1] * (SEQ_LEN - 9))


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_flops_match_the_profiler(kv_policy: str) -> None:
    config = config_with("lora", kv_policy=kv_policy)
    out, profiled = profile(build_model(config), tokens())
    counted = executed_flops(config, BATCH, rectangular_work(config, out)).forward
    counted += 2 * 4 * config.model.dim * BATCH * (SEQ_LEN**2 - SEQ_LEN * (SEQ_LEN + 1) / 2)
    assert profiled == pytest.approx(counted, rel=0.01)
