"""Targets for depth and FLOPs, learned thresholds and PonderNet, compared with values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.config import (
    EmaThresholdConfig,
    ExpertChoiceConfig,
    HaltingConfig,
    LearnedThresholdConfig,
    MonotoneConfig,
    PonderNetConfig,
    RandomConfig,
    RouterConfig,
    SkipForwardRecurseConfig,
    TokenChoiceConfig,
)
from megamor.config.segments import stages
from megamor.model import ModelOutput, Transformer, build_model
from megamor.model.flops import executed_flops, nominal_work, recursion_costs
from megamor.routing import Router, RoutingContext, RoutingSession, TokenSet, build_router
from megamor.routing.control import DepthControl, rule_shares
from megamor.routing.scored import default_capacity
from tests.combinations import BATCH, KV_POLICIES, SEQ_LEN, lively_model, tiny_config, tokens

DIM, NUM = 8, 4
TARGETS: dict[str, RouterConfig] = {
    "expert_choice": ExpertChoiceConfig(target_depth=1.7),
    "token_choice": TokenChoiceConfig(target_depth=1.7),
    "ema_threshold": EmaThresholdConfig(target_depth=1.7),
    "learned_threshold": LearnedThresholdConfig(target_depth=1.7),
    "skip_forward_recurse": SkipForwardRecurseConfig(hidden=16, target_depth=1.7),
    "act": HaltingConfig(target_depth=1.7),
    "pondernet": PonderNetConfig(target_depth=1.7),
    "monotone": MonotoneConfig(target_depth=1.7),
}


def fp64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def new(config: RouterConfig) -> Any:
    """A router whose scores are the first component of a state (act, pondernet, learned_threshold)."""
    router = build_router(config, DIM, 3).double()
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
        if parameter.dim() == 2:
            parameter.data[:, 0] = 1.0
    router.reset()
    for buffer in router.buffers():
        buffer.zero_()
    return router


def walk(router: Router, scores: list[float], mode: str = "train") -> tuple[RoutingSession, list[Any], list[int]]:
    """The session after all recursions of tokens whose state is the same in each: plans, and how many tokens ran."""
    states = torch.zeros(len(scores), DIM, dtype=torch.float64)
    states[:, 0] = fp64(scores)
    context = RoutingContext(1, len(scores), mode)  # type: ignore[arg-type]
    session, candidates = router.begin(states, context), TokenSet.all(1, len(scores))
    mixes, run = [], []
    for recursion in range(3):
        plan = session.route(recursion, candidates.gather(states), candidates)
        candidates = plan.tokens
        mixes.append((candidates, session.mix(recursion, plan, candidates.gather(states))))
        run.append(len(candidates))
    return session, mixes, run


def emitted(mixes: list[Any], number: int) -> Tensor:
    """Weight of each recursion's result, [tokens, 3]."""
    return torch.stack([tokens.scatter(torch.zeros(number, dtype=torch.float64), m.emit) for tokens, m in mixes], 1)


def mean(session: RoutingSession, name: str) -> float:
    return (session.ratios[name].numerator / session.ratios[name].denominator).item()


# Learned threshold


def test_a_learned_threshold_by_hand() -> None:
    router = new(LearnedThresholdConfig(alpha=0.5, depth_coeff=0.1))
    router.thresholds.data = fp64([3.0, 0.5, 1.0])
    session, mixes, run = walk(router, [0.4, 0.6, 2.0, 1.0])
    assert run == [4, 3, 1]  # a score at the threshold isn't above it
    assert mixes[1][0].index.tolist() == [1, 2, 3]
    torch.testing.assert_close(mixes[1][1].from_core, 0.5 * torch.sigmoid(fp64([0.1, 1.5, 0.5])))
    torch.testing.assert_close(mixes[0][1].from_core, 0.5 * torch.sigmoid(fp64([-2.6, -2.4, -1.0, -2.0])))
    # Of the tokens that take the recursions: three and one.
    soft = 1 + torch.sigmoid(fp64([0.1, 1.5, 0.5, 1.0])).sum().item() / 4
    assert mean(session, "soft_depth") == pytest.approx(soft)
    assert session.losses["depth_loss"].item() == pytest.approx(0.1 * soft)
    session.losses["depth_loss"].backward()
    assert (router.thresholds.grad[1:] < 0).all()  # less depth by higher thresholds


