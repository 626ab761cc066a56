"""Switches of skip/forward/recurse and the monotone router, compared with values worked out from their definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.config import MonotoneConfig, RecursionConfig, RouterConfig, SkipForwardRecurseConfig, config_from_dict
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.model import KVCache, build_model
from megamor.routing import RoutingContext, RoutingSession, TokenSet, build_router
from megamor.routing.skip_forward_recurse import RECURSE, prefix_means
from tests.combinations import fitted, lively_model, tiny_config, tokens

DIM, RECURSIONS = 8, 3
PROBABILITIES = (0.5, 0.1, 0.4)  # skip, forward, recurse


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router_of(config: RouterConfig) -> Any:
    router = build_router(config, DIM, RECURSIONS).double()
    for number, parameter in enumerate(router.parameters()):
        parameter.data = random(*parameter.shape, seed=number)
    router.reset()
    return router


def run(router: Any, states: Tensor, context: RoutingContext) -> tuple[RoutingSession, Tensor]:
    """The session and the depths [T] of tokens that keep their `states` [T, d]."""
    session, candidates = router.begin(states, context), context.everything
    depth = torch.zeros(len(states), dtype=torch.int64)
    for recursion in range(RECURSIONS):
        plan = session.route(recursion, candidates.gather(states), candidates)
        candidates = plan.tokens
        session.mix(recursion, plan, candidates.gather(states))
        depth = candidates.scatter(depth, torch.full((len(candidates),), recursion + 1))
    return session, depth


def mean(session: RoutingSession, name: str) -> float:
    return float(session.ratios[name].numerator / session.ratios[name].denominator)


def constant(router: Any, probabilities: tuple[float, ...] = PROBABILITIES) -> Any:
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    router.head.forward = lambda rows: logits.expand(len(rows), 3)
    return router


def test_action_rates_and_depth_are_those_of_the_sample() -> None:
    """Each decision that is not to skip runs the core once: effective depth by the seed's definition is real depth."""
    torch.manual_seed(0)
    router = constant(router_of(SkipForwardRecurseConfig(hidden=4)))
    session, depth = run(router, random(20_000, DIM), RoutingContext(1, 20_000))
    names = ("skip_rate", "forward_rate", "recurse_rate")
    for recursion in (1, 2):
        for name, probability in zip(names, PROBABILITIES, strict=True):
            assert mean(session, f"{name}_{recursion}") == pytest.approx(probability, abs=0.02)
    assert mean(session, "recurse_rate_3") == 0  # the last recursion: recursing is forwarding
    assert mean(session, "forward_rate_3") == pytest.approx(0.5, abs=0.03)
    assert sum(mean(session, name) for name in names) == pytest.approx(1)
    decisions = session.ratios["skip_rate"].denominator
    assert decisions == sum(session.ratios[f"skip_rate_{r}"].denominator for r in (1, 2, 3))
    assert decisions - session.ratios["skip_rate"].numerator == depth.sum()
    assert mean(session, "recurse_rate") == pytest.approx((0.4 + 0.16) / (1 + 0.4 + 0.16), abs=0.01)


def test_rates_have_the_prefix_of_their_stage() -> None:
    stages = [{"first_layer": layer, "router": {"kind": "skip_forward_recurse"}} for layer in (1, 2)]
    config = tiny_config(SkipForwardRecurseConfig(hidden=4))
    listed = config_from_dict({"recursion": {"num_recursions": 2, "stages": stages}}).recursion
    model = build_model(replace(config, recursion=listed))
    ratios = model(tokens(), mode="train").ratios
    assert {f"layers_{layer}/skip_rate_{r}" for layer in (1, 2) for r in (1, 2)} <= ratios.keys()


def test_the_rate_loss_is_on_the_expected_rate() -> None:
    torch.manual_seed(0)
    config = SkipForwardRecurseConfig(hidden=4, depth_coeff=2.0, recursion_rate=0.3)
    session, _ = run(constant(router_of(config)), random(20_000, DIM), RoutingContext(1, 20_000))
    rate = (0.4 + 0.16) / (1 + 0.4 + 0.16)
    assert session.losses["depth_loss"].item() == pytest.approx(2 * (rate - 0.3) ** 2, rel=1e-6)


