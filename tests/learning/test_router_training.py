"""What routers promise about depths and gates, after training: not with weights that stand still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

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
from megamor.model import ModelOutput, Transformer, build_model
from megamor.model.flops import executed_flops
from tests.combinations import tiny_config

VOCAB, LENGTH = 96, 24
Step = Iterator[tuple[Transformer, ModelOutput]]


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels, kinds: a token's label is itself (kind 0), a permutation of it (1), or needs the one before."""
    ids = torch.randint(VOCAB, (size, LENGTH), generator=torch.Generator().manual_seed(step))
    permuted = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(7))
    before = torch.cat((ids[:, :1], ids[:, :-1]), 1)
    kind = ids % 3
    twice = permuted[(permuted[before] + ids) % VOCAB]
    return ids, torch.where(kind == 0, ids, torch.where(kind == 1, permuted[ids], twice)), kind


def training(router: RouterConfig, steps: int, lr: float = 3e-3) -> Step:
    """The model and its output in each of `steps` optimizer steps, before the update."""
    torch.manual_seed(0)
    # No block outside the core: the recursions alone can do the task.
    config = tiny_config(router, sharing="cycle")
    model = build_model(replace(config, model=replace(config.model, num_layers=3, vocab_size=VOCAB)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        ids, labels, _ = batch(step)
        out = model(ids, labels, step=step)
        (out.loss_sum / out.num_tokens + sum(out.router_losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield model, out
        optimizer.step()
        optimizer.zero_grad()
        model.stage.router.update(out.totals)


def trained(router: RouterConfig, steps: int, lr: float = 3e-3) -> Transformer:
    *_, (model, _) = training(router, steps, lr)
    return model


@torch.no_grad()
def depths(model: Transformer, step: int = 0, **how: object) -> Tensor:
    ids, labels, _ = batch(10**6, size=64)
    return model(ids, labels, step=step, **how).depth.detach()


def shares(depth: Tensor) -> list[float]:
    """Fraction of the tokens that took recursion 2 and 3."""
    return [(depth > r).float().mean().item() for r in (1, 2)]


@pytest.mark.parametrize("lr", [1e-2, pytest.param(5e-3, marks=pytest.mark.slow)])
def test_ema_thresholds_hold_their_shares_from_step_20_on(lr: float) -> None:
    """At the default decay, while scores move. With frozen weights any average would do."""
    found, thresholds = [], []
    for model, out in training(EmaThresholdConfig(alpha=1.0), steps=120, lr=lr):
        found.append(shares(out.depth))
        thresholds.append(model.stage.router.threshold(1).item())
    for first in (20, 40, 60, 80, 100):
        mean = torch.tensor(found[first : first + 20]).mean(0)
        torch.testing.assert_close(mean, torch.tensor([2 / 3, 1 / 3]), atol=0.05, rtol=0)
    assert max(thresholds[20:]) - min(thresholds[20:]) > 0.05  # the scores did move
    torch.testing.assert_close(
        torch.tensor(shares(depths(model, mode="causal"))), torch.tensor([2 / 3, 1 / 3]), atol=0.05, rtol=0
    )


def test_an_average_is_the_same_whatever_was_stored_before_the_average_had_a_warm_up() -> None:
    """The buffer keeps its meaning: the threshold times 1 - decay^n."""
    router = build_model(tiny_config(EmaThresholdConfig())).stage.router
    router.quantiles.copy_(torch.tensor([0.0, 0.3, -0.2]) * (1 - 0.95**7))
    router.num_updates.fill_(7)
    assert [router.threshold(r).item() for r in (1, 2)] == pytest.approx([0.3, -0.2])
    router.update({"threshold_quantiles": torch.tensor([0.0, 4.0, 0.0]), "threshold_batches": torch.tensor([0, 2, 0])})
    assert [router.threshold(r).item() for r in (1, 2)] == pytest.approx([(7 * 0.3 + 24 * 2.0) / 31, -0.2])
    assert router.num_updates.tolist() == [7, 8, 7]


def gates(out: ModelOutput) -> list[float]:
    ratios = [out.ratios[f"gate_{r}"] for r in (1, 2, 3)]
    return [(ratio.numerator / ratio.denominator).item() for ratio in ratios]


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_the_gates_of_the_random_control_stay_open(alpha: float) -> None:
    """At alpha, to which the auxiliary loss drives expert-choice's gates of selected tokens."""
    found = []
    for model, out in training(RandomConfig(alpha=alpha), steps=20):
        assert gates(out) == pytest.approx([alpha] * 3)
        assert [*model.stage.router.parameters()] == []
        found.append(shares(out.depth))
    torch.testing.assert_close(torch.tensor(found).mean(0), torch.tensor([2 / 3, 1 / 3]), atol=0.01, rtol=0)


TARGETS: dict[str, RouterConfig] = {
    "expert_choice": ExpertChoiceConfig(alpha=1.0),
    "expert_choice_aux_router": ExpertChoiceConfig(alpha=1.0, sampling="aux_router"),
    "token_choice": TokenChoiceConfig(),
    "token_choice_loss_free": TokenChoiceConfig(activation="sigmoid", balancing="loss_free"),
    "ema_threshold": EmaThresholdConfig(alpha=1.0),
    "learned_threshold": LearnedThresholdConfig(alpha=1.0),
    "learned_threshold_additive": LearnedThresholdConfig(gating="additive"),
    "act": HaltingConfig(),
    "pondernet": PonderNetConfig(),
    "monotone": MonotoneConfig(),
}
FAST = {("expert_choice", 1.5), ("token_choice", 1.5), ("learned_threshold", 2.2), ("act", 1.5), ("pondernet", 2.2)}
HELD = [
    pytest.param(router, target, marks=() if (router, target) in FAST else pytest.mark.slow)
    for router in TARGETS
    for target in (1.2, 1.5, 2.2, 2.7)
    if (router, target) != ("learned_threshold_additive", 1.5)  # tested on average
]


@pytest.mark.parametrize(("router", "target"), HELD)
def test_every_knob_holds_a_target_depth_under_the_inference_rule(router: str, target: float) -> None:
    model = trained(replace(TARGETS[router], target_depth=target), steps=150)
    assert depths(model, mode="causal").float().mean().item() == pytest.approx(target, abs=0.1)


@pytest.mark.slow
def test_additive_thresholds_hold_their_target_on_average() -> None:
    """Scores that only a straight-through gradient moves swing more than those of soft gates."""
    config = replace(TARGETS["learned_threshold_additive"], target_depth=1.5)
    found = [
        depths(model, mode="causal").float().mean().item()
        for step, (model, _) in enumerate(training(config, steps=350))
        if step >= 200 and step % 10 == 0
    ]
    assert sum(found) / len(found) == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize(
    "router", [pytest.param(name, marks=() if name == "ema_threshold" else pytest.mark.slow) for name in TARGETS]
)
def test_a_target_of_flops_is_held(router: str) -> None:
    """By what the inference rule executes on other tokens, counted as all executed FLOPs are."""
    model = trained(replace(TARGETS[router], target_flops=0.6), steps=150)
    ids, labels, _ = batch(10**6, size=64)
    with torch.no_grad():
        work = model(ids, labels, mode="causal").work.tolist()
    full = [(ids.numel(), ids.numel() * (LENGTH + 1) / 2)] * 3
    unshared = executed_flops(model.config, 64, [], LENGTH).blocks
    executed, whole = (executed_flops(model.config, 64, rows, LENGTH).blocks - unshared for rows in (work, full))
    assert executed / whole == pytest.approx(0.6, abs=0.03)


def test_moving_the_target_moves_the_depth() -> None:
    """In the middle of a run, as a resumed one would: the state is in the shift alone."""
    found = []
    for step, (model, out) in enumerate(training(LearnedThresholdConfig(alpha=1.0, target_depth=1.4), steps=160)):
        found.append(out.depth.float().mean().item())
        if step == 79:
            model.stage.router.control.target = 2.4
    assert sum(found[60:80]) / 20 == pytest.approx(1.4, abs=0.1)
    assert sum(found[140:]) / 20 == pytest.approx(2.4, abs=0.1)


@pytest.mark.parametrize(
    "target", [1.5, pytest.param(0.7, marks=pytest.mark.slow), pytest.param(2.0, marks=pytest.mark.slow)]
)
def test_a_target_depth_holds_in_training_and_at_inference(target: float) -> None:
    model = trained(SkipForwardRecurseConfig(hidden=32, target_depth=target), steps=150)
    assert depths(model, mode="causal").float().mean().item() == pytest.approx(target, abs=0.15)
    assert depths(model, step=150).float().mean().item() == pytest.approx(target, abs=0.2)


@pytest.mark.parametrize("target", [1.5, pytest.param(0.8, marks=pytest.mark.slow)])
def test_a_monotone_router_holds_its_target(target: float) -> None:
    *_, (model, out) = training(MonotoneConfig(target_depth=target), steps=150)
    # Not with recursions that do nothing: what is left of the weights adds up to the target too.
    ratio = out.ratios["soft_depth"]
    assert (ratio.numerator / ratio.denominator).item() > target - 0.25
    assert depths(model, mode="causal").float().mean().item() == pytest.approx(target, abs=0.1)


def test_all_three_actions_survive_where_they_are_needed() -> None:
    config = SkipForwardRecurseConfig(hidden=32, depth_coeff=0.05, target_depth=1.2, temperature_steps=200)
    depth = depths(trained(config, steps=200), mode="causal")
    used = torch.bincount(depth.flatten(), minlength=4) / depth.numel()
    assert min(used[0], used[1], used[2] + used[3]) > 0.05, used


def test_forward_and_recurse_have_different_gradients() -> None:
    """In a model whose loss depends on the number of recursions. With equal gradients, one of the two would die out."""
    model = trained(SkipForwardRecurseConfig(hidden=32), steps=5)
    model.zero_grad()
    ids, labels, _ = batch(99)
    model(ids, labels).loss_sum.backward()
    skip, forward, recurse = model.stage.router.head.fc2.weight.grad
    assert (forward - recurse).norm() > 0.1 * (forward.norm() + recurse.norm())
    assert skip.norm() > 0


def test_the_value_is_that_of_the_sampled_path() -> None:
    """The mixture is a gradient only: the same samples without gradients give the same loss, bit by bit."""
    model = trained(SkipForwardRecurseConfig(hidden=32), steps=5)
    ids, labels, _ = batch(99)
    losses = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(enabled):
            losses.append(model(ids, labels).loss_sum.item())
    torch.manual_seed(1)
    model.stage.router.begin = without_stops(model.stage.router.begin)
    assert losses == [model(ids, labels).loss_sum.item()] * 2


def without_stops(begin: Callable[..., object]) -> Callable[..., object]:
    def begun(*args: object) -> object:
        session = begin(*args)
        session.finish = lambda result: result  # type: ignore[attr-defined]
        return session

    return begun


@pytest.mark.parametrize("balancing", ["loss", "loss_free"])
def test_balancing_waits_for_the_end_of_the_warm_up(balancing: str) -> None:
    steps = 100
    router = TokenChoiceConfig(balancing=balancing, balance_warmup_steps=steps, bias_update_rate=0.05)
    seen = [*training(router, steps)]
    assert all("balance_loss" not in out.router_losses and out.depth.min() == 3 for _, out in seen)
    model = seen[-1][0]
    assert model.stage.router.bias.tolist() == [0.0, 0.0, 0.0]
    free = depths(model, step=steps, mode="train")
    assert (free == 3).float().mean() > 0.1
    out = model(*batch(0)[:2], step=steps)
    assert ("balance_loss" in out.router_losses) == (balancing == "loss")
    model.stage.router.update(out.totals)
    assert (model.stage.router.bias.abs().max() > 0) == (balancing == "loss_free")
