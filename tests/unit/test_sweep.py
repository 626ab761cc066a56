"""A sweep over inference rules: each entry is what the model does under that rule, found in another way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamor.config import Config, FixedDepthConfig, TargetConfig
from megamor.config.exits import ExitRule
from megamor.data.loader import MicroBatch
from megamor.errors import ConfigError
from megamor.evaluate.loss import dataset_losses, open_validation_set
from megamor.evaluate.sweep import EXIT_THRESHOLDS, Setting, measure, settings
from megamor.load import LoadedModel
from megamor.model import Transformer, build_model
from megamor.model.flops import executed_flops
from megamor.routing import DepthBounds
from tests.combinations import ROUTERS, staged_config, tiny_config, vanilla_config
from tests.unit.test_evaluation_figures import loaded_model, written

LENGTHS = (30, 2, 11, 5, 1, 18)
"""Of documents: 66 labels, so that the last of three windows is short."""


def batch_of(loaded: LoadedModel, prefix: str) -> MicroBatch:
    (batch,) = open_validation_set(loaded, prefix).batches(0, 1, 3)
    return batch


def entry(loaded: LoadedModel, prefix: str, setting: Setting) -> dict[str, Any]:
    found = measure(loaded, {"set": prefix}, setting, batch_size=3)
    assert (found["rule"], found["value"]) == (setting.rule, None if setting.rule == "own" else setting.value)
    assert found["sets"]["set"] == {name: found[name] for name in found["sets"]["set"]}
    return found


def expected(model: Transformer, batch: MicroBatch, bounds: tuple[int, int] | None = None) -> dict[str, float]:
    """Figures of one batch, with `bounds` on each real token."""
    arguments = batch.arguments(torch.device("cpu"))
    limits = None if bounds is None else DepthBounds(*(torch.full((batch.num_tokens,), bound) for bound in bounds))
    with torch.no_grad():
        out = model(**arguments, mode="causal", bounds=limits, score_tokens=True)
    valid = arguments["labels"] >= 0
    flops = executed_flops(
        model.config, int(valid.sum()), out.work.tolist(), seq_len=1, pairs=float(out.pairs), probes=float(out.probes)
    )
    return {
        "loss": float(out.loss_sum / valid.sum()),
        "accuracy": float(out.scores.correct.sum() / valid.sum()),
        "mean_depth": float(out.depth[valid].double().mean()),
        "flops_per_token": flops.forward / int(valid.sum()),
    }


def with_weights(config: Config, model: Transformer, shift: float | None = None) -> Transformer:
    """A model of another configuration with the same weights, and a shift of its target."""
    other = build_model(config).to(torch.float64)
    state = {**other.state_dict(), **model.state_dict()}
    if shift is not None:
        state["stage.router.shift"] = torch.tensor(shift, dtype=torch.float64)
    other.load_state_dict(state)
    return other


def assert_same(found: dict[str, Any], wanted: dict[str, float]) -> None:
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_entries_are_what_the_model_does_under_each_rule(tmp_path: Path, router: str) -> None:
    """Bounds against a pass with bounds; thresholds against a model configured with them, or with such a shift."""
    loaded = loaded_model(tiny_config(ROUTERS[router]))
    prefix, model, config = written(tmp_path, LENGTHS), loaded.model, loaded.config
    batch = batch_of(loaded, prefix)
    deepest, kind, before = model.stage.router.num_recursions, config.router, expected(model, batch)
    chosen, left_out = settings(model, batch)
    rules = dict.fromkeys(setting.rule for setting in chosen)
    for rule in rules:
        # The ends of each list would be the same setting for some routers: all tokens stop, or none.
        same_rule = [setting for setting in chosen if setting.rule == rule]
        setting = same_rule[len(same_rule) // 3]
        if setting.rule == "own":
            wanted = before
        elif setting.rule == "max_depth":
            wanted = expected(model, batch, (0, int(setting.value)))
        elif setting.rule == "fixed_depth":
            wanted = expected(model, batch, (int(setting.value),) * 2)
            assert wanted["mean_depth"] == setting.value
        elif setting.rule in EXIT_THRESHOLDS:
            model.set_exit(ExitRule(setting.rule, setting.value))
            wanted = expected(model, batch)
            model.set_exit(None)
        elif setting.rule == "shift":
            own = float(getattr(model.stage.router, "shift", None) or 0.0)
            target = kind if kind.depth(3) else replace(kind, target_depth=2.0)
            changed = replace(config, router=target)
            if hasattr(kind, "capacity"):
                changed = replace(config, router=replace(target, capacity=model.stage.router.capacity))
            wanted = expected(with_weights(changed, model, own + setting.value), batch)
        else:
            changed = replace(config, router=replace(kind, **{setting.rule: setting.value}))
            wanted = expected(with_weights(changed, model), batch)
        assert_same(entry(loaded, prefix, setting), wanted)
    assert expected(model, batch) == before, "the model is left as it was"
    assert [s.value for s in chosen if s.rule == "fixed_depth"] == [*range(1, deepest + 1)]
    assert isinstance(kind, TargetConfig) == (len(rules) == 8) == (left_out == [])


def test_thresholds_change_the_depth(tmp_path: Path) -> None:
    """In both directions; the default shifts are in the scale of the scores."""
    for router in ("learned_threshold", "ema_threshold", "token_choice", "monotone", "act_hard"):
        loaded = loaded_model(tiny_config(ROUTERS[router]))
        prefix = written(tmp_path, LENGTHS)
        chosen, _ = settings(loaded.model, batch_of(loaded, prefix), max_depths=[], fixed_depths=[], exits={})
        own, *depths = (entry(loaded, prefix, setting)["mean_depth"] for setting in chosen)
        assert sorted(depths, reverse=router in ("monotone", "act_hard")) == depths
        assert depths[0] != depths[-1], router
        assert min(depths) <= own <= max(depths)


def test_flops_contain_what_an_exit_rule_predicts(tmp_path: Path) -> None:
    """Where no token leaves early, the head predicts it after each recursion but the last: 2·2·dim·vocab FLOPs more."""
    loaded = loaded_model(tiny_config(ROUTERS["fixed"]))
    prefix, model = written(tmp_path, LENGTHS), loaded.config.model
    own = entry(loaded, prefix, Setting())["flops_per_token"]
    probed = entry(loaded, prefix, Setting("max_probability", 1.0))
    assert probed["mean_depth"] == 3
    assert probed["flops_per_token"] == pytest.approx(own + 2 * 2 * model.dim * model.vocab_size, rel=1e-12)


def test_several_stages_and_sets(tmp_path: Path) -> None:
    """A depth is one of each stage (3, 2, 3 recursions); each kind of threshold is a rule; sets have equal weight."""
    loaded = loaded_model(staged_config(ROUTERS["expert_choice"]))
    prefixes = {name: written(tmp_path, lengths, name) for name, lengths in (("a", LENGTHS), ("b", (40,)))}
    chosen, left_out = settings(loaded.model, batch_of(loaded, prefixes["a"]))
    assert left_out == []
    assert {"inference_threshold", "shift"} <= {setting.rule for setting in chosen}
    chosen = [s for s in chosen if s.rule not in EXIT_THRESHOLDS]
    entries = [measure(loaded, prefixes, setting, lambda: {"acc": 0.5}, batch_size=3) for setting in chosen]
    fixed = [found for found in entries if found["rule"] == "fixed_depth"]
    assert [found["mean_depth"] for found in fixed] == [3, 6, 8]
    for found in entries:
        for name in ("loss", "accuracy", "mean_depth", "flops_per_token"):
            assert found[name] == pytest.approx(np.mean([figures[name] for figures in found["sets"].values()]))
        assert found["tasks"] == {"acc": 0.5}
    whole = next(found for found in entries if (found["rule"], found["value"]) == ("max_depth", 3))
    assert whole["sets"] == entries[0]["sets"]
    separate = dataset_losses(loaded, prefixes["a"])
    assert entries[0]["sets"]["a"]["loss"] == separate["loss_causal"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_depths": [4]}, "max_depth = 4: the model has 3 recursions; give 1 to 3"),
        ({"fixed_depths": [0]}, "fixed_depth = 0"),
        ({"thresholds": [1.0]}, "inference_threshold = 1.0: give a number between 0 and 1"),
        ({"exits": {"max_probability": [2.0]}}, "max_probability needs a number from 0 to 1"),
    ],
)
def test_values_out_of_range(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    loaded = loaded_model(tiny_config(ROUTERS["expert_choice"]))
    with pytest.raises(ConfigError, match=told):
        settings(loaded.model, batch_of(loaded, written(tmp_path, LENGTHS)), **options)


def test_nothing_to_sweep(tmp_path: Path) -> None:
    for config in (vanilla_config(), tiny_config(FixedDepthConfig(depth=1))):
        loaded = loaded_model(config)
        with pytest.raises(ConfigError, match="so its depth can't be changed: give a checkpoint of a recursive one"):
            settings(loaded.model, batch_of(loaded, written(tmp_path, LENGTHS)))


def test_what_fits_no_router_is_named(tmp_path: Path) -> None:
    """Two recursions are too few for a comparison of predictions, and random routing has no threshold."""
    config = tiny_config(ROUTERS["random"])
    recursion = replace(config.recursion, num_recursions=2)
    loaded = loaded_model(replace(config, recursion=recursion))
    batch = batch_of(loaded, written(tmp_path, LENGTHS))
    chosen, left_out = settings(loaded.model, batch)
    assert [sentence.split(":")[0] for sentence in left_out] == ["thresholds", "kl", "acceleration"]
    assert {s.rule for s in chosen} == {"own", "max_depth", "fixed_depth", "max_probability", "entropy"}
    assert settings(loaded.model, batch, max_depths=[], fixed_depths=[], thresholds=[], exits={}) == ([Setting()], [])


def test_scores_that_decide_about_nothing(tmp_path: Path) -> None:
    kind = replace(ROUTERS["ema_threshold"], capacity=(1.0, 1.0, 1.0))
    loaded = loaded_model(tiny_config(kind))
    chosen, _ = settings(loaded.model, batch_of(loaded, written(tmp_path, LENGTHS)))
    assert "shift" not in {setting.rule for setting in chosen}


def test_a_router_that_ignores_bounds_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model(tiny_config(ROUTERS["expert_choice"]))
    monkeypatch.setattr("megamor.routing.router.RoutingSession.bounded", lambda self, recursion, chosen, tokens: chosen)
    prefix = written(tmp_path, LENGTHS)
    for setting in (Setting("max_depth", 1), Setting("fixed_depth", 3)):
        with pytest.raises(ConfigError, match=f"{setting.rule} = {setting.value}: the router ignores bounds"):
            measure(loaded, {"set": prefix}, setting)
    assert loaded.model.depth_bounds is None
