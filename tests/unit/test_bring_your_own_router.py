"""The tests run on a custom router as docs/routers.md describes, and fail for one that looks ahead."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamor.config import CustomRouterConfig, load_config
from megamor.model import build_model
from megamor.routing import InferenceRule, Mix, Router, RoutingContext, RoutingPlan, RoutingSession, TokenSet
from tests.causality import test_causality
from tests.combinations import KV_POLICIES, ROUTERS
from tests.decoding import test_cached_decoding

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def test_the_example_passes_every_battery() -> None:
    """Run the command of docs/routers.md."""
    environment = {"MEGAMOR_ROUTER": "alternating_router:Alternating", "PYTHONPATH": str(EXAMPLES)}
    batteries = ["tests/causality", "tests/learning", "tests/decoding"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *batteries, "-k", "custom", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 80


class Peeking(Router):
    """Selects a token if the sum of the *next* token's hidden state is positive."""

    causal_in_training = True

    def __init__(self, options: dict[str, float], dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.ahead = int(options["ahead"])

    @property
    def inference_rule(self) -> InferenceRule:
        return InferenceRule("peeking")

    def begin(self, rows: Tensor, context: RoutingContext) -> PeekingSession:
        return PeekingSession(self, rows, context)


class PeekingSession(RoutingSession):
    def __init__(self, router: Peeking, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(context)
        self.continues = rows.detach().roll(-router.ahead, dims=0).sum(-1) > 0

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        if recursion == 0:
            return RoutingPlan(candidates, None, Mix())
        tokens, indices = candidates.where(candidates.gather(self.continues))
        return RoutingPlan(tokens, indices, Mix())


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_router_that_looks_ahead_fails(ahead: int, kv_policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same router passes if it looks at the token itself, so the tests fail only because of looking ahead."""
    target = "tests.unit.test_bring_your_own_router:Peeking"
    monkeypatch.setitem(ROUTERS, "custom", CustomRouterConfig(target=target, options={"ahead": ahead}))
    for battery, argument in (
        (test_causality.test_logits_ignore_later_tokens, False),
        (test_cached_decoding.test_prefill_and_steps_equal_the_full_pass, torch.float64),
    ):
        with pytest.raises(AssertionError) if ahead else nullcontext():
            battery("custom", kv_policy, "middle_cycle", argument)


def test_the_configuration_of_the_example_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    config = load_config(EXAMPLES / "alternating_router.yaml")
    with torch.no_grad():
        out = build_model(config)(torch.zeros(1, 6, dtype=torch.int64))
    assert out.depth.tolist() == [[3, 1, 3, 1, 3, 1]]
