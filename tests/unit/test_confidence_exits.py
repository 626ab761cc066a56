"""Confidence exits: decisions by the rules' formulas, what a token that stops becomes, and what a rule costs.

The reference for a stopped token is the same model under a rule that stops nothing, told by bounds how deep each token
goes. Except for token-choice, it is the model without a rule as well.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import TokenChoiceConfig
from megamor.config.exits import EXITS, ExitName, ExitRule
from megamor.errors import ConfigError
from megamor.model import Transformer, build_model
from megamor.model.flops import executed_flops
from megamor.routing import DepthBounds, RoutingSession
from megamor.routing.confidence import ConfidenceSession
from megamor.routing.halting import HaltingSession
from tests.causality.test_causality import CUT, change_future
from tests.combinations import (
    BATCH,
    KV_POLICIES,
    ROUTERS,
    SEQ_LEN,
    SHARINGS,
    lively_model,
    staged_config,
    tiny_config,
    tokens,
    vanilla_config,
)
from tests.decoding.test_cached_decoding import PROMPT
from tests.decoding.test_cached_decoding import check as check_decoding
from tests.exits import median_rule, run
from tests.learning.test_learning import profile, rectangular_work

NUM_TOKENS = BATCH * SEQ_LEN
NEVER = ExitRule("max_probability", 1.0)
DEPTHLESS = {"expert_choice_additive", "skip_forward_recurse_sequence"}
"""Routers with which no token gets beyond the first recursion in some of these models, because of the weights drawn."""
DEEP = [router for router in ROUTERS if router != "fixed_2_of_3"]


def with_exit(
    router: str, name: ExitName, kv_policy: str = "recursion_wise", sharing: str = "middle_cycle"
) -> Transformer:
    """A model under a rule that stops some of its tokens."""
    model = lively_model(tiny_config(ROUTERS[router], kv_policy, sharing)).eval()
    model.set_exit(median_rule(model, name))
    return model


def states_by_depth(model: Transformer) -> list[Tensor]:
    """The stage's stream [T, d] with all tokens at depth 0, 1, 2, 3, of a model of fixed depth."""
    states: list[Tensor] = []
    hook = model.stage.register_forward_hook(lambda _, inputs, output: states.extend((inputs[0], output.stream)))
    for depth in (1, 2, 3):
        all_alike = torch.full((NUM_TOKENS,), depth)
        run(model, None, DepthBounds(all_alike, all_alike))
    hook.remove()
    return [states[0], *states[1::2]]


@pytest.mark.parametrize("name", EXITS)
def test_tokens_stop_where_the_formula_says(name: ExitName) -> None:
    """Under share_first a token's states don't depend on how deep others go, so plain passes give all of them."""
    model = lively_model(tiny_config(ROUTERS["fixed"], "share_first")).eval()
    rule, s = median_rule(model, name), states_by_depth(model)
    scaled = [x / (x.square().mean(-1, keepdim=True) + model.config.model.norm_eps).sqrt() for x in s]
    p = [torch.softmax((x * model.norm.weight) @ model.embed.weight.T, -1).detach() for x in scaled]
    nothing = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    stops = {
        "max_probability": [p[r].max(-1).values >= rule.threshold for r in (1, 2)],
        "entropy": [torch.distributions.Categorical(p[r]).entropy() <= rule.threshold for r in (1, 2)],
        "kl": [nothing, F.kl_div(p[1].log(), p[2], reduction="none").sum(-1) <= rule.threshold],
        "acceleration": [nothing, (s[2] - 2 * s[1] + s[0]).norm(dim=-1) / s[2].norm(dim=-1) <= rule.threshold],
    }[name]
    expected = torch.where(stops[0], 1, torch.where(stops[1], 2, 3))
    depth = run(model, rule).depth.flatten()
    assert torch.equal(depth, expected)
    assert len(depth.unique()) == (2 if (rule.first == 2) else 3)


def check_replay(router: str, name: ExitName, kv_policy: str, sharing: str) -> None:
    model = with_exit(router, name, kv_policy, sharing)
    rule, free = model.exit, run(model, None)
    out = run(model, rule)
    least = out.depth.flatten()
    for other in (NEVER, None)[: 1 if router.startswith("token_choice") else 2]:
        replayed = run(model, other, DepthBounds(least, least))
        assert torch.equal(replayed.depth, out.depth)
        torch.testing.assert_close(out.logits, replayed.logits, atol=1e-12, rtol=0)
    if router not in DEPTHLESS:
        assert 0 < (out.depth < free.depth).sum() < NUM_TOKENS
    # What serving demands of a depth comes before the rule.
    deep = free.depth.flatten()
    assert torch.equal(run(model, rule, DepthBounds(deep, deep)).depth, free.depth)


