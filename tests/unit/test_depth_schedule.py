"""The number of recursions as a function of a run's progress, and models that run fewer than they have."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.config import (
    CapacityConfig,
    Config,
    DepthStep,
    FixedDepthConfig,
    RouterConfig,
    RunConfig,
    TargetConfig,
    TrainConfig,
)
from megamor.config.depth import depth_steps, final_recursions, recursions_at, with_recursions
from megamor.config.derive import Consumed, derive
from megamor.config.schema import StageConfig
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.model import Transformer, build_model
from megamor.model.flops import executed_flops, expected_steps, nominal_flops
from megamor.routing.scored import capacity_of
from megamor.train.budget import Budget
from tests.combinations import BATCH, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens
from tests.learning.test_learning import profile, rectangular_work

GROWTH = (DepthStep(0.0, 1), DepthStep(0.35, 2), DepthStep(0.7, 3))


def scheduled(schedule: str, config: Config | None = None, **recursion: Any) -> Config:
    config = config or tiny_config(FixedDepthConfig())
    return replace(config, recursion=replace(config.recursion, schedule=schedule, **recursion))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "settings", "expected"),
    [
        ("constant", {}, [3] * 10),
        ("steps", {"schedule_steps": GROWTH}, [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
        ("linear", {}, [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]),  # from 1/3 and 2/3 of the run
        ("linear", {"schedule_start": 2}, [2] * 5 + [3] * 5),
        ("1-sqrt", {}, [1] * 6 + [2] * 3 + [3]),  # from 1 - (2/3)² = 5/9 and 1 - (1/3)² = 8/9
        ("1-sqrt", {"schedule_start": 3}, [3] * 10),
    ],
)
def test_growth_by_hand(schedule: str, settings: dict[str, Any], expected: list[int]) -> None:
    config = scheduled(schedule, **settings)
    assert [recursions_at(config, step / 10, step) for step in range(10)] == expected
    assert final_recursions(config) == 3
    assert recursions_at(config, 1.2, 12) == 3  # after the last step, as a run with max_tokens may be


@pytest.mark.parametrize("limit", ["max_steps", "max_tokens", "max_flops"])
def test_growth_follows_what_limits_the_run(limit: str) -> None:
    config = scheduled("linear")
    config = replace(config, train=TrainConfig(**{limit: 1000}))  # type: ignore[arg-type]
    found = []
    for used in (0, 333, 334, 666, 667, 999):
        spent = {"max_steps": (used, 5, 7.0), "max_tokens": (5, used, 7.0), "max_flops": (5, 7, float(used))}[limit]
        found.append(Budget(config).recursions(Consumed(*spent)))
    assert found == [1, 1, 2, 2, 3, 3]


def test_sampled_depth_is_uniform_and_a_function_of_seed_and_step() -> None:
    config = scheduled("sampled", schedule_start=2)
    config = replace(config, recursion=replace(config.recursion, num_recursions=4))
    drawn = [recursions_at(config, 0.5, step) for step in range(3000)]
    assert drawn == [recursions_at(config, 0.1, step) for step in range(3000)]
    assert sorted(Counter(drawn)) == [2, 3, 4]
    assert all(abs(count - 1000) < 100 for count in Counter(drawn).values())  # four standard deviations
    other = replace(config, run=RunConfig(seed=1))
    assert sum(a == recursions_at(other, 0.5, step) for step, a in enumerate(drawn)) == pytest.approx(1000, abs=110)


@pytest.mark.parametrize(
    ("recursion", "said"),
    [
        ({"schedule": "steps"}, "schedule_steps"),
        ({"schedule_steps": GROWTH}, "no other takes them"),
        ({"schedule": "steps", "schedule_steps": GROWTH[1:]}, "begin at 0"),
        ({"schedule": "steps", "schedule_steps": (GROWTH[0], GROWTH[2], GROWTH[1])}, "ascending"),
        ({"schedule": "steps", "schedule_steps": (DepthStep(0.0, 4),)}, "asks for 4 recursions of 3"),
        ({"schedule": "sampled", "schedule_start": 4}, "asks for 4 recursions of 3"),
        ({"num_recursions": 1, "sharing": "none", "schedule": "linear"}, "nothing to change"),
        ({"backprop_recursions": 1, "kv_policy": "share_first"}, "never trains weights"),
        ({"backprop_recursions": 2, "sharing": "middle_sequence"}, "never trains weights"),
        ({"backprop_recursions": 2, "lora_rank": 2}, "separate_norms and lora_rank"),
    ],
)
def test_contradictions_are_refused(recursion: dict[str, Any], said: str) -> None:
    config = tiny_config(FixedDepthConfig())
    config = replace(config, recursion=replace(config.recursion, **recursion), train=TrainConfig(max_steps=500))
    with pytest.raises(ConfigError, match=said):
        validate(config)


def test_truncation_needs_a_router_without_scores() -> None:
    config = tiny_config(ROUTERS["expert_choice"])
    config = replace(config, train=TrainConfig(max_steps=500))
    truncated = replace(config, recursion=replace(config.recursion, backprop_recursions=2))
    with pytest.raises(ConfigError, match=r"backprop_recursions = 2 leaves scores of router.kind = expert_choice"):
        validate(truncated)
    validate(replace(truncated, recursion=replace(truncated.recursion, backprop_recursions=3)))
    validate(replace(truncated, router=FixedDepthConfig()))


def test_the_schedule_is_told() -> None:
    config = scheduled("steps", schedule_steps=GROWTH)
    assert "recursions     1, 2 from 35.0% of the run, 3 from 70.0% of the run" in derive(config, 1).describe()
    assert "recursions     1 to 3, drawn for each step" in derive(scheduled("sampled"), 1).describe()
    assert "recursions  " not in derive(tiny_config(FixedDepthConfig()), 1).describe()


def shallow(config: Config, recursions: int) -> Config:
    """`config` with fewer recursions of the same layers, and with the first of its capacities."""
    router: RouterConfig = config.router
    if isinstance(router, CapacityConfig):
        router = replace(router, capacity=capacity_of(router, 3)[:recursions])
    elif isinstance(router, FixedDepthConfig):
        router = FixedDepthConfig(depth=min(recursions, router.depth or recursions))
    recursion = replace(config.recursion, num_recursions=recursions)
    model = replace(config.model, num_layers=2 + 2 * recursions)
    return replace(config, model=model, recursion=recursion, router=router)


def fill(small: Transformer, large: Transformer) -> None:
    """Give `small` the weights of `large`, of which it has the first rows where shapes differ."""
    whole = large.state_dict()
    for name, tensor in small.state_dict().items():
        tensor.copy_(whole[name][tuple(slice(size) for size in tensor.shape)])


@pytest.mark.parametrize("recursions", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_limited_model_is_one_with_fewer_recursions(router: str, recursions: int) -> None:
    """Logits, losses, depths and gradients are those of a smaller model with the same weights."""
    config = tiny_config(without_target(ROUTERS[router]), "hybrid")
    config = replace(config, recursion=replace(config.recursion, recursion_embedding=True))
    large, small = lively_model(config), lively_model(shallow(config, recursions))
    fill(small, large)
    large.limit_recursions(recursions)
    ids = tokens(length=SEQ_LEN + 1)
    outs = []
    for model in (large, small):
        torch.manual_seed(1)  # for routers that draw
        out = model(ids[:, :-1], ids[:, 1:])
        (out.loss_sum + sum(out.router_losses.values())).backward()
        outs.append((out, model(ids, mode="causal").logits))
    (large_out, large_logits), (small_out, small_logits) = outs
    torch.testing.assert_close(large_out.loss_sum, small_out.loss_sum)
    torch.testing.assert_close(large_logits, small_logits)
    assert torch.equal(large_out.depth, small_out.depth)
    assert large_out.router_losses.keys() == small_out.router_losses.keys()
    for name, loss in large_out.router_losses.items():
        torch.testing.assert_close(loss, small_out.router_losses[name])
    assert large_out.work.tolist() == small_out.work.tolist() + [[0, 0]] * (3 - recursions)
    wanted = {name: parameter.grad for name, parameter in small.named_parameters()}
    for name, parameter in large.named_parameters():
        gradient: Tensor | None = wanted.get(name)
        if gradient is None or parameter.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad[tuple(slice(n) for n in gradient.shape)], gradient)
    # The rest of the state waits for the depth that needs it.
    before = {name: value.clone() for name, value in large.named_buffers()}
    large.update_routers({name: value.double() for name, value in large_out.totals.items()})
    assert all(torch.equal(v[recursions:], before[n][recursions:]) for n, v in large.named_buffers())


def without_target(router: Any) -> Any:
    return replace(router, target_depth=None, target_flops=None) if isinstance(router, TargetConfig) else router


@pytest.mark.parametrize(
    "router", ["expert_choice", "token_choice", "ema_threshold", "skip_forward_recurse", "act_hard"]
)
def test_targets_wait_for_full_depth(router: str) -> None:
    config = tiny_config(replace(ROUTERS[router], target_depth=1.7))
    model, ids = lively_model(config), tokens()
    for most, moves in ((1, False), (2, False), (3, True)):
        model.limit_recursions(most)
        out = model(ids, ids)
        before = {name: value.clone() for name, value in model.named_buffers() if "shift" in name}
        model.update_routers({name: value.double() for name, value in out.totals.items()})
        changed = [not torch.equal(model.get_buffer(name), value) for name, value in before.items()]
        assert changed == [moves]
        if router == "skip_forward_recurse":
            assert (out.router_losses["depth_loss"] != 0) == moves


@pytest.mark.parametrize("router", ["expert_choice_aux_router", "token_choice"])
def test_flops_of_a_limited_model(router: str) -> None:
    config = tiny_config(ROUTERS[router])
    model = build_model(config)
    model.limit_recursions(2)
    out, profiled = profile(model, tokens())
    counted = executed_flops(config, BATCH, rectangular_work(config, out)).forward
    counted += 2 * 4 * config.model.dim * BATCH * (SEQ_LEN**2 - SEQ_LEN * (SEQ_LEN + 1) / 2)
    assert profiled == pytest.approx(counted, rel=0.01)


def test_every_stage_is_limited_by_what_it_has() -> None:
    config = tiny_config(FixedDepthConfig())
    stages = (StageConfig(1, 2, num_recursions=2), StageConfig(4, 1, num_recursions=4))
    config = replace(config, recursion=replace(config.recursion, sharing="none", num_recursions=1, stages=stages))
    model = build_model(scheduled("linear", config))
    assert [recursions_at(model.config, used, 0) for used in (0.0, 0.26, 0.51, 0.76)] == [1, 2, 3, 4]
    depths = []
    for most in (1, 3, None):
        model.limit_recursions(most)
        with torch.no_grad():
            depths.append(model(tokens()).depth.unique().tolist())
    assert depths == [[2], [5], [6]]


@pytest.mark.parametrize("schedule", ["steps", "sampled"])
def test_steps_of_a_budget_of_flops(schedule: str) -> None:
    """By hand: each depth's share of the budget over the cost of its steps."""
    config = scheduled(schedule, schedule_steps=GROWTH if schedule == "steps" else ())
    shape = replace(config, train=TrainConfig(max_steps=1, global_batch_size=4, micro_batch_size=4))
    cost = [nominal_flops(shape, 4, most).training for most in (1, 2, 3)]
    assert cost[2] - cost[1] == pytest.approx(cost[1] - cost[0])
    assert cost[2] == nominal_flops(shape, 4).training
    budget = 1000 * cost[2]
    limited = replace(shape, train=replace(shape.train, max_steps=None, max_flops=budget))
    by_hand = 1000 * cost[2] / cost[1]
    if schedule == "steps":
        by_hand = budget * (0.35 / cost[0] + 0.35 / cost[1] + 0.3 / cost[2])
    assert expected_steps(limited) == pytest.approx(by_hand, abs=3)
    assert expected_steps(limited, Consumed(400, 0, 0.9 * budget)) == pytest.approx(
        400 + 0.1 * budget / (cost[1] if schedule == "sampled" else cost[2]), abs=1
    )


def test_a_run_that_stopped_growing_is_a_shallower_model() -> None:
    config = scheduled("steps", schedule_steps=GROWTH)
    assert with_recursions(config, 3) is config
    model = build_model(with_recursions(config, 2))
    with torch.no_grad():
        assert model(tokens()).depth.unique().tolist() == [2]
    assert [item.recursions for item in depth_steps(model.config)] == [2]
