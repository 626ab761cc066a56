"""Scores, gates, losses and statistics of the routers, compared with values worked out from their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import (
    EmaThresholdConfig,
    ExpertChoiceConfig,
    HaltingConfig,
    RandomConfig,
    RouterConfig,
    SkipForwardRecurseConfig,
    TokenChoiceConfig,
)
from megamor.model import build_model
from megamor.routing import (
    MarkedSet,
    Mix,
    Mode,
    Router,
    RoutingContext,
    RoutingPlan,
    RoutingSession,
    TokenSet,
    build_router,
)
from megamor.routing.heads import RouterLinear, build_head
from tests.combinations import tiny_config, tokens

DIM, BATCH, SEQ_LEN, RECURSIONS = 8, 2, 6, 3
EVERYTHING = TokenSet.all(BATCH, SEQ_LEN)
CPU = torch.device("cpu")


def rows(seed: int = 1) -> Tensor:
    """Hidden states of all tokens, fp64."""
    return torch.randn(BATCH * SEQ_LEN, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def new(config: RouterConfig) -> Any:
    """A router with weights so large that its scores differ clearly."""
    router = build_router(config, DIM, RECURSIONS).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    router.reset()
    return router


def begin(router: Router, mode: Mode = "train", step: int = 0) -> RoutingSession:
    return router.begin(rows(), RoutingContext(BATCH, SEQ_LEN, mode, step))


def mean(session: RoutingSession, name: str) -> float:
    """A statistic of the session."""
    ratio = session.ratios[name]
    return float(ratio.numerator / ratio.denominator)


def two_recursions(router: Router, mode: Mode = "train") -> tuple[RoutingSession, list[RoutingPlan], list[Tensor]]:
    """The session, plans and candidates' rows of recursions 0 and 1."""
    session, candidates, plans, seen = begin(router, mode), EVERYTHING, [], []
    for recursion in range(2):
        seen.append(candidates.gather(rows(10 + recursion)))
        plans.append(session.route(recursion, seen[-1], candidates))
        candidates = plans[-1].tokens
    return session, plans, seen


def scores(router: Any, recursion: int, states: Tensor) -> Tensor:
    return F.linear(states, router.heads[recursion].weight).squeeze(-1)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "none"])
def test_gates_are_alpha_times_the_activation_of_the_tempered_score(activation: str) -> None:
    router = new(ExpertChoiceConfig(temperature=4.0, alpha=0.3, activation=activation))  # type: ignore[arg-type]
    _, plans, seen = two_recursions(router)
    function = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda z: z}[activation]
    for recursion, plan in enumerate(plans):
        tokens = seen[recursion] if plan.indices is None else seen[recursion][plan.indices]
        torch.testing.assert_close(plan.mix.from_core, 0.3 * function(scores(router, recursion, tokens) / 4))
        assert plan.mix.from_stream == 1.0


def test_additive_gating_adds_the_cores_output_as_it_is() -> None:
    _, plans, _ = two_recursions(new(ExpertChoiceConfig(gating="additive", alpha=0.3)))
    assert [plan.mix for plan in plans] == [Mix(from_stream=1.0, from_core=1.0)] * 2


def top_four(z: Tensor) -> Tensor:
    """Which tokens have the four highest scores of their sequence: int(2/3 · 6)."""
    best = z.view(BATCH, SEQ_LEN).topk(4).indices
    return torch.zeros(BATCH, SEQ_LEN, dtype=torch.bool).scatter(1, best, True).flatten()


