"""The batteries run on a router of one's own, as docs/routers.md says, and refuse one that looks ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamor.config import load_config
from megamor.model import build_model
from megamor.routing import InferenceRule, Mix, Router, RoutingContext, RoutingPlan, RoutingSession, TokenSet

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
EXAMPLE = "alternating_router:Alternating"


def run_batteries(target: str, path: Path, selection: str, options: str = "{}") -> subprocess.CompletedProcess[str]:
    """The command of docs/routers.md."""
    environment = os.environ | {
        "MEGAMOR_ROUTER": target,
        "MEGAMOR_ROUTER_OPTIONS": options,
        "PYTHONPATH": str(path),
        "OMP_NUM_THREADS": "1",
    }
    command = "-m pytest -q -p no:cacheprovider tests/causality tests/learning tests/decoding -k".split()
    return subprocess.run(
        [sys.executable, *command, selection], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_example_passes_every_battery() -> None:
    result = run_batteries(EXAMPLE, EXAMPLES, "custom")
    assert result.returncode == 0, result.stdout[-3000:]
    num_passed = int(result.stdout.splitlines()[-1].split(" passed")[0].split()[-1])
    assert num_passed > 80


class Peeking(Router):
    """Sends a token on if the sum of the *next* token's state is positive."""

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
        self.goes_on = rows.detach().roll(-router.ahead, dims=0).sum(-1) > 0

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        if recursion == 0:
            return RoutingPlan(candidates, None, Mix())
        tokens, places = candidates.where(candidates.gather(self.goes_on))
        return RoutingPlan(tokens, places, Mix())


@pytest.mark.parametrize(("ahead", "outcome"), [(0, "passed"), (1, "failed")])
def test_a_router_that_looks_ahead_fails(ahead: int, outcome: str) -> None:
    """The same router passes once it looks at the token itself, so that it is the looking ahead that is caught."""
    selection = "custom and middle_cycle and (later_tokens or steps_equal) and fp64 or custom and later_tokens"
    result = run_batteries(
        "tests.unit.test_bring_your_own_router:Peeking", ROOT, selection, options=f'{{"ahead": {ahead}}}'
    )
    assert (result.returncode == 0) == (outcome == "passed"), result.stdout[-3000:]
    last = result.stdout.splitlines()[-1]
    assert outcome in last
    if outcome == "failed":
        for battery in ("test_logits_ignore_later_tokens", "test_prefill_and_steps_equal_the_full_pass"):
            assert f"{battery}[custom" in result.stdout


def test_the_configuration_of_the_example_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    config = load_config(EXAMPLES / "alternating_router.yaml")
    with torch.no_grad():
        out = build_model(config)(torch.zeros(1, 6, dtype=torch.int64))
    assert out.depth.tolist() == [[3, 1, 3, 1, 3, 1]]