@pytest.mark.parametrize(("router", "name"), list(product(DEEP, EXITS)))
def test_a_stopped_token_is_that_of_a_bounded_pass(router: str, name: ExitName) -> None:
    number = DEEP.index(router) + EXITS.index(name)
    check_replay(router, name, KV_POLICIES[number % 3], SHARINGS[number % len(SHARINGS)])


@pytest.mark.parametrize("gating", ["multiplicative", "additive"])
def test_a_stopped_token_keeps_the_gate_that_it_has_chosen(gating: str) -> None:
    """It leaves with x_in + g·y, as when it had chosen the depth at which it stops, and its probe sees just that."""
    config = tiny_config(TokenChoiceConfig(gating=gating), "share_first")  # type: ignore[arg-type]
    model = lively_model(config).eval()
    states: list[Tensor] = []
    model.stage.register_forward_hook(lambda _, inputs, output: states.extend((inputs[0], output.stream)))
    y: list[Tensor] = []
    model.stage.blocks[-1].register_forward_hook(lambda _, inputs, output: y.append(output[0]))
    run(model, None)
    chosen = model.stage.router.head(states[0]).softmax(-1)
    assert chosen.argmax(-1).unique().tolist() == [0, 1, 2]
    gate = chosen.amax(-1, keepdim=True) if gating == "multiplicative" else 1.0
    probed: list[Tensor] = []
    y.clear()
    with pytest.MonkeyPatch.context() as patch:
        stops = ConfidenceSession.stops
        patch.setattr(ConfidenceSession, "stops", lambda s, r, x, t: (probed.append(x), stops(s, r, x, t))[1])
        assert run(model, ExitRule("entropy", 99.0)).depth.unique().tolist() == [1]
    torch.testing.assert_close(states[-1], states[0] + gate * y[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(probed[0], states[-1], atol=1e-12, rtol=0)


def check_cached(router: str, name: ExitName, kv_policy: str, sharing: str) -> None:
    check_decoding(with_exit(router, name, kv_policy, sharing), [PROMPT] + [1] * (SEQ_LEN - PROMPT))


@pytest.mark.parametrize(
    ("router", "name", "kv_policy"),
    [
        *(("fixed", name, "recursion_wise") for name in EXITS),
        ("expert_choice", "entropy", "hybrid"),
        ("token_choice", "kl", "recursion_wise"),
        ("token_choice", "max_probability", "hybrid"),
        ("act_hard", "acceleration", "share_first"),
        ("skip_forward_recurse", "kl", "share_first"),
    ],
)
def test_cached_decoding_equals_the_full_pass(router: str, name: ExitName, kv_policy: str) -> None:
    check_cached(router, name, kv_policy, "middle_cycle")


@pytest.mark.slow
@pytest.mark.parametrize(("router", "name", "kv_policy", "sharing"), list(product(DEEP, EXITS, KV_POLICIES, SHARINGS)))
def test_the_whole_product(router: str, name: ExitName, kv_policy: str, sharing: str) -> None:
    check_replay(router, name, kv_policy, sharing)
    check_cached(router, name, kv_policy, sharing)
    check_future(router, name, kv_policy, sharing)


def check_future(router: str, name: ExitName, kv_policy: str, sharing: str) -> None:
    """Later tokens and other documents have no influence, on logits or on depths."""
    model = with_exit(router, name, kv_policy, sharing)
    documents = (torch.arange(SEQ_LEN) // 9).expand(BATCH, SEQ_LEN)
    with torch.no_grad():
        for ids in (None, documents):
            before, after = (model(x, mode="causal", documents=ids) for x in (tokens(), change_future(tokens())))
            torch.testing.assert_close(after.logits[:, :CUT], before.logits[:, :CUT], atol=1e-12, rtol=0)
            assert torch.equal(after.depth[:, :CUT], before.depth[:, :CUT])
        packed = model(tokens(), mode="causal", documents=documents)
        alone = [model(part, mode="causal") for part in tokens().split(9, dim=1)]
    if not model.stage.router.reads_text:
        assert torch.equal(packed.depth, torch.cat([out.depth for out in alone], 1))
        torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], 1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice"])
@pytest.mark.parametrize("name", EXITS)
def test_later_tokens_and_other_documents_have_no_influence(router: str, name: ExitName) -> None:
    check_future(router, name, "recursion_wise", "middle_cycle")


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "act_hard"])
@pytest.mark.parametrize("name", EXITS)
def test_a_rule_applies_in_every_stage_that_is_deep_enough(router: str, name: ExitName) -> None:
    """The model has stages of 3, 2 and 3 recursions."""
    model = lively_model(staged_config(ROUTERS[router])).eval()
    always = ExitRule(name, 1e-9 if name == "max_probability" else 99.0)
    if router == "fixed":
        second = NUM_TOKENS if always.first == 2 else 0
        assert run(model, always).work[:5, 0].tolist() == [NUM_TOKENS, second, 0, NUM_TOKENS, second]
    rule = median_rule(model, name)
    assert (run(model, rule).depth < run(model, None).depth).any()
    model.set_exit(rule)
    check_decoding(model, [PROMPT] + [1] * (SEQ_LEN - PROMPT))


