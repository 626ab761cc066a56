"""What each router guarantees beyond the protocol."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megamor.config import (
    CustomRouterConfig,
    EmaThresholdConfig,
    ExpertChoiceConfig,
    HaltingConfig,
    LearnedThresholdConfig,
    RandomConfig,
    SkipForwardRecurseConfig,
    TokenChoiceConfig,
)
from megamor.errors import ConfigError
from megamor.model import ModelOutput, Transformer, build_model
from megamor.routing import DepthBounds, InferenceRule, Router, RoutingContext, RoutingPlan, RoutingSession, TokenSet
from megamor.routing.expert_choice import warmed_up_capacity
from megamor.routing.plan import MarkedSet, Mix
from megamor.routing.random import text_keys
from megamor.train.step_statistics import StepStatistics
from tests.combinations import BATCH, ROUTERS, SEQ_LEN, fitted, lively_model, tiny_config, tokens


def long_tokens(batch: int = 8, length: int = 96) -> Tensor:
    return tokens(batch=batch, length=length)


def run(model: Transformer, ids: Tensor, mode: str = "train", step: int = 0) -> ModelOutput:
    return model(ids[:, :-1], ids[:, 1:], mode=mode, step=step)


def fractions(depth: Tensor) -> list[float]:
    """Fraction of the tokens that took more than r recursions."""
    return [(depth > r).float().mean().item() for r in range(3)]


@pytest.mark.parametrize("capacity", [None, (1.0, 0.5, 0.5), (0.75, 0.25, 0.125)])
def test_expert_choice_takes_exactly_its_capacity(capacity: tuple[float, ...] | None) -> None:
    model, ids = build_model(tiny_config(ExpertChoiceConfig(capacity=capacity))), tokens()
    depth = run(model, tokens(length=SEQ_LEN + 1)).depth
    wanted = [max(1, int(c * SEQ_LEN)) for c in capacity or (1.0, 2 / 3, 1 / 3)]
    for r, k in enumerate(wanted):
        assert ((depth > r).sum(1) == k).all(), (r, k, ids.shape)


def test_capacity_warm_up_is_a_cosine_from_one() -> None:
    assert warmed_up_capacity(0.5, 0, 10) == 1.0
    assert warmed_up_capacity(0.5, 5, 10) == pytest.approx(0.75)
    assert warmed_up_capacity(0.5, 10, 10) == warmed_up_capacity(0.5, 99, 0) == 0.5
    model = build_model(tiny_config(ExpertChoiceConfig(capacity_warmup_steps=10)))
    ids = tokens(length=SEQ_LEN + 1)
    assert fractions(run(model, ids, step=0).depth) == [1.0, 1.0, 1.0]
    assert fractions(run(model, ids, mode="topk").depth)[2] == pytest.approx(1 / 3)


def test_loss_free_bias_evens_out_the_load() -> None:
    """The bias alone brings a router with a strong preference to an even load."""
    config = TokenChoiceConfig(activation="sigmoid", alpha=1.0, balancing="loss_free", bias_update_rate=0.005)
    model, ids = lively_model(tiny_config(config)), tokens()
    violations = []
    for _ in range(500):
        with torch.no_grad():
            out = model(ids)
        load = out.totals["depth_choices"]
        violations.append((load.max() / load.mean() - 1).item())
        model.stage.router.update(out.totals)
    assert violations[0] > 0.3
    assert sum(violations[-20:]) / 20 < 0.15
    assert model.stage.router.bias.abs().max() > 0


def test_balance_warm_up_sends_every_token_to_full_depth() -> None:
    model, ids = build_model(tiny_config(TokenChoiceConfig(balance_warmup_steps=5))), tokens(length=SEQ_LEN + 1)
    assert run(model, ids, step=4).depth.unique().tolist() == [3]
    assert run(model, ids, step=5).depth.unique().numel() > 1


def test_ema_threshold_holds_its_capacity_on_average() -> None:
    model = lively_model(tiny_config(EmaThresholdConfig(ema_decay=0.8)))
    found = []
    with torch.no_grad():
        for step in range(60):
            out = model(tokens(seed=step, batch=16), step=step)
            model.stage.router.update(out.totals)
            found.append(fractions(out.depth))
    mean = torch.tensor(found[20:]).mean(0)
    torch.testing.assert_close(mean, torch.tensor([1.0, 2 / 3, 1 / 3]), atol=0.03, rtol=0)
    lengths = (out.depth > 1).sum(1)
    assert lengths.unique().numel() > 1  # not a top-k, so sequences differ
    causal = model(tokens(seed=99, batch=16), mode="causal")
    assert abs(fractions(causal.depth)[2] - 1 / 3) < 0.1


def test_ema_threshold_state_is_in_the_state_dict() -> None:
    model, ids = lively_model(tiny_config(EmaThresholdConfig())), tokens()
    model.stage.router.update(model(ids).totals)
    other = lively_model(tiny_config(EmaThresholdConfig()), seed=1)
    other.load_state_dict(model.state_dict())
    assert model.state_dict()["stage.router.num_updates"].tolist() == [0.0, 1.0, 1.0]
    assert torch.equal(other(ids, mode="causal").logits, model(ids, mode="causal").logits)


def test_random_routing_holds_its_capacity_and_changes_with_the_step() -> None:
    model, ids = build_model(tiny_config(RandomConfig())), long_tokens(32)
    with torch.no_grad():
        first, again, later = (model(ids, step=step).depth for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    torch.testing.assert_close(torch.tensor(fractions(first)), torch.tensor([1.0, 2 / 3, 1 / 3]), atol=0.04, rtol=0)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_halting_weights_of_each_token_sum_to_one(mode: str) -> None:
    model, ids = lively_model(tiny_config(HaltingConfig(mode=mode))), tokens()
    sessions: list[RoutingSession] = []
    begin = model.stage.router.begin
    model.stage.router.begin = lambda rows, context: sessions.append(begin(rows, context)) or sessions[-1]
    with torch.no_grad():
        out = model(ids)
    torch.testing.assert_close(sessions[0].spent, torch.ones(ids.numel(), dtype=torch.float64))
    assert (out.depth.unique().tolist() == [3]) == (mode == "soft")


def test_soft_and_hard_halting_differ_only_in_what_attention_sees() -> None:
    """With one token per sequence there is nothing to attend to, so exiting early changes nothing else."""
    soft, hard = (lively_model(tiny_config(HaltingConfig(mode=mode))) for mode in ("soft", "hard"))
    ids = tokens(batch=40, length=1)
    with torch.no_grad():
        a, b = soft(ids), hard(ids)
    assert b.work[2, 0] < a.work[2, 0]
    torch.testing.assert_close(a.logits, b.logits, atol=1e-12, rtol=0)


def trained_depth(config: SkipForwardRecurseConfig | HaltingConfig | LearnedThresholdConfig, steps: int = 150) -> float:
    torch.manual_seed(0)
    return fitted(build_model(tiny_config(config)), steps).depth.float().mean().item()


def test_depth_penalty_lowers_the_depth() -> None:
    cheap, expensive = (
        trained_depth(SkipForwardRecurseConfig(hidden=16, depth_coeff=coefficient)) for coefficient in (1e-4, 3.0)
    )
    assert expensive < 0.5 * cheap


@pytest.mark.slow
def test_the_depth_loss_of_learned_thresholds_lowers_the_depth() -> None:
    cheap, expensive = (trained_depth(LearnedThresholdConfig(alpha=1.0, depth_coeff=coeff)) for coeff in (0.0, 0.01))
    assert expensive < cheap - 0.3


def test_ponder_cost_lowers_the_depth() -> None:
    config = HaltingConfig(ponder_coeff=1e-5)
    cheap, expensive = (trained_depth(replace(config, ponder_coeff=coefficient)) for coefficient in (1e-5, 1.0))
    assert expensive < cheap - 0.3


@pytest.mark.parametrize(
    "target", [pytest.param(0.7, marks=pytest.mark.slow), 1.5, pytest.param(2.2, marks=pytest.mark.slow)]
)
def test_target_depth_is_held(target: float) -> None:
    config = SkipForwardRecurseConfig(hidden=16, depth_coeff=10.0, target_depth=target)
    assert trained_depth(config) == pytest.approx(target, abs=0.35)


def test_expected_depth_follows_the_probabilities() -> None:
    """Equal choices: 2/3 apply at once, of the 1/3 that recurse 2/3 apply again, …"""
    model = build_model(tiny_config(SkipForwardRecurseConfig(hidden=16, depth_coeff=1.0)))
    nn.init.zeros_(model.stage.router.head.fc2.weight)
    out = run(model, long_tokens(64))
    expected = 2 / 3 + (2 / 3) / 3 + (2 / 3) / 9
    assert out.ratios["expected_depth"].numerator.item() == pytest.approx(expected, abs=0.03)
    assert out.depth.float().mean().item() == pytest.approx(expected, abs=0.05)


def test_a_rank_whose_tokens_all_skip_still_gives_the_core_a_gradient() -> None:
    model, ids = build_model(tiny_config(SkipForwardRecurseConfig(hidden=16))), tokens(length=SEQ_LEN + 1)
    head = model.stage.router.head
    head.forward = lambda rows: head.fc2(head.fc1(rows)) * 0 + torch.tensor([1e4, 0.0, 0.0])
    out = run(model, ids)
    out.loss_sum.backward()
    assert out.depth.max() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.stage.blocks.parameters())


class EveryOther(Router):
    """Routes even positions through every recursion and odd ones through the first only."""

    causal_in_training = True

    def __init__(self, options: dict[str, float], dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.stride = int(options.get("stride", 2))

    @property
    def inference_rule(self) -> InferenceRule:
        return InferenceRule("every_other")

    def begin(self, rows: Tensor, context: RoutingContext) -> EveryOtherSession:
        return EveryOtherSession(context, self.stride)


class EveryOtherSession(RoutingSession):
    def __init__(self, context: RoutingContext, stride: int) -> None:
        super().__init__(context)
        self.stride = stride

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        if recursion == 0:
            return RoutingPlan(candidates, None, Mix())
        position = candidates.gather(self.context.positions_of(rows.device))
        chosen, indices = candidates.where(position % self.stride == 0)
        return RoutingPlan(chosen, indices, Mix())


def test_a_custom_router() -> None:
    config = CustomRouterConfig(target="tests.unit.test_routers:EveryOther", options={"stride": 3})
    out = build_model(tiny_config(config))(tokens())
    assert out.depth[0, :6].tolist() == [3, 1, 1, 3, 1, 1]


@pytest.mark.parametrize("target", ["tests.unit.test_routers:Nothing", "no_such_module:Router", "math:pi"])
def test_a_custom_router_that_does_not_exist_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=target):
        build_model(tiny_config(CustomRouterConfig(target=target)))


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_states_its_inference_rule(router: str) -> None:
    rule = build_model(tiny_config(ROUTERS[router])).stage.router.inference_rule
    assert rule.name
    assert rule.threshold is None or math.isfinite(rule.threshold)


def test_picking_and_finding_agree() -> None:
    everything = TokenSet.all(BATCH, SEQ_LEN)
    chosen = torch.tensor([[1, 4, 7], [0, 2, 9], [3, 5, 11]])
    picked = everything.pick(chosen)
    assert picked.index.tolist() == [1, 4, 7, 24, 26, 33, 51, 53, 59]
    ragged, indices = picked.where(torch.tensor([1, 0, 1, 0, 0, 0, 1, 1, 1], dtype=torch.bool))
    assert ragged.lengths.tolist() == [2, 0, 3]
    assert picked.find(ragged).tolist() == indices.tolist() == [0, 2, 6, 7, 8]
    assert picked.rank_of(ragged, torch.device("cpu")).tolist() == [0, 2, 0, 1, 2]
    assert ragged.rank_of(ragged, torch.device("cpu")).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_selection_in_place_equals_selection_by_moving_rows(router: str, bounded: bool) -> None:
    """Serving keeps all rows in place and marks the selected ones: the same rows with the same weights."""
    stage = lively_model(tiny_config(ROUTERS[router])).eval().stage
    states = torch.randn(4, 40, tiny_config(ROUTERS[router]).model.dim, generator=torch.Generator().manual_seed(3))
    states = states.to(next(stage.parameters()).dtype)
    most = torch.arange(40) % 3 + 1
    context = RoutingContext(40, 1, "causal", 0, torch.arange(40), DepthBounds(most // 3, most) if bounded else None)
    moved, marked = (stage.router.begin(states[0], context) for _ in range(2))
    tokens, marks = TokenSet.all(40, 1), MarkedSet.of(torch.arange(40))
    sizes = []
    for recursion in range(stage.router.num_recursions):
        plan = moved.route(recursion, tokens.gather(states[recursion]), tokens)
        other = marked.route(recursion, states[recursion], marks)
        tokens, marks = plan.tokens, other.tokens
        rows = tokens.rows(torch.device("cpu"))
        kept = torch.ones(40, dtype=torch.bool) if marks.kept is None else marks.kept
        assert kept.nonzero().flatten().tolist() == rows.tolist()
        mix = moved.mix(recursion, plan, states[recursion + 1][rows])
        # Serving asks only for the weights of rows that have run.
        alone = marked.regrouped(
            replace(context, batch=len(rows), positions=rows, bounds=bound_rows(context.bounds, rows)),
            {name: getattr(marked, name)[rows] for name in marked.per_row},
        )
        executed = RoutingPlan(TokenSet.all(len(rows), 1), None, at_rows(other.mix, rows))
        assert_same_mix(alone.mix(recursion, executed, states[recursion + 1][rows]), mix)
        for name in marked.per_row:
            setattr(marked, name, getattr(marked, name).index_copy(0, rows, getattr(alone, name)))
        sizes.append(len(rows))
    assert sizes[0] > 0
    assert bounded or router.startswith(("fixed", "act_soft")) or min(sizes) < 40, sizes


def bound_rows(bounds: DepthBounds | None, rows: Tensor) -> DepthBounds | None:
    return None if bounds is None else DepthBounds(bounds.least[rows], bounds.most[rows])


def at_rows(mix: Mix, rows: Tensor) -> Mix:
    weights = {name: getattr(mix, name) for name in ("from_core", "from_stream", "from_input", "emit")}
    return Mix(**{name: value[rows] if isinstance(value, Tensor) else value for name, value in weights.items()})


def assert_same_mix(one: Mix, other: Mix) -> None:
    for name in ("from_core", "from_stream", "from_input", "emit"):
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert a == b, name


def depth_of(model: Transformer, ids: Tensor, **how: object) -> Tensor:
    with torch.no_grad():
        return model(ids, **how).depth


def test_random_patterns_do_not_depend_on_how_a_batch_is_divided() -> None:
    """The same tokens in every sequence, so that nothing but its number tells one sequence from another."""
    model, ids = build_model(tiny_config(RandomConfig())), tokens(batch=1).expand(8, -1)
    whole = depth_of(model, ids, step=3)
    assert whole.unique(dim=0).shape[0] == 8
    for size in (1, 2, 4):
        parts = [depth_of(model, ids[i : i + size], step=3, first_sequence=i) for i in range(0, 8, size)]
        assert torch.equal(torch.cat(parts), whole)
    config = model.config
    model.config = replace(config, run=replace(config.run, seed=config.run.seed + 1))
    assert not torch.equal(depth_of(model, ids, step=3), whole)


@pytest.mark.parametrize("positions", ["continue", "restart"])
def test_random_patterns_are_those_of_the_document_alone(positions: Any) -> None:
    config = tiny_config(ROUTERS["random"])
    model, ids = (
        lively_model(replace(config, model=replace(config.model, document_positions=positions))),
        tokens(batch=1),
    )
    documents = (torch.arange(SEQ_LEN) >= 7).long().unsqueeze(0)
    together, alone = model(ids, mode="causal", documents=documents), model(ids[:, 7:], mode="causal")
    assert torch.equal(together.depth[:, 7:], alone.depth)


def test_random_patterns_follow_the_text_at_inference() -> None:
    model, ids = build_model(tiny_config(RandomConfig())), tokens(batch=8)
    model.config = replace(model.config, run=replace(model.config.run, seed=5))  # an export does not know it
    depth = depth_of(model, ids, mode="causal")
    assert depth.unique(dim=0).shape[0] == 8
    assert torch.equal(depth_of(model, ids[3:5], mode="causal", step=7), depth[3:5])
    changed = ids.clone()
    changed[:, 10:] += 1
    assert torch.equal(depth_of(model, changed % 97, mode="causal")[:, :10], depth[:, :10])


@pytest.mark.parametrize("capacity", [None, (1.0, 0.5, 0.125)])
@pytest.mark.parametrize("mode", ["train", "causal"])
@pytest.mark.parametrize("length", [64, 128, 256, 2048])
def test_random_routing_holds_its_capacity_in_every_sequence(
    length: int, mode: str, capacity: tuple[float, ...] | None
) -> None:
    router = build_model(tiny_config(RandomConfig(capacity=capacity))).stage.router
    ids = tokens(batch=8, length=length)
    order = torch.arange(length).repeat(8)
    context = RoutingContext(8, length, mode, text=text_keys(ids.flatten(), order))
    draw = router.begin(torch.zeros(8 * length, 1), context).draw.view(8, length)
    assert ((draw >= 0) & (draw < 1)).all()
    for share in router.capacity[1:]:
        # Exact in every block of 32, but for the interval that the capacity cuts.
        torch.testing.assert_close(
            (draw < share).double().mean(1), torch.full((8,), share, dtype=torch.float64), atol=1 / 32, rtol=0
        )
    assert (draw < 0.5).double().unique(dim=0).shape[0] == 8


def test_a_recursion_that_no_token_takes_has_no_mean_gate() -> None:
    model, ids = build_model(tiny_config(SkipForwardRecurseConfig(hidden=16))), tokens(length=SEQ_LEN + 1)
    head = model.stage.router.head
    head.forward = lambda rows: head.fc2(head.fc1(rows)) * 0 + torch.tensor([0.0, 1e4, 0.0])
    statistics = StepStatistics(3)
    statistics.add(run(model, ids))
    ratios = statistics.reduce(torch.zeros(())).wait().ratios
    assert ratios["gate_1"] == 1.0
    assert "gate_2" not in ratios


@pytest.mark.parametrize("mode", ["train", "topk", "causal"])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_reports_its_gates(router: str, mode: str) -> None:
    model = build_model(tiny_config(ROUTERS[router]))
    ratios = run(model, long_tokens(), mode=mode).ratios
    for recursion in range(model.stage.router.num_recursions):
        gate = ratios[f"gate_{recursion + 1}"]
        assert gate.denominator == 0 or -1 <= gate.numerator / gate.denominator <= 1.001
