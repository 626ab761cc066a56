"""DDP without a search for unused parameters, where the model says that there are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from megamor.config import Config, CustomRouterConfig, FixedDepthConfig, ParallelConfig, RecursionConfig, RouterConfig
from megamor.config.segments import uses_everything
from megamor.model import build_model
from tests.combinations import ROUTERS
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    EXPERT_CHOICE,
    FIXED_DEPTH,
    TINY,
    StepResult,
    assert_resumes_bitwise,
    relative_differences,
    run_step,
    start,
    tiny,
)


def unused(config: Config, *, padded: bool) -> list[str]:
    """Parameters without a gradient after a forward and a backward pass over two sequences, or over padding alone."""
    torch.manual_seed(0)
    model = build_model(config)
    ids = torch.randint(config.model.vocab_size, (2, 17))
    labels, lengths = (torch.full((2, 16), -100), (0, 0)) if padded else (ids[:, 1:], None)
    out = model(ids[:, :-1], labels, step=3, lengths=lengths)
    (out.loss_sum + sum(out.router_losses.values())).backward()  # type: ignore[union-attr]
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_every_parameter_has_a_gradient(router: RouterConfig) -> None:
    own = {"recursion_embedding": True, "input_injection": True}
    for sharing, policy in (("middle_cycle", "recursion_wise"), ("middle_sequence", "share_first")):
        recursion = RecursionConfig(3, sharing, kv_policy=policy, **own)  # type: ignore[arg-type]
        config = replace(TINY, router=router, recursion=recursion)
        assert uses_everything(config) == (router != FixedDepthConfig(depth=2))
        for padded in (False, True):
            assert (unused(config, padded=padded) == []) == uses_everything(config)


def test_parameters_that_some_recursions_have_no_use_for() -> None:
    apart = replace(TINY, recursion=RecursionConfig(3, "middle_sequence", separate_norms=True, lora_rank=2))
    assert unused(apart, padded=False)
    grown = replace(TINY, recursion=RecursionConfig(3, "middle_cycle", schedule="linear"))
    others = (apart, grown, replace(TINY, router=CustomRouterConfig(target="mine:Router")))
    assert not any(uses_everything(config) for config in others)


def searches(config: Config) -> tuple[bool, bool]:
    """Whether DDP looks for unused parameters, and whether it would still rearrange its buckets after a step."""
    backend = start(config)
    run_step(backend, 0, config)
    wrapped = backend.model
    assert isinstance(wrapped, DistributedDataParallel)
    return wrapped.find_unused_parameters, wrapped.reducer._rebuild_buckets()


def test_the_search_is_left_out_where_nothing_can_be_unused() -> None:
    assert run_ranks(searches, tiny("ddp"))[0] == (False, False)
    apart = RecursionConfig(3, "middle_sequence", lora_rank=2)
    assert run_ranks(searches, replace(tiny("ddp"), recursion=apart))[0][0]


@pytest.mark.slow
def test_three_ranks_resume_bitwise(tmp_path: Path) -> None:
    """Sums of three gradients depend on their order, which the buckets decide."""
    config = tiny("ddp", router=EXPERT_CHOICE)
    config = replace(config, train=replace(config.train, global_batch_size=6))
    assert_resumes_bitwise(config, tmp_path, world_size=3)


def shallow_steps(config: Config) -> list[StepResult]:
    """Steps of one recursion."""
    backend = start(config)
    backend.module.limit_recursions(1)  # type: ignore[operator]
    return [run_step(backend, step, config) for step in range(2)]


def test_blocks_of_recursions_that_do_not_run_yet() -> None:
    recursion = RecursionConfig(3, "middle_sequence", schedule="linear")
    alone = replace(tiny("single", router=FIXED_DEPTH), recursion=recursion)
    expected = run_ranks(shallow_steps, alone, world_size=1)[0]
    found = run_ranks(shallow_steps, replace(alone, parallel=ParallelConfig("ddp")))[0]
    assert max(relative_differences(expected, found)) < 1e-6
