"""Every router that can give the tokens of two ranks different depths: no rank hangs, and losses and gradients equal
those of one process that sees both batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.config import (
    Config,
    EmaThresholdConfig,
    HaltingConfig,
    LearnedThresholdConfig,
    PonderNetConfig,
    RandomConfig,
    RouterConfig,
    SkipForwardRecurseConfig,
    TokenChoiceConfig,
)
from tests.distributed.harness import run_ranks
from tests.distributed.runs import StepResult, preload_deepspeed, run_step, start, tiny

STEPS = 3
BACKENDS: tuple[tuple[str, dict[str, Any]], ...] = (("ddp", {}), ("fsdp2", {}), ("deepspeed", {"zero_stage": 3}))
Force = Callable[[Any, bool], None]  # router, and whether its tokens should go as deep as possible or exit at once


@dataclass
class Offset:
    """Added to the output of a router's head."""

    value: Tensor

    def __call__(self, module: object, inputs: object, output: Tensor) -> Tensor:
        return output + self.value


def offset_head(shallow: tuple[float, ...], deep: tuple[float, ...]) -> Force:
    """Shift scores so far apart that the choice is certain, without changing their gradients."""

    def force(router: Any, is_deep: bool) -> None:
        if not hasattr(router, "offset"):
            router.offset = Offset(torch.zeros(()))
            router.head.register_forward_hook(router.offset)
        router.offset.value = torch.tensor(deep if is_deep else shallow)

    return force


def force_threshold(router: Any, is_deep: bool) -> None:
    """Set a threshold that all scores pass, or none."""
    router.threshold = lambda recursion: torch.tensor(-math.inf if is_deep else math.inf)


def force_margins(router: Any, is_deep: bool) -> None:
    """Let the scores of all tokens pass the thresholds, or of none."""
    router.steered = lambda scores: 0 * scores + (1.0 if is_deep else -1.0)


def force_capacity(router: Any, is_deep: bool) -> None:
    """Select all tokens at every recursion, or none."""
    router.capacity = (1.0,) * 3 if is_deep else (0.0,) * 3


# The router, how to force its depth, and the mean depths of the two ranks.
CASES: dict[str, tuple[RouterConfig, Force, tuple[int, int]]] = {
    "token_choice": (TokenChoiceConfig(), offset_head((9.0, 0.0, 0.0), (0.0, 0.0, 9.0)), (1, 3)),
    "ema_threshold": (EmaThresholdConfig(capacity=(0.9, 0.6, 0.3)), force_threshold, (0, 3)),
    "random": (RandomConfig(), force_capacity, (0, 3)),
    "skip_forward_recurse": (SkipForwardRecurseConfig(), offset_head((40.0, 0.0, 0.0), (0.0, 0.0, 40.0)), (0, 3)),
    "forward": (SkipForwardRecurseConfig(), offset_head((0.0, 40.0, 0.0), (0.0, 0.0, 40.0)), (1, 3)),
    "act_hard": (HaltingConfig(mode="hard"), offset_head((8.0,), (-8.0,)), (1, 3)),
    "learned_threshold": (LearnedThresholdConfig(), force_margins, (1, 3)),
    "pondernet": (PonderNetConfig(), offset_head((8.0,), (-8.0,)), (1, 3)),
}


def train(config: Config, force: Force) -> tuple[list[StepResult], list[float]]:
    """Steps in which the tokens of one rank (with one process: of half the micro-batches) exit and the others stay.

    Also returns the mean depth of each micro-batch of the last step.
    """
    backend = start(config)
    router = backend.module.stage.router
    begin, calls, depths = router.begin, [], []

    def forced(rows: object, context: object) -> object:
        rank = backend.rank if backend.world_size > 1 else len(calls) % 4 // 2
        calls.append(rank)
        force(router, rank == 1)
        return begin(rows, context)

    router.begin = forced
    backend.module.register_forward_hook(lambda module, inputs, out: depths.append(out.depth.float().mean().item()))
    results = [run_step(backend, step, config) for step in range(1, STEPS + 1)]
    return results, depths[-4 // backend.world_size :]


@pytest.mark.promise("R11", backend=("fsdp2", "zero3"))
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "pondernet" else ()) for case in CASES]
)
def test_every_router_may_be_uneven(case: str) -> None:
    preload_deepspeed()
    router, force, (shallow, deep) = CASES[case]
    ((expected, depths),) = run_ranks(train, tiny("single", router=router), force, world_size=1)
    assert depths == [shallow, shallow, deep, deep]
    for name, settings in BACKENDS:
        ranks = run_ranks(train, tiny(name, router=router, **settings), force, world_size=2, timeout=60.0)
        assert [depths for _, depths in ranks] == [[shallow] * 2, [deep] * 2]
        for results, _ in ranks:
            for found, wanted in zip(results, expected, strict=True):
                assert found == pytest.approx(wanted, rel=1e-6)