def test_an_additive_gate_is_one_with_the_gradient_of_a_weighted_one() -> None:
    gradients = []
    for gating in ("weighted", "additive"):
        router = new(LearnedThresholdConfig(alpha=0.5, gating=gating))  # type: ignore[arg-type]
        _, mixes, _ = walk(router, [0.4, 0.6])
        gate = mixes[1][1].from_core
        assert gating == "weighted" or torch.equal(gate, torch.ones(2, dtype=torch.float64))
        gate.sum().backward()
        gradients.append(router.thresholds.grad)
    assert torch.equal(*gradients)
    expected = -0.5 * sum(p * (1 - p) for p in torch.sigmoid(fp64([0.4, 0.6])).tolist())
    assert gradients[0].tolist() == pytest.approx([0.0, expected, 0.0])


def test_the_shift_moves_the_choice_and_the_gate() -> None:
    router = new(LearnedThresholdConfig(target_depth=2.0, alpha=1.0))
    router.shift.fill_(-0.5)
    session, mixes, run = walk(router, [0.4, 0.6])
    assert run == [2, 1, 1]
    torch.testing.assert_close(mixes[1][1].from_core, torch.sigmoid(fp64([0.1])))
    assert "depth_loss" not in session.losses  # it would push against the shift without end


# PonderNet


@pytest.mark.parametrize("mode", ["train", "causal"])
def test_pondernet_by_hand(mode: str) -> None:
    """Three tokens that halt with probability 0.6, 0.4 and 0.1 after each recursion; prior 0.4; the median decides."""
    router = new(PonderNetConfig(prior=0.4, ponder_coeff=0.25))
    probabilities = fp64([0.6, 0.4, 0.1])
    assert router.bias.item() == pytest.approx(math.log(0.4 / 0.6))
    session, mixes, run = walk(router, (probabilities.logit() - router.bias.detach()).tolist(), mode)
    assert run == [3, 2, 1]  # 0.6 passes 1/2 at once, 0.4 + 0.24 after two, 0.1 + 0.09 never
    weights = emitted(mixes, 3)
    expected = fp64([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.1, 0.09, 0.81]])
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    q = [0.4 / 0.784, 0.24 / 0.784, 0.144 / 0.784]  # 1 - 0.6^3 = 0.784
    assert sum(q) == pytest.approx(1.0)
    kl = 0.6 * math.log(0.6 / q[0]) + 0.4 * math.log(0.4 / (q[1] + q[2]))
    kl += 0.4 * math.log(0.4 / q[0]) + 0.24 * math.log(0.24 / q[1]) + 0.36 * math.log(0.36 / q[2])
    kl += 0.1 * math.log(0.1 / q[0]) + 0.09 * math.log(0.09 / q[1]) + 0.81 * math.log(0.81 / q[2])
    assert mean(session, "prior_kl") == pytest.approx(kl / 3)
    if mode == "train":
        assert session.losses["ponder_loss"].item() == pytest.approx(0.25 * kl / 3)
    else:
        assert session.losses == {}


def test_soft_pondernet_is_the_whole_distribution() -> None:
    """Without exits, the loss is the divergence of torch's own distributions, and smallest at the prior."""
    router = new(PonderNetConfig(mode="soft", epsilon=0.0, prior=0.3, ponder_coeff=1.0))
    prior = fp64([0.3, 0.21, 0.147]) / (1 - 0.7**3)
    session, mixes, run = walk(router, [1.0, -2.0, 0.3])
    assert run == [3, 3, 3]
    found = torch.distributions.Categorical(emitted(mixes, 3))
    expected = torch.distributions.kl_divergence(found, torch.distributions.Categorical(prior.expand(3, 3)))
    assert session.losses["ponder_loss"].item() == pytest.approx(expected.mean().item())


def test_the_shift_of_pondernet_leaves_the_distribution_alone() -> None:
    router = new(PonderNetConfig(target_depth=2.0))
    router.shift.fill_(math.log(0.8 / 0.2))  # the quantile 0.8 instead of the median
    _, mixes, run = walk(router, (fp64([0.6, 0.85]).logit() - router.bias.detach()).tolist())
    assert run == [2, 1, 0]
    torch.testing.assert_close(emitted(mixes, 2), fp64([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]))


def test_the_shift_of_act_is_part_of_the_halting_probability() -> None:
    router = new(HaltingConfig(target_depth=2.0))
    router.shift.fill_(2.0)
    session, mixes, _ = walk(router, [1.0])
    expected = torch.sigmoid(fp64([0.0])).item()  # 1 + the bias of 1 - 2
    assert emitted(mixes, 1)[0].tolist() == pytest.approx([expected, 0.5, 0.0])
    assert "ponder_loss" not in session.losses