@pytest.mark.parametrize("router", ["fixed", "token_choice", "act_hard"])
@pytest.mark.parametrize("name", EXITS)
def test_padding_has_no_influence(router: str, name: ExitName) -> None:
    model, lengths = with_exit(router, name), (SEQ_LEN, 7, 0)
    with torch.no_grad():
        out = model(tokens(), mode="causal", lengths=lengths)
        for number, length in enumerate(lengths[:2]):
            alone = model(tokens()[number : number + 1, :length], mode="causal")
            torch.testing.assert_close(out.logits[number, :length], alone.logits[0], atol=1e-12, rtol=0)
            assert torch.equal(out.depth[number, :length], alone.depth[0])


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice", "act_hard", "act_soft"])
@pytest.mark.parametrize("name", EXITS)
def test_counted_flops_contain_the_probes(router: str, name: ExitName) -> None:
    """Within 1 % of torch's count; a prediction rule costs a product with the head for each row that it looks at."""
    model = with_exit(router, name)
    free = run(model, None)
    out, profiled = profile(lambda ids: model(ids, mode="causal"), tokens())
    counted = executed_flops(model.config, BATCH, rectangular_work(model.config, out), probes=float(out.probes)).forward
    counted += 2 * 4 * model.config.model.dim * BATCH * (SEQ_LEN**2 - SEQ_LEN * (SEQ_LEN + 1) / 2)
    assert profiled == pytest.approx(counted, rel=0.01)
    if name == "acceleration":
        assert out.probes == 0
    elif router == "fixed":
        assert out.probes == NUM_TOKENS + out.work[1, 0]  # after recursion 1, and after 2
    elif router == "expert_choice":
        # Only tokens that the router would send on are looked at.
        assert free.work[1, 0] <= out.probes < NUM_TOKENS


def test_a_rule_leaves_training_and_weights_alone() -> None:
    model = lively_model(tiny_config(ROUTERS["expert_choice"]))
    names, free = list(model.state_dict()), {}
    for rule in (None, ExitRule("entropy", 99.0)):
        model.set_exit(rule)
        for mode in ("train", "topk"):
            out = model(tokens(), mode=mode)
            assert torch.equal(out.logits, free.setdefault(mode, out.logits)), mode
    assert list(model.state_dict()) == names
    assert model(tokens(), mode="causal").depth.unique().tolist() == [1]


def test_rules_that_can_not_be_are_refused() -> None:
    for name, threshold in (
        ("max_probability", -0.1),
        ("max_probability", 1.5),
        ("kl", -0.1),
        ("entropy", float("nan")),
    ):
        with pytest.raises(ConfigError, match=rf"threshold = {threshold}"):
            ExitRule(name, threshold)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exit = patience is unknown: give one of max_probability, entropy, kl"):
        ExitRule("patience", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"entropy needs a stage of 2 recursions or more"):
        build_model(vanilla_config()).set_exit(ExitRule("entropy", 1.0))
    two = build_model(tiny_config(ROUTERS["fixed_2_of_3"]))
    two.set_exit(ExitRule("entropy", 1.0))
    for name in ("kl", "acceleration"):
        with pytest.raises(ConfigError, match=f"exit = {name} needs a stage of 3 recursions"):
            two.set_exit(ExitRule(name, 1.0))  # type: ignore[arg-type]
    assert two.exit == ExitRule("entropy", 1.0)


def test_a_router_that_emits_and_does_not_say_how_tokens_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(tiny_config(ROUTERS["act_hard"]))
    monkeypatch.setattr(HaltingSession, "leaving_mix", RoutingSession.leaving_mix)
    with pytest.raises(ConfigError, match="HaltingSession emits a weighted sum and has no `leaving_mix`"):
        run(model, ExitRule("entropy", 1.0))


def test_many_rows_are_predicted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXITS:
        model = with_exit("fixed", name)
        whole = run(model, model.exit)
        model = with_exit("fixed", name)
        with monkeypatch.context() as patch:
            patch.setattr("megamor.routing.confidence.ROWS_AT_ONCE", 7)
            assert torch.equal(run(model, model.exit).depth, whole.depth)