@pytest.mark.parametrize("target", [0.15, 0.5])
def test_the_recursion_rate_follows_its_target(target: float) -> None:
    torch.manual_seed(0)
    config = SkipForwardRecurseConfig(hidden=16, depth_coeff=10.0, recursion_rate=target)
    ratio = fitted(build_model(tiny_config(config)), 100).ratios["recurse_rate"]
    assert (ratio.numerator / ratio.denominator).item() == pytest.approx(target, abs=0.06)


def test_the_threshold_decides_who_recurses_at_inference() -> None:
    router = router_of(SkipForwardRecurseConfig(hidden=4, inference_threshold=0.3))
    logits = torch.tensor([[0.5, 0.2, 0.3], [0.45, 0.25, 0.3], [0.5, 0.21, 0.29], [0.1, 0.61, 0.29]]).log()
    assert router.choose(logits + 1e-6 * torch.tensor([0, 0, 1.0])).tolist() == [2, 2, 0, 1]
    assert router_of(SkipForwardRecurseConfig(hidden=4)).choose(logits).tolist() == [0, 0, 0, 1]
    assert router.inference_rule.threshold == 0.3
    depths = []
    for threshold in (0.05, 0.3, 0.9):
        router.config = replace(router.config, inference_threshold=threshold)
        depths.append(run(router, random(400, DIM), RoutingContext(1, 400, "causal"))[1].double().mean())
    assert depths[0] > depths[1] > depths[2]


def test_a_target_measures_the_rule_with_its_threshold() -> None:
    """What training counts for the first decision is what inference then does."""
    config = SkipForwardRecurseConfig(hidden=4, inference_threshold=0.2, target_depth=1.5)
    states, router = random(400, DIM), router_of(config)
    router.shifts.zero_()
    torch.manual_seed(0)
    session, _ = run(router, states, RoutingContext(1, 400, "train"))
    choice = router.choose(router.head(states))
    counted = session.totals["causal_choices"][0].tolist()
    assert counted == [400, (choice != 0).sum(), (choice == RECURSE).sum()]
    _, depth = run(router, states, RoutingContext(1, 400, "causal"))
    assert (depth > 0).sum() == counted[1]


def test_prefix_means_of_documents() -> None:
    rows, begins = random(11, DIM), torch.tensor([0] * 6 + [6] * 1 + [7] * 4)
    router = torch.nn.Identity()
    means = prefix_means(rows, begins, RoutingContext(1, 11), router)
    for row, first in enumerate(begins.tolist()):
        torch.testing.assert_close(means[row], rows[first : row + 1].mean(0))
    # Not even rounding carries something from one document into the next.
    alone = prefix_means(rows[7:], torch.zeros(4, dtype=torch.int64), RoutingContext(1, 4), router)
    assert torch.equal(means[7:], alone)


def test_prefix_means_of_chunks() -> None:
    rows, memory, router = random(2 * 9, DIM).view(2, 9, DIM), {}, torch.nn.Identity()
    found = []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        length = end - start
        positions = torch.arange(start, end).repeat(2)
        context = RoutingContext(2, length, "causal", positions=positions, memory=memory)
        begins = torch.arange(2).repeat_interleave(length) * length
        found.append(prefix_means(rows[:, start:end].flatten(0, 1), begins, context, router).view(2, length, DIM))
    torch.testing.assert_close(torch.cat(found, 1), rows.cumsum(1) / torch.arange(1, 10).view(1, 9, 1))


def test_a_document_takes_one_sampled_decision() -> None:
    torch.manual_seed(0)
    router = constant(router_of(SkipForwardRecurseConfig(hidden=4, granularity="sequence")), (0.3, 0.3, 0.4))
    begins = torch.arange(0, 300, 5).repeat_interleave(5)
    _, depth = run(router, random(300, DIM), RoutingContext(3, 100, begins=begins))
    by_document = depth.view(60, 5)
    assert (by_document == by_document[:, :1]).all()
    assert len(by_document[:, 0].unique()) == 4


