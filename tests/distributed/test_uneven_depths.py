"""Ranks whose tokens reach different depths, in the real model: no rank hangs, and gradients equal those of one
process that sees both batches. Parameters that only one recursion uses (blocks, norms, LoRA updates) must get a zero
gradient on a rank where no token takes that recursion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megamor.config import Config, RecursionConfig
from tests.distributed.harness import run_ranks
from tests.distributed.runs import LOSS_FREE, StepResult, preload_deepspeed, run_step, start, tiny

DEPTH_OF_RANK = (0, 2)
STEPS = 3
RECURSIONS = {
    "middle_cycle": RecursionConfig(3, "middle_cycle"),
    "middle_sequence": RecursionConfig(3, "middle_sequence"),
    "told_apart": RecursionConfig(3, "middle_cycle", separate_norms=True, lora_rank=2, recursion_embedding=True),
}
BACKENDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddp", {}),
    ("fsdp2", {}),
    ("deepspeed", {"zero_stage": 2}),
    ("deepspeed", {"zero_stage": 3}),
)


def train(config: Config) -> list[StepResult]:
    """Steps in which all tokens of a rank (with one process: of half the micro-batches) have the same depth."""
    backend = start(config)
    router = backend.module.stage.router
    begin, calls = router.begin, []

    def forced(rows: object, context: object) -> object:
        rank = backend.rank if backend.world_size > 1 else len(calls) % 4 // 2
        calls.append(rank)
        router.bias.zero_()
        router.bias[DEPTH_OF_RANK[rank]] = 100.0
        return begin(rows, context)

    router.begin = forced
    return [run_step(backend, step, config) for step in range(1, STEPS + 1)]


@pytest.mark.promise("R11", backend="fsdp2")
@pytest.mark.parametrize("recursion", RECURSIONS)
def test_uneven_depths_end_and_agree(recursion: str) -> None:
    preload_deepspeed()
    expected = None
    for name, settings in (("single", {}), *BACKENDS):
        config = replace(tiny(name, router=LOSS_FREE, **settings), recursion=RECURSIONS[recursion])
        results = run_ranks(train, config, world_size=1 if name == "single" else 2, timeout=60.0)[0]
        expected = expected or results
        for found, wanted in zip(results, expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-6)