@pytest.mark.parametrize("mode", ["train", "topk"])
def test_losses_of_expert_choice(mode: Mode) -> None:
    """BCE against the selection and mean squared scores, each summed over the recursions; in training only."""
    router = new(ExpertChoiceConfig(aux_coeff=0.5, z_coeff=0.25))
    session, plans, seen = two_recursions(router, mode)
    z = [scores(router, recursion, states) for recursion, states in enumerate(seen)]
    chosen = top_four(z[1])
    assert plans[1].tokens.rows(CPU).tolist() == chosen.nonzero().flatten().tolist()
    bce = F.softplus(-z[0]).mean() + torch.where(chosen, F.softplus(-z[1]), F.softplus(z[1])).mean()
    expected = {"aux_loss": 0.5 * bce, "z_loss": 0.25 * (z[0].square().mean() + z[1].square().mean())}
    torch.testing.assert_close(session.losses, expected if mode == "train" else {})
    # The first recursion takes all, so only the later ones say how well the inference rule predicts.
    agreement = session.ratios["topk_causal_agreement"]
    assert (agreement.numerator.item(), agreement.denominator.item()) == (((z[1] >= 0) == chosen).sum().item(), 12)
    candidates = plans[1].tokens
    session.route(2, candidates.gather(rows(12)), candidates)
    assert session.ratios["topk_causal_agreement"].denominator.item() == 12 + 8


def test_the_aux_router_learns_without_shaping_what_it_sees() -> None:
    router = new(ExpertChoiceConfig(sampling="aux_router"))
    session, states = begin(router), rows().requires_grad_()
    session.route(0, states, EVERYTHING)
    session.losses["aux_router_loss"].backward()
    assert states.grad is None
    assert router.heads[0].weight.grad is None
    assert router.aux_router[0].weight.grad.abs().max() > 0


def test_a_token_at_the_threshold_continues() -> None:
    router = new(ExpertChoiceConfig(inference_threshold=0.75))
    torch.nn.init.zeros_(router.heads[1].weight)
    router.heads[1].weight.data[0, 0] = 1.0
    logit = math.log(3)
    states = torch.zeros(BATCH * SEQ_LEN, DIM, dtype=torch.float64)
    states[:, 0] = torch.tensor([logit, logit - 1e-9, logit + 1e-9, 0.76, 0.0, 5.0] * BATCH, dtype=torch.float64)
    plan = begin(router, "causal").route(1, states, EVERYTHING)
    assert plan.tokens.rows(CPU).tolist() == [0, 2, 5, 6, 8, 11]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_scores_are_in_fp32_under_autocast_too(kind: str) -> None:
    torch.manual_seed(0)
    head = build_head(kind, DIM, 3)  # type: ignore[arg-type]
    x = torch.randn(7, DIM).bfloat16()
    hidden = x.float()
    layers = [layer.weight for layer in head.modules() if isinstance(layer, RouterLinear)]
    for number, weight in enumerate(layers):
        hidden = F.linear(hidden, weight)
        if number + 1 < len(layers):
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # exact GELU
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = head(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-6)


def test_token_choice_by_hand() -> None:
    config = TokenChoiceConfig(temperature=2.0, alpha=0.5, balance_coeff=0.7, z_coeff=0.2)
    router = new(config)
    session = begin(router)
    z = F.linear(rows(), router.head.weight) / 2
    depth = z.argmax(-1)
    assert depth.unique().tolist() == [0, 1, 2]
    assert session.depth.tolist() == depth.tolist()
    gates = 0.5 * z.softmax(-1)
    counts = depth.bincount(minlength=RECURSIONS)
    expected = {
        # Switch Transformer's: the number of depths times the sum of fraction times mean score.
        "balance_loss": 0.7 * (RECURSIONS * counts / len(depth) * gates.mean(0)).sum(),
        "z_loss": 0.2 * torch.logsumexp(z, -1).square().mean(),
    }
    torch.testing.assert_close(session.losses, expected)
    assert session.totals["depth_choices"].tolist() == counts.tolist()
    # Tokens that leave after recursion 1 become x_in + gate·y; those that go on are y, ungated.
    session.route(0, rows(), EVERYTHING)
    plan = session.route(1, rows(), EVERYTHING)
    taking = depth[plan.tokens.rows(CPU)]
    assert taking.tolist() == [d for d in depth.tolist() if d >= 1]
    leaving = taking == 1
    mix = session.mix(1, plan, rows())
    torch.testing.assert_close(mix.from_input, leaving.double())
    gate = gates.gather(1, depth[:, None]).squeeze(1)[depth >= 1]
    torch.testing.assert_close(mix.from_core, torch.where(leaving, gate, 1.0))