def test_decisions_of_a_sequence_are_about_its_mean() -> None:
    """The same text after another beginning: other decisions, although each row is the same."""
    config = SkipForwardRecurseConfig(hidden=4, granularity="sequence")
    router, states = router_of(config), random(200, DIM)
    _, depth = run(router, states, RoutingContext(1, 200, "causal"))
    assert torch.equal(depth > 0, router.choose(router.head(states.cumsum(0) / torch.arange(1, 201)[:, None])) > 0)


def test_each_recursion_has_a_router_of_its_own() -> None:
    router = router_of(SkipForwardRecurseConfig(hidden=4, routers="per_recursion"))
    recurse, skip, states = torch.tensor([0.0, 0.0, 9.0]), torch.tensor([9.0, 0.0, 0.0]), random(5, DIM)
    for head, logits in zip(router.head, (recurse, skip, recurse), strict=True):
        head.forward = lambda rows, logits=logits: logits.expand(len(rows), 3)
    _, depth = run(router, states, RoutingContext(1, 5, "causal"))
    assert depth.tolist() == [1] * 5


def test_the_recursion_is_an_input() -> None:
    router, states = router_of(SkipForwardRecurseConfig(hidden=4, recursion_input=True)), random(6, DIM)
    everything = TokenSet.all(1, 6)
    session = router.begin(states, RoutingContext(1, 6, "causal"))
    for recursion in range(RECURSIONS):
        found = session.logits(recursion, states, everything)
        torch.testing.assert_close(found, router.head(states + router.recursion_embedding.weight[recursion]))


def test_an_attention_gate_sees_the_states_of_its_own_token() -> None:
    router = router_of(SkipForwardRecurseConfig(hidden=4, gate="attention"))
    head, states = router.head, [random(6, DIM, seed=seed) for seed in range(RECURSIONS)]
    session = router.begin(states[0], RoutingContext(1, 6, "causal"))
    for recursion in range(RECURSIONS):
        # A token whose row is not among those that decide at recursion 1 has no state there.
        found = session.logits(recursion, states[recursion], TokenSet.all(1, 6))
        seen = [state @ head.key_value.weight.T for state in states[: recursion + 1]]
        seen += [torch.zeros(6, 8, dtype=torch.float64)] * (RECURSIONS - recursion)
        keys, values = torch.stack(seen, 1).split(4, dim=-1)
        query = states[recursion] @ head.query.weight.T
        weights = (torch.einsum("nh,nrh->nr", query, keys) / 2).softmax(-1)
        wanted = torch.einsum("nr,nrh->nh", weights, values) @ head.out.weight.T
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"gate": "attention", "granularity": "sequence"}, "use gate: mlp, or granularity: token"),
        ({"granularity": "sequence", "target_depth": 2.0}, "can't hold a target depth: use granularity: token"),
        ({"recursion_rate": 0.3, "target_depth": 2}, "set one of them to null"),
        ({"recursion_rate": 0.7}, "give less than 0.6667"),
    ],
)
def test_contradictions_are_refused(router: dict[str, Any], message: str) -> None:
    values = {
        "model": {"num_layers": 8},
        "recursion": {"num_recursions": 3, "sharing": "middle_cycle"},
        "router": {"kind": "skip_forward_recurse", **router},
        "train": {"max_steps": 1000},
    }
    with pytest.raises(ConfigError, match=message):
        validate(config_from_dict(values))
    validate(config_from_dict(values | {"router": {"kind": "skip_forward_recurse", "recursion_rate": 0.6}}))