# Capacities and loads of a target


@pytest.mark.parametrize("depth", [1.0, 1.2, 1.5, 2.0, 2.2, 2.9, 3.0])
def test_capacities_of_a_target_depth(depth: float) -> None:
    capacity = default_capacity(3, depth)
    assert sum(capacity) == pytest.approx(depth, abs=1e-6)
    assert 1.0 == capacity[0] >= capacity[1] >= capacity[2]
    if 1 < depth < 3:
        assert math.log(capacity[2]) / math.log(capacity[1]) == pytest.approx(math.log(1 / 3) / math.log(2 / 3))


def test_capacities_without_a_target_and_below_one() -> None:
    assert default_capacity(4) == (1.0, 0.75, 0.5, 0.25)
    assert default_capacity(3, 2.0) == pytest.approx(default_capacity(3))
    assert sum(default_capacity(3, 0.4)) == pytest.approx(0.4)


def test_top_k_and_the_nominal_work_follow_the_target() -> None:
    config = tiny_config(ExpertChoiceConfig(target_depth=1.5))
    depth = build_model(config)(tokens()).depth.float().mean().item()
    nominal = sum(row[0] for row in nominal_work(config, BATCH)) / (BATCH * SEQ_LEN)
    assert depth == pytest.approx(nominal) == pytest.approx(1.5, abs=2 / SEQ_LEN)
    for router in TARGETS.values():
        found = nominal_work(tiny_config(router), 1.0)
        assert sum(row[0] for row in found) / SEQ_LEN == pytest.approx(1.7, abs=2 / SEQ_LEN)


def test_token_choice_balances_to_the_shares_of_the_target() -> None:
    router = build_router(TokenChoiceConfig(balancing="loss_free", target_depth=1.5, bias_update_rate=0.5), DIM, 3)
    router.bias.zero_()
    capacity = default_capacity(3, 1.5)
    wanted = fp64([1 - capacity[1], capacity[1] - capacity[2], capacity[2]])
    router.update({"depth_choices": 1000 * wanted + fp64([2.0, 0.0, -2.0])})
    assert router.bias.tolist()[::2] == [-0.5, 0.5]
    plain = build_router(TokenChoiceConfig(), DIM, 3)
    assert plain.balanced(wanted).tolist() == [1.0, 1.0, 1.0]


# The control


def test_depth_and_flops_by_hand() -> None:
    # Of 10 tokens, 8 and 2 take the second and the third recursion; they see 3, 2 and 1 keys each.
    work = fp64([[10, 30], [8, 16], [2, 2], [10, 40]])
    depth, flops = DepthControl(2.0, 3), DepthControl(0.5, 3, in_flops=True, costs=[(100, 10), (100, 10), (80, 10)])
    assert depth.measured({"work": work}).item() == pytest.approx(2.0)
    spent = 10 * (100 + 30) + 8 * (100 + 20) + 2 * (80 + 10)
    assert flops.measured({"work": work}).item() == pytest.approx(spent / (10 * (140 + 140 + 120)))
    # Where the inference rule differs, the tokens on its path say what the others would do.
    choices = fp64([[10, 10, 10], [10, 5, 5], [4, 1, 1]])
    assert [share.item() for share in rule_shares({"work": work, "causal_choices": choices})] == [1.0, 0.5, 0.125]
    spent = 1.0 * 130 + 0.5 * 120 + 0.125 * 90
    assert flops.measured({"work": work, "causal_choices": choices}).item() == pytest.approx(spent / 400)
    nobody = fp64([[10, 10, 10], [10, 0, 0], [0, 0, 0]])
    assert [share.item() for share in rule_shares({"work": work, "causal_choices": nobody})] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("target", "change"), [({"target_depth": 2.5}, 0.5), ({"target_flops": 0.5}, -0.5)])