def test_the_bias_moves_the_choice_and_not_the_gate() -> None:
    router = new(TokenChoiceConfig(activation="sigmoid", balancing="loss_free", bias_update_rate=0.25))
    router.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    session = begin(router)
    assert session.depth.unique().tolist() == [1]
    torch.testing.assert_close(session.gate, F.linear(rows(), router.head.weight)[:, 1].sigmoid())
    # Depths below the mean load of 4 rise by the rate, those above it fall; the distance doesn't count.
    router.bias.zero_()
    router.update({"depth_choices": torch.tensor([9.0, 3.0, 0.0])})
    assert router.bias.tolist() == [-0.25, 0.25, 0.25]
    router.update({"depth_choices": torch.tensor([5.0, 4.0, 3.0])})
    assert router.bias.tolist() == [-0.5, 0.25, 0.5]


def halting(mode: str, probabilities: list[float]) -> tuple[RoutingSession, list[Tensor], list[int]]:
    """Halting where token i halts with probability i of the list in every recursion: session, weights, tokens run."""
    router = new(HaltingConfig(mode=mode, ponder_coeff=0.1))  # type: ignore[arg-type]
    assert router.bias.item() == 1.0  # tokens halt early at first
    torch.nn.init.zeros_(router.head.weight)
    router.head.weight.data[0, 0] = 1.0
    states = torch.zeros(len(probabilities), DIM, dtype=torch.float64)
    states[:, 0] = torch.tensor(probabilities, dtype=torch.float64).logit() - 1
    session, candidates = router.begin(states, RoutingContext(1, len(states))), TokenSet.all(1, len(states))
    weights, run = [], []
    for recursion in range(RECURSIONS):
        plan = session.route(recursion, candidates.gather(states), candidates)
        mix = session.mix(recursion, plan, plan.tokens.gather(states))
        weights.append(plan.tokens.scatter(torch.zeros(len(states), dtype=torch.float64), mix.emit))
        run.append(len(plan.tokens))
        candidates = plan.tokens
    return session, weights, run


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_halting_by_hand(mode: str) -> None:
    """With epsilon 0.01 a token of 0.995 halts at once, of 0.7 after two recursions, of 0.1 when none is left."""
    session, weights, run = halting(mode, [0.995, 0.7, 0.1, 0.985])
    assert run == ([4, 4, 4] if mode == "soft" else [4, 3, 1])
    found = torch.stack(weights, 1)
    expected = [[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.1, 0.1, 0.8], [0.985, 0.015, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    # Updates plus remainder, on average over all tokens: 1 + 1, 2 + 0.3, 3 + 0.8, 2 + 0.015.
    ponder = (2 + 2.3 + 3.8 + 2.015) / 4
    assert mean(session, "ponder_cost") == pytest.approx(ponder)
    assert session.losses["ponder_loss"].item() == pytest.approx(0.1 * ponder)


def ema_update(router: Any, quantiles: list[float], batches: list[float]) -> None:
    """A step in which the micro-batches of all ranks add up to these figures."""
    router.update({"threshold_quantiles": torch.tensor(quantiles), "threshold_batches": torch.tensor(batches)})


def test_a_threshold_is_the_mean_over_micro_batches_and_ranks() -> None:
    router, shared = new(EmaThresholdConfig()), new(EmaThresholdConfig())
    ema_update(router, [0.0, 1.0, -2.0], [0, 1, 1])
    ema_update(shared, [0.0, 6.0, -12.0], [0, 6, 6])
    for either in (router, shared):
        # The first one counts in full; a recursion that no token has reached keeps its threshold of 0.
        assert [either.threshold(r).item() for r in range(3)] == pytest.approx([0.0, 1.0, -2.0])
    ema_update(router, [5.0, 3.0, 0.0], [1, 1, 0])
    assert router.threshold(0).item() == pytest.approx(5.0)
    assert 1.0 < router.threshold(1).item() < 3.0
    assert router.threshold(2).item() == pytest.approx(-2.0)


@pytest.mark.parametrize(("mode", "losses"), [("train", {"z_loss"}), ("topk", set()), ("causal", set())])
def test_losses_are_for_training(mode: Mode, losses: set[str]) -> None:
    for config in (EmaThresholdConfig(z_coeff=0.1), ExpertChoiceConfig(z_coeff=0.1, aux_coeff=0.1)):
        session = begin(new(config), mode)
        session.route(1, rows(), EVERYTHING)
        assert session.losses.keys() - {"aux_loss"} == losses


@pytest.mark.parametrize(("recursion", "number"), [(1, 8), (2, 6)])
def test_the_quantile_that_leaves_the_capacity_above_it(recursion: int, number: int) -> None:
    """Capacities 1, 2/3, 1/3: recursion 1 takes 2/3 of its candidates, recursion 2 half of them."""
    router = new(EmaThresholdConfig())
    ordered = scores(router, recursion, rows()).sort().values
    between = (ordered[12 - number - 1] + ordered[12 - number]) / 2
    ema_update(router, [between.item() if r == recursion else 0.0 for r in range(3)], [0, 1, 1])
    session = begin(router)
    plan = session.route(recursion, rows(), EVERYTHING)
    assert len(plan.tokens) == number
    found = session.totals["threshold_quantiles"][recursion].item()
    assert found == pytest.approx(ordered[12 - number - 1].item(), rel=1e-6)
    assert session.totals["threshold_batches"][recursion] == 1


PROBABILITIES = (0.5, 0.1, 0.4)  # skip, forward, recurse


def decide(count: int, step: int = 0) -> tuple[RoutingSession, list[int]]:
    """Skip/forward/recurse with the same probabilities everywhere; tokens that take each recursion."""
    torch.manual_seed(0)
    router = new(SkipForwardRecurseConfig(hidden=4, depth_coeff=0.25))
    logits = torch.tensor(PROBABILITIES, dtype=torch.float64).log()
    router.head.forward = lambda states: logits.expand(len(states), 3)
    states = torch.zeros(count, DIM, dtype=torch.float64)
    session, candidates, taken = (
        router.begin(states, RoutingContext(1, count, "train", step)),
        TokenSet.all(1, count),
        [],
    )
    for recursion in range(RECURSIONS):
        plan = session.route(recursion, candidates.gather(states), candidates)
        session.mix(recursion, plan, plan.tokens.gather(states))
        candidates = plan.tokens
        taken.append(len(candidates))
    return session, taken


@pytest.mark.parametrize("step", [0, 5000])
def test_actions_are_sampled_with_their_probabilities(step: int) -> None:
    """Whatever the temperature, which is for the gradient. Four standard deviations."""
    skip, _, recurse = PROBABILITIES
    wanted, arriving = [], 1.0
    for _ in range(RECURSIONS):
        wanted.append(arriving * (1 - skip))
        arriving *= recurse
    session, taken = decide(20_000, step)
    for share, number in zip(wanted, taken, strict=True):
        assert abs(number / 20_000 - share) < 4 * math.sqrt(share * (1 - share) / 20_000)
    depth = sum(wanted)
    assert mean(session, "expected_depth") == pytest.approx(depth, rel=1e-6)
    assert session.losses["depth_loss"].item() == pytest.approx(0.25 * depth, rel=1e-6)


def test_the_temperature_falls_linearly() -> None:
    config = SkipForwardRecurseConfig(temperature_start=2.0, temperature_end=0.5, temperature_steps=100)
    router = new(config)
    assert [router.temperature(step) for step in (0, 50, 100, 1000)] == [2.0, 1.25, 0.5, 0.5]


def test_random_depths_differ_between_sequences_of_a_batch() -> None:
    model = build_model(tiny_config(RandomConfig()))
    with torch.no_grad():
        depth = model(tokens(batch=1).expand(6, -1)).depth
    assert len({tuple(row) for row in depth.tolist()}) == 6


def test_marked_rows_alone_are_replaced() -> None:
    marked = MarkedSet.of(torch.arange(4))
    assert marked.scatter(torch.zeros(4), torch.ones(4)).tolist() == [1, 1, 1, 1]
    marks, _ = marked.where(torch.tensor([True, False, True, True]))
    marks, _ = marks.where(torch.tensor([True, True, False, True]))
    assert marks.scatter(torch.zeros(4, 2), torch.ones(4, 2)).tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]