def test_beams_keep_their_means() -> None:
    """Beam search reorders what routers remember along with the keys."""
    from megamor.interop.modeling_megamor import DecodingCache

    model = lively_model(tiny_config(SkipForwardRecurseConfig(hidden=32, granularity="sequence")))
    ids, beams = tokens(), torch.tensor([2, 2, 0])
    cache = KVCache(model.config.model, 3, 24, torch.float64)
    with torch.no_grad():
        model(ids[:, :10], mode="causal", cache=cache)
        DecodingCache(cache).reorder_cache(beams)
        found = model(ids[:, 10:], mode="causal", cache=cache)
        wanted = model(torch.cat((ids[beams, :10], ids[:, 10:]), 1), mode="causal")
    torch.testing.assert_close(found.logits, wanted.logits[:, 10:], atol=1e-9, rtol=0)


def monotone(threshold: float, logits: tuple[tuple[float, ...], ...]) -> Any:
    """A router whose gates are sigmoid(logits[r]) for the tokens in turn; states are their numbers."""
    router = router_of(MonotoneConfig(threshold=threshold, depth_coeff=0.5))
    torch.nn.init.zeros_(router.bias)
    for head, values in zip(router.heads, logits, strict=True):
        table = torch.tensor(values, dtype=torch.float64)
        head.forward = lambda rows, table=table: table[rows[:, :1].long()]
    return router


def test_monotone_weights_fall_and_a_token_that_has_left_stays_away() -> None:
    gates = torch.tensor([[0.9, 0.8, 0.4], [0.9, 0.68, 0.9], [0.99, 0.9, 0.99]], dtype=torch.float64)
    router = monotone(0.5, tuple(map(tuple, gates.logit().tolist())))
    states = torch.arange(3, dtype=torch.float64)[:, None].expand(3, DIM)
    session, candidates = router.begin(states, RoutingContext(1, 3)), TokenSet.all(1, 3)
    products = gates.cumprod(0)
    wanted = [[0, 1], [0, 1], [0]]  # token 1 is at .544 after two gates and at .490 after three, token 2 at .4
    for recursion, tokens_left in enumerate(wanted):
        plan = session.route(recursion, candidates.gather(states), candidates)
        assert plan.tokens.rows(torch.device("cpu")).tolist() == tokens_left
        weight = (products[recursion, tokens_left] - 0.5) / 0.5
        torch.testing.assert_close(plan.mix.from_core, weight)
        torch.testing.assert_close(plan.mix.from_stream, 1 - weight)
        candidates = plan.tokens
    # Products of the tokens that arrive at each gate: all three, then tokens 0 and 1 twice.
    soft = (products[0].sum() + products[1, :2].sum() + products[2, :2].sum()) / 3
    assert session.losses["depth_loss"].item() == pytest.approx(0.5 * soft.item())


def test_monotone_depth_falls_with_its_coefficient() -> None:
    depths = []
    for coefficient in (1e-4, 1.0):
        torch.manual_seed(0)
        config = tiny_config(MonotoneConfig(depth_coeff=coefficient), "halted_reuse")
        depths.append(fitted(build_model(config), 60).depth.double().mean().item())
    assert depths[1] < depths[0] - 0.5, depths


@pytest.mark.parametrize("sharing", ["cycle", "middle_sequence"])
def test_halted_reuse_is_hybrid_until_a_token_has_keys_of_two_recursions(sharing: str) -> None:
    """After two applications of a block, first and last keys are the same ones to refresh; after three they differ."""
    found = {}
    for policy in ("hybrid", "halted_reuse"):
        for recursions in (2, 3):
            config = tiny_config(MonotoneConfig(), policy, sharing)
            layers = 2 * recursions + (2 if sharing.startswith("middle") else 0)
            recursion = RecursionConfig(recursions, sharing, policy)  # type: ignore[arg-type]
            config = replace(config, model=replace(config.model, num_layers=layers), recursion=recursion)
            with torch.no_grad():
                found[policy, recursions] = lively_model(config)(tokens(), mode="causal").logits
    torch.testing.assert_close(found["hybrid", 2], found["halted_reuse", 2], atol=1e-12, rtol=0)
    assert (found["hybrid", 3] - found["halted_reuse", 3]).abs().max() > 1e-4