def test_a_shift_moves_by_the_error_in_units_of_the_margins(target: dict[str, float], change: float) -> None:
    router = build_router(LearnedThresholdConfig(**target), DIM, 3)
    router.shift.fill_(1.0)
    router.control.costs = [(1.0, 0.0)] * 3
    work = fp64([[10, 30], [8, 16], [2, 2], [10, 40]])  # depth 2, two thirds of the FLOPs
    # Mean margins of 4 and 2, and a recursion that no token came to.
    router.update({"work": work, "margins": fp64([[0, 0], [10, 40], [8, 16]])})
    assert router.shift.item() == pytest.approx(1.0 + 0.6 * change * 2.0)
    # A larger error moves it no further.
    router.control.target *= 2 if change > 0 else 0.5
    router.update({"work": work, "margins": fp64([[0, 0], [10, 40], [8, 16]])})
    assert router.shift.item() == pytest.approx(1.0 + 2 * 0.6 * change * 2.0)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_the_fraction_of_flops_is_that_of_executed_flops(kv_policy: str) -> None:
    """Of the blocks of the stage alone: what `executed_flops` counts at a depth over what it counts at full depth."""
    config = tiny_config(LearnedThresholdConfig(target_flops=0.5), kv_policy)
    model = lively_model(config)
    out = model(tokens(), tokens())
    unshared = executed_flops(config, BATCH, []).blocks
    everything = [(BATCH * SEQ_LEN, BATCH * SEQ_LEN * (SEQ_LEN + 1) / 2)] * 3
    found = [executed_flops(config, BATCH, work).blocks - unshared for work in (out.work.tolist(), everything)]
    assert 0.34 < found[0] / found[1] < 0.95
    assert model.stage.router.control.measured(out.totals).item() == pytest.approx(found[0] / found[1], rel=1e-6)
    assert recursion_costs(stages(config)[0]) == model.stage.router.control.costs


@pytest.mark.parametrize("router", TARGETS)
def test_the_state_of_a_target_is_a_buffer(router: str) -> None:
    names = {"shift", "shifts"}
    with_target, without = (
        build_model(tiny_config(config)).stage.router.state_dict().keys()
        for config in (TARGETS[router], replace(TARGETS[router], target_depth=None))
    )
    assert len(with_target & names) == 1
    assert with_target - without == with_target & names


def add(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name] + other[name] for name in one}


@pytest.mark.parametrize("router", [name for name in TARGETS if name != "skip_forward_recurse"])  # draws noise
def test_micro_batches_and_ranks_add_up(router: str) -> None:
    ids, shifts = tokens(batch=4), []
    for parts in ([ids], ids.split(1)):
        model = lively_model(tiny_config(TARGETS[router]))
        outs = [model(part, part) for part in parts]
        totals = outs[0].totals
        for out in outs[1:]:
            totals = add(totals, out.totals)
        model.stage.router.update(totals)
        shifts.append(model.stage.router.shift.item())
    assert shifts[0] != 0.5
    assert shifts[0] == pytest.approx(shifts[1], rel=1e-6)


def error(out: ModelOutput) -> float:
    return (out.ratios["target_error"].numerator / out.ratios["target_error"].denominator).item()


@pytest.mark.parametrize(
    "router", ["token_choice", "learned_threshold", "act", "pondernet", "ema_threshold", "monotone"]
)
def test_the_error_is_logged(router: str) -> None:
    """Where training follows the inference rule, it is the depth of the step minus the target."""
    out = lively_model(tiny_config(TARGETS[router]))(tokens(), tokens())
    assert error(out) == pytest.approx(out.depth.double().mean().item() - 1.7, abs=1e-6)


def test_expert_choice_counts_the_inference_rule() -> None:
    """With all capacities 1 every token's path is known, and the count equals the causal pass."""
    model = lively_model(tiny_config(ExpertChoiceConfig(target_depth=1.7)))
    model.stage.router.capacity = (1.0,) * 3
    one = model(tokens()[:, :1], tokens()[:, :1])  # single tokens: deeper states don't depend on who else is there
    causal = model(tokens()[:, :1], mode="causal")
    assert error(one) == pytest.approx(causal.depth.double().mean().item() - 1.7, abs=1e-6)


def test_a_warm_up_of_token_choice_moves_nothing() -> None:
    model: Transformer = build_model(tiny_config(TokenChoiceConfig(balance_warmup_steps=5, target_depth=1.5)))
    for step, moved in ((4, False), (5, True)):
        out = model(tokens(), tokens(), step=step)
        model.stage.router.update(out.totals)
        assert (model.stage.router.shift.item() != 0) == moved


def test_routers_without_a_knob_have_no_target() -> None:
    assert DepthControl.of(RandomConfig(), 3) is None
    assert not hasattr(RandomConfig(), "target_depth")
