"""Studies: what a file may say, paired differences, scaling laws, and a small study from text to results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from megamor.checkpoint import TrainerState
from megamor.config import CheckpointConfig, Config, ExpertChoiceConfig, OptimConfig, RandomConfig, config_to_dict
from megamor.errors import ConfigError, TrainingError
from megamor.metrics import read_jsonl
from megamor.model.flops import expected_steps, nominal_flops
from megamor.parallel import init_world
from megamor.study import Study, jobs, load_study
from megamor.study.collect import _differences, check_matched, collect, statements
from megamor.study.data import _write_split, prepare
from megamor.study.jobs import (
    expected_flops,
    final_loss,
    fingerprint,
    grid,
    jobs_of,
    needs,
    run_config,
    run_job,
    weights_job,
)
from megamor.study.laws import Points, fit, interval, split_parameters
from megamor.study.run import set_up
from megamor.study.statistics import paired_difference, sentence
from tests.resume.runs import fit as train
from tests.resume.runs import named, tiny_run

BASE: dict[str, Any] = {
    "model": {"vocab_size": 96, "dim": 16, "num_layers": 8, "num_heads": 2, "num_kv_heads": 2, "ffn_dim": 32,
              "max_seq_len": 32},
    "recursion": {"num_recursions": 3, "sharing": "middle_cycle"},
    "router": {"kind": "expert_choice", "alpha": 0.7},
    "data": {"seq_len": 32, "document_mask": False},
    "train": {"global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "eval_sequences": 4},
}  # fmt: skip


def study_file(directory: Path, **keys: Any) -> Path:
    """A study of the tiny base; a key of None is left out."""
    (directory / "base.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
    values = {"base": "base.yaml", "arms": ["vanilla", "recursive", "mor"], "budget": {"flops": 4e9}, **keys}
    path = directory / "mine.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False), encoding="utf-8"
    )
    return path


def test_presets_change_the_router_and_the_sharing_alone(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, arms=["vanilla", "recursive", "mor", "random", "act"]))
    arms = {arm.name: arm.config for arm in study.arms}

    assert arms["vanilla"].recursion.num_recursions == 1
    assert arms["vanilla"].model == arms["mor"].model
    assert (arms["recursive"].router.kind, arms["recursive"].recursion) == ("fixed", arms["mor"].recursion)
    assert isinstance(arms["mor"].router, ExpertChoiceConfig)
    control = arms["random"].router
    assert isinstance(control, RandomConfig)
    assert (control.alpha, control.gates) == (0.7, "open")  # as much of the core as the learned router lets through
    assert arms["act"].router.kind == "act"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bugdet": 1}, "bugdet: unknown key; did you mean budget?"),
        ({"arms": None}, "arms is missing"),
        ({"arms": ["vanila"]}, "arms.vanila is no preset .* did you mean vanilla?"),
        ({"arms": {"a": {"sett": {}}}}, "arms.a.sett: unknown key"),
        ({"arms": {"a": {"set": {"train": {"max_steps": 3}}}}}, "arms.a.set has train.max_steps: .* aren't matched"),
        ({"arms": {"a": {"set": {"data": {"seq_len": 16}}}}}, "arms.a.set has data: .* aren't matched"),
        ({"arms": {"a": {"of": "b", "exit": "kl", "threshold": 1}}}, "arms.a.of = 'b': there is no such arm"),
        ({"arms": {"../a": {"preset": "mor"}}}, "give letters, digits"),
        ({"arms": ["mor", {"a": {}}]}, "or a mapping {name"),
        ({"arms": "mor"}, "arms = 'mor': input should be a mapping"),
        ({"axes": {"a": {"mor": {}}}}, "either arms or axes"),
        ({"set": "model.dim=3"}, "set = 'model.dim=3'"),
        ({"set": {"train": {"max_steps": 3}}}, "set.train.max_steps: the `budget`"),
        ({"lr": ["fast"], "seeds": "three"}, "(?s)lr.0 = 'fast'.*seeds = 'three'"),
        ({"pairs": [["mor", "mor"]]}, "paired with itself"),
        ({"law": {"baseline": "mor", "families": ["x"]}}, "no arm's name ends with _mor"),
        ({"budget": {"flops": [1e9, 1.001e9]}}, "differ in two digits"),
        ({"arms": {"mor": None, "a": {"of": "mor", "set": {"optim": {"lr": 1}}}}}, "leave out `set`"),
        ({"arms": {"mor": None, "a": {"of": "mor", "lr": 1e-3}}}, "leave out .*`lr`"),
        ({"arms": {"mor": None, "a": {"of": "mor"}, "b": {"of": "a"}}}, "arms.b.of = 'a': there is no such arm"),
        ({"arms": {"mor": None, "a": {"of": "mor", "exit": "kl"}}}, "arms.a: give both, exit and threshold"),
        ({"arms": {"vanilla": None, "a": {"of": "vanilla", "exit": "kl", "threshold": 1}}}, "a has too few recursions"),
        ({"arms": {"mor": {"label": "x"}, "act": {"label": "x"}}}, "the same label"),
        ({"arms": {"mor": {"set": {"train": {"ramp": []}}}}}, "arms.mor.set has train.ramp"),
        ({"arms": {"mor": {"set": {"train": {"stop_at_step": 3}}}}}, "arms.mor.set has train.stop_at_step"),
        ({"arms": {"mor": {"lr": [0, 1e-3]}}}, "arms.mor.lr.0 = 0"),
        ({"lr": [1.0001e-3, 1.0002e-3]}, "differ in three digits"),
        ({"budget": {"flops": [1e9, 1.01e9]}}, "differ in two digits"),
        ({"law": {"baseline": "x", "families": ["mor"]}}, "no arm's name ends with _x"),
        ({"data": {"text": ["a.txt"], "validation": 0.6}}, "data.validation = 0.6"),
        ({"arms": {"a": {"set": {"model": {"dim": 15}}}}}, "(?s)the arm a: .*dim"),
        ({"arms": {"a": {"set": {"model": {"vocab_size": 128}}}, "mor": None}}, "vocab_size is 128 in a and 96 in mor"),
        ({"budget": {"steps": 3}}, "budget.steps: unknown key; known: flops, tokens"),
        ({"budget": {"flops": -1}}, "budget.flops.0 = -1"),
        ({"budget": {"flops": 1e8}}, r"budget.flops = 1e\+08 are [0-9]+ steps of vanilla, .* give at least"),
        ({"match": "parameters"}, "match = 'parameters' doesn't fit a budget of flops"),
        ({"match": "parameters", "budget": {"tokens": 1e4}}, "recursive has 10,384 and vanilla has 20,752 unique"),
        ({"pairs": [["mor", "x"]]}, "pairs: there is no arm 'x'"),
        ({"seeds": 0}, "seeds"),
        ({"pilot": 2}, "pilot = 2"),
        ({"precision": "fp8"}, "precision = 'fp8'"),
        ({"data": {"text": ["a.txt"], "corpus": "ptb"}}, "give `text` .* or `corpus`"),
        ({"tasks": {"limit": 3}}, "tasks.names: missing"),
    ],
)  # fmt: skip
def test_what_a_study_file_must_not_say(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(study_file(tmp_path, **keys))


def test_parameters_match_within_two_percent(tmp_path: Path) -> None:
    arms = {"recursive": None, "mor": None}
    study = load_study(study_file(tmp_path, arms=arms, match="parameters", budget={"tokens": 1e4}))
    counts = [arm.parameters[1] for arm in study.arms]
    assert 0 < max(counts) / min(counts) - 1 < 0.02


def test_axes_make_all_combinations(tmp_path: Path) -> None:
    axes = {
        "width": {"w16": {}, "w32": {"set": {"model": {"dim": 32}}}},
        "kind": {"mor": {}, "loop": {"preset": "recursive"}},
    }
    study = load_study(study_file(tmp_path, arms=None, axes=axes, budget={"flops": [8e9, 4e9]}, seeds=2))

    assert [arm.name for arm in study.arms] == ["w16_mor", "w16_loop", "w32_mor", "w32_loop"]
    assert study.arm("w32_loop").config.model.dim == 32
    assert study.arm("w32_loop").config.router.kind == "fixed"
    assert study.budgets == (4e9, 8e9)
    names = [job.name for job in jobs_of(study)]
    assert len(names) == len(set(names)) == 4 + 4 * 2 * 2  # tuning, then arms x budgets x seeds
    assert "w16_mor_4e09_seed0" in names


def test_jobs_come_after_what_they_need(tmp_path: Path) -> None:
    arms = {"recursive": None, "exit": {"of": "recursive", "exit": "acceleration", "threshold": 0.3}}
    study = load_study(study_file(tmp_path, arms=arms, lr=[1e-3, 4e-3], seeds=2))
    jobs = jobs_of(study)

    names = [job.name for job in jobs]
    assert names[0] == "tune_recursive"
    for job in jobs:
        assert all(names.index(other) < names.index(job.name) for other in needs(study, job))
    assert weights_job(study, jobs[-1]) == "recursive_seed1"
    assert needs(study, jobs[-1]) == ["tune_recursive", "recursive_seed1"]
    assert sum(expected_flops(study, job) for job in jobs) == pytest.approx(4e9 * (2 * 0.25 + 2))


def test_runs_differ_in_seed_and_rate_alone(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path))
    (tmp_path / "setup.json").write_text(json.dumps({"data": None, "precision": "bf16"}), encoding="utf-8")
    first, second = (
        run_config(study, job, 2e-3, tmp_path, job.name)
        for job in jobs_of(study)
        if job.arm.name == "mor" and job.seed in (0, 1)
    )
    assert replace(first, run=second.run) == second
    assert (first.run.seed, second.run.seed) == (0, 1)
    assert (first.train.max_flops, first.train.precision, first.optim.lr) == (4e9, "bf16", 2e-3)
    assert first.optim.warmup_steps == round(0.05 * expected_steps(first))


def test_rates_and_budgets_that_are_given_twice_count_once(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, lr=[2e-3, 1e-3, 2e-3], budget={"flops": [2e9, 1e9, 2e9]}))
    assert study.arms[0].rates == (1e-3, 2e-3)
    assert study.budgets == (1e9, 2e9)


def test_an_arm_of_another_has_its_parameters(tmp_path: Path) -> None:
    """Those count for matching, not the base's."""
    arms = {"big": {"preset": "recursive", "set": {"model": {"dim": 32}}}}
    arms |= {"exit": {"of": "big", "exit": "entropy", "threshold": 1.0}}
    study = load_study(study_file(tmp_path, arms=arms, match="parameters", budget={"tokens": 1e4}))
    assert study.arms[0].parameters == study.arms[1].parameters


def test_a_rate_is_chosen_by_the_last_loss_on_the_first_set(tmp_path: Path) -> None:
    def loss_of(*records: dict[str, Any]) -> float:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return final_loss(tmp_path)

    first, last = (
        {"step": step, "validation/a/loss_causal": loss, "validation/a/loss_topk": 0.5, "validation/b/loss_causal": 9.0}
        for step, loss in ((1, 3.0), (2, 2.0))
    )
    average = {"step": 2, "validation/a/loss_causal_average": 1.0}
    assert loss_of(first, last, average) == 2.0
    assert loss_of(first, {**last, "validation/a/loss_causal": "nan"}) == np.inf
    assert loss_of({"step": 1, "train/loss": 1.0}) == np.inf


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5}, [1e-3, 2e-3, 4e-3]),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.9, 8e-3: 2.0}, [1e-3, 2e-3, 4e-3, 8e-3]),
        ({1e-3: 2, 2e-3: 3, 4e-3: 4, 5e-4: 1, 2.5e-4: 0.9, 1.25e-4: 0}, [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4, 1.25e-4]),
    ],
)  # fmt: skip
def test_a_grid_is_extended_beyond_its_edge(losses: dict[float, float], tried: list[float]) -> None:
    found: dict[float, float] = {}
    for rate in grid((1e-3, 2e-3, 4e-3), found):
        found[rate] = losses[rate]
    assert list(found) == tried


def test_paired_differences_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    common, noise = generator.normal(size=6), generator.normal(size=6) * 0.01
    a, b = dict(enumerate(common)), dict(enumerate(common + 0.02 + noise))
    a[7] = 3.0  # a seed that only one arm has

    found = paired_difference(a, b)

    reference = stats.ttest_rel([a[i] for i in range(6)], [b[i] for i in range(6)]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert (found.n, found.verdict) == (6, "a")
    assert sentence("A", "B", found).startswith("A is better than B by 0.0")
    assert paired_difference(b, a).verdict == "b"
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0}).verdict == "not resolved"
    single = paired_difference({0: 1.0}, {0: 2.0})
    assert single.verdict == "not resolved"
    assert "one seed allows no interval" in sentence("A", "B", single)
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({0: 1.0}, {1: 1.0})


def law_runs(phi: float, noise: float, seed: int) -> Points:
    """Three budgets by three widths by one and three recursions, with tokens from the budget."""
    generator = np.random.default_rng(seed)
    rows = []
    for flops in (1e15, 4e15, 1.6e16):
        for width in (256, 448, 768):
            for recursions in (1, 3):
                layer = 12 * width**2
                once, shared = 2 * layer, 4 * layer
                tokens = flops / (6 * (once + recursions * shared))
                size = once + recursions**phi * shared
                loss = 1.7 + 400 * size**-0.34 + 410 * tokens**-0.28 + generator.normal() * noise
                rows.append((once, shared, recursions, tokens, loss))
    return Points(*np.array(rows, dtype=np.float64).T)


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_the_law_finds_the_worth_of_a_recursion(phi: float) -> None:
    assert fit(law_runs(phi, 0.0, 0)).phi == pytest.approx(phi, abs=0.01)


def test_the_interval_contains_the_truth_and_not_everything() -> None:
    points = law_runs(0.46, 0.003, 1)
    low, high = interval(points, fit(points), rounds=30)
    assert low < 0.46 < high
    assert high - low < 0.5
    assert interval(points, fit(points), rounds=5) == interval(points, fit(points), rounds=5)


def test_a_fit_at_the_bound_is_called_undetermined(tmp_path: Path) -> None:
    law = {"phi": -1.0, "low": -1.0, "high": -1.0, "runs": 18, "residual": 0.05}
    results = {"runs": [], "differences": [], "arms": [], "law": {"loop": law, "mor": {**law, "phi": 0.4}}}
    found = [*statements(load_study(study_file(tmp_path)), results)]
    assert found[0].startswith("phi of loop isn't determined: the fit ends at the bound -1.00")
    assert found[1].startswith("phi of mor is 0.40 (90 % interval -1.00 to -1.00, 18 runs")


def test_parameters_inside_and_outside_the_core(tmp_path: Path) -> None:
    arms = {arm.name: arm.config for arm in load_study(study_file(tmp_path)).arms}
    block = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert split_parameters(arms["mor"]) == (2 * block + 16, 2 * block)
    assert split_parameters(arms["vanilla"]) == (8 * block + 16, 0)
    for changes in ({"separate_norms": True}, {"lora_rank": 2}, {"sharing": "cycle", "num_recursions": 4}):
        arms = {"a": {"preset": "recursive", "set": {"recursion": changes}}}
        [arm] = load_study(study_file(tmp_path, arms=arms)).arms
        assert sum(split_parameters(arm.config)) == arm.parameters[1]  # fixed loops have no router


def test_without_single_or_looped_runs_phi_can_be_anything() -> None:
    points = law_runs(0.46, 0.0, 0)
    for kind in (1, 3):
        assert interval(points[np.flatnonzero(points.recursions == kind)], fit(points)) == (-1.0, 2.0)


def test_runs_that_used_different_amounts_are_refused(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path))
    runs = [{"budget": 4e9, "executed_flops": 4e9 * f, "directory": f"run{f}"} for f in (1.0, 1.01)]
    check_matched(study, runs)
    with pytest.raises(TrainingError, match=r"run1.0 used 4e\+09 executed_flops and run1.1 4.4e\+09"):
        check_matched(study, [*runs, {"budget": 4e9, "executed_flops": 4.4e9, "directory": "run1.1"}])


def rows(study: Study, **figures: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """Runs at the study's first budget; `figures` are each metric's by arm, a value for each seed."""
    names = next(iter(figures.values()))
    found = [
        {"arm": arm, "seed": seed, "budget": study.budgets[0], **{m: of[arm][seed] for m, of in figures.items()}}
        for arm, values in names.items()
        for seed in range(len(values))
    ]
    return [{"loss": 1.0, "accuracy": None, "bits_per_byte": None, **row} for row in found]


def test_differences_are_within_a_seed_and_a_budget(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, arms=["mor", "act"], budget={"flops": [2e9, 4e9]}))
    loss = {"mor": [1.0, 2.0, 3.0], "act": [1.5, 2.51, 3.49]}
    accuracy = {"mor": [0.5, 0.6, 0.7], "act": [0.4, 0.501, 0.599]}
    first = rows(study, loss=loss, accuracy=accuracy)
    second = [{**row, "budget": 4e9, "loss": 7.0, "accuracy": 0.5} for row in first]
    found = {(d["metric"], d["budget"]): d for d in _differences(study, first + second)}
    assert found.keys() == {(metric, budget) for metric in ("loss", "accuracy") for budget in study.budgets}
    reference = stats.ttest_rel(loss["mor"], loss["act"]).confidence_interval(0.95)
    one = found["loss", 2e9]
    assert (one["low"], one["high"]) == pytest.approx((reference.low, reference.high))
    assert (one["a"], one["b"], one["mean"], one["seeds"]) == ("mor", "act", pytest.approx(-0.5), 3)
    assert (one["level"], one["verdict"]) == (0.95, "a")
    assert found["accuracy", 2e9]["verdict"] == "a"  # more is better
    same = found["loss", 4e9]
    assert (same["mean"], same["low"], same["high"], same["verdict"]) == (0, 0, 0, "not resolved")
    told = {"runs": first + second, "differences": [*found.values()], "arms": [], "law": None}
    assert [sentence.partition(" (")[0] for sentence in statements(study, told)] == [
        "At 2e+09 flops: mor is better than act by 0.5000 nats/token",
        "At 4e+09 flops: mor against act: not resolved",
    ]


def test_which_pairs_are_compared(tmp_path: Path) -> None:
    def compared(arms: list[str], **keys: Any) -> list[tuple[str, str]]:
        study = load_study(study_file(tmp_path, arms=arms, **keys))
        return [(d["a"], d["b"]) for d in _differences(study, rows(study, loss={name: [1.0] for name in arms}))]

    four = ["vanilla", "recursive", "mor", "act"]
    assert compared(four) == [*combinations(four, 2)]
    assert compared([*four, "random"]) == [(name, "vanilla") for name in ("recursive", "mor", "act", "random")]
    assert compared(four, pairs=[["act", "mor"]]) == [("act", "mor")]
    study = load_study(study_file(tmp_path, arms=["mor", "act"]))
    [single] = _differences(study, rows(study, loss={"mor": [1.0], "act": [2.0]}))
    assert (single["low"], single["high"], single["verdict"]) == (None, None, "not resolved")
    law = {"phi": 0.5, "low": 0.25, "high": 0.75, "runs": 9, "residual": 0.01}
    told = {"runs": [], "differences": [], "law": {"loop": law}}
    told["arms"] = [{"name": name, "lr": 2e-3, "lr_at_edge": name == "act"} for name in ("mor", "act")]
    assert [*statements(study, told)] == [
        "The learning rate of act, 0.002, lies at the edge of its grid: a better one may exist.",
        "phi of loop is 0.50 (90 % interval 0.25 to 0.75, 9 runs; residual 0.010 nats).",
    ]


def test_a_rate_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(study_file(tmp_path, arms=["mor"], lr=[1e-3, 2e-3, 4e-3]))
    (tmp_path / "setup.json").write_text(json.dumps({"data": None, "precision": None}), encoding="utf-8")
    found = {1e-3: 3.0, 2e-3: 2.0, 4e-3: np.inf}

    def train(config: Config, world: object) -> None:
        assert (config.run.seed, config.train.max_flops) == (1000, 1e9)  # a quarter of the budget
        if not np.isfinite(found[config.optim.lr]):
            raise TrainingError("diverged")

    monkeypatch.setattr(jobs, "fit", train)
    monkeypatch.setattr(jobs, "final_loss", lambda directory: found[float(directory.name.partition("_lr")[2])])
    [job, *_] = jobs_of(study)
    chosen = jobs.tune(study, job, tmp_path, init_world(job.arm.config.parallel))
    tried = [{"lr": 1e-3, "loss": 3.0}, {"lr": 2e-3, "loss": 2.0}, {"lr": 4e-3, "loss": None}]
    assert chosen == {"lr": 2e-3, "lr_at_edge": False, "tuning": tried}
    found |= {1e-3: 1.0, 5e-4: 0.9, 2.5e-4: 0.8, 1.25e-4: 0.7}
    chosen = jobs.tune(study, job, tmp_path, init_world(job.arm.config.parallel))
    assert (chosen["lr"], chosen["lr_at_edge"], len(chosen["tuning"])) == (1.25e-4, True, 6)


def test_a_text_is_split_by_document_or_at_a_line(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i}\n" for i in range(500)), encoding="utf-8")
    settings = prepare({"text": [str(book)], "tokenizer": "char"}, tmp_path / "a", 96)
    train, held_out = (
        json.loads((tmp_path / "a" / f"{name}.jsonl").read_text(encoding="utf-8"))["text"]
        for name in ("train", "validation")
    )
    assert train + held_out == book.read_text(encoding="utf-8")
    assert 0.02 < len(held_out) / len(train) < 0.04
    assert settings["validation"] == {"text": str(tmp_path / "a" / "validation")}
    before = (tmp_path / "a" / "train.bin").stat().st_mtime_ns
    assert prepare({"text": [str(book)], "tokenizer": "char"}, tmp_path / "a", 96) == settings
    assert (tmp_path / "a" / "train.bin").stat().st_mtime_ns == before

    pages = ["x" * 99 + "\n" + "y" * 900, "z" * 1000]  # long lines are cut, or most of the text would be held out
    parts = [[json.loads(line)["text"] for line in path.read_text().splitlines()] for path in split(pages, tmp_path)]
    assert [len(text) for text in parts[0]] == [970, 970]
    assert [a + b for a, b in zip(*parts, strict=True)] == pages
    copies = [str(i % 200) for i in range(400)]
    parts = [[json.loads(line)["text"] for line in path.read_text().splitlines()] for path in split(copies, tmp_path)]
    assert not set(parts[0]) & set(parts[1])

    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(400)), encoding="utf-8")
    prepare({"text": [str(many)], "tokenizer": "char"}, tmp_path / "b", 96)
    kept = [json.loads(line)["text"] for line in (tmp_path / "b" / "validation.jsonl").read_text().splitlines()]
    assert kept == [f"document {i}" for i in range(0, 400, 33)]


def split(texts: list[str], directory: Path) -> list[Path]:
    return _write_split(texts, {}, directory)


def test_results_of_another_version_of_a_study_are_kept(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("to be or not to be\n" * 400, encoding="utf-8")
    keys: dict[str, Any] = {"data": {"text": [str(book)], "tokenizer": "char"}, "arms": ["mor"]}
    first = load_study(study_file(tmp_path, **keys))
    set_up(first, tmp_path / "out")
    set_up(load_study(study_file(tmp_path, **{**keys, "arms": ["mor", "vanilla"], "seeds": 9})), tmp_path / "out")
    changed = load_study(study_file(tmp_path, **{**keys, "set": {"router": {"alpha": 0.2}}}))
    assert fingerprint(changed) != fingerprint(first)
    with pytest.raises(ConfigError, match=r"another version of .*mine.yaml \(arms.mor differs\)"):
        set_up(changed, tmp_path / "out")
    with pytest.raises(ConfigError, match="another version"):
        collect(changed, tmp_path / "out")
    with pytest.raises(ConfigError, match="another version"):
        run_job(changed, jobs_of(changed)[0], tmp_path / "out", init_world(changed.arms[0].config.parallel))


def run_study(directory: Path, *options: str) -> subprocess.Popen[str]:
    """`megamor study run mine.yaml` in `directory`."""
    command = [sys.executable, "-m", "megamor", "study", "run", "mine.yaml", "--threads", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        command, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_study_from_text_to_results_through_a_kill(tmp_path: Path) -> None:
    """Killed on the way, and stopped by a signal, it resumes and gives one result."""
    (tmp_path / "book.txt").write_text("".join(f"{i} to be or not to be\n" for i in range(2000)), encoding="utf-8")
    keys: dict[str, Any] = {"data": {"text": ["book.txt"], "tokenizer": "char"}, "arms": ["recursive", "mor"]}
    keys |= {"lr": [2e-3, 8e-3], "seeds": 2, "budget": {"flops": 2e9}, "tables": [0, 2]}
    study_file(tmp_path, **keys)
    out = tmp_path / "runs/studies/mine"

    first = run_study(tmp_path)
    deadline = time.monotonic() + 120
    while not list(out.glob("tune_recursive_lr*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert not (out / "results.json").exists()
    time.sleep(2)  # its worker notices that it is alone, and saves

    second = run_study(tmp_path)
    while not list(out.glob("recursive_seed0/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    text, _ = second.communicate(timeout=60)
    assert second.returncode == 75, text
    assert "rerun the same command to resume" in text
    tuned = (out / "tune_recursive/result.json").stat().st_mtime_ns

    third = run_study(tmp_path)
    text, _ = third.communicate(timeout=120)
    assert third.returncode == 0, text
    assert (out / "tune_recursive/result.json").stat().st_mtime_ns == tuned
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["schema"] == "megamor-study/1"
    assert str(tmp_path) not in (out / "results.json").read_text(encoding="utf-8")  # it may be published
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        (a, s) for s in (0, 1) for a in ("recursive", "mor")
    ]
    for run in results["runs"]:
        lines = [json.loads(line) for line in (out / run["directory"] / "metrics.jsonl").read_text().splitlines()]
        assert run["executed_flops"] == lines[-1].get("throughput/executed_flops", run["executed_flops"]) >= 2e9
        assert 0 < run["accuracy"] < 1
        assert run["seconds"] == max(line.get("throughput/training_seconds", 0.0) for line in lines)
    mine = {(run["arm"], run["seed"]): run["loss"] for run in results["runs"]}
    [difference] = [pair for pair in results["differences"] if pair["metric"] == "loss"]
    expected = np.mean([mine["recursive", seed] - mine["mor", seed] for seed in (0, 1)])
    assert difference["mean"] == pytest.approx(expected)
    assert [floor["name"] for floor in results["floors"]][-2:] == [
        "table of 2 tokens",
        "table of 2 tokens, backing off",
    ]
    assert "95 %" in results["statements"][0]
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")


def test_cool_downs_of_one_run_are_a_study(tmp_path: Path) -> None:
    """Each arm continues another checkpoint to a length of its own; tokens and FLOPs count from the run's beginning."""
    long = replace(tiny_run(tmp_path), optim=OptimConfig(lr=3e-3, warmup_steps=1, schedule="wsd"))
    long = replace(named(long, "long"), checkpoint=CheckpointConfig(every_steps=2, keep_last=9))
    assert train(long, 1) == [True]
    base = config_to_dict(long)
    base["train"] |= {"max_steps": None}
    base["run"]["seed"] = 0
    del base["init"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def written(**keys: Any) -> Path:
        arms = {
            f"from_{step}": {
                "set": {
                    "init": {"branch_from": f"{tmp_path / 'long'}@{step}"},
                    "train": {"max_steps": step + 2},
                    "optim": {"decay_steps": 2},
                }
            }
            for step in (2, 4)
        }
        file = {"base": "base.yaml", "match": "none", "seeds": 1, "arms": arms, "ngrams": [], "question": "q?", **keys}
        (tmp_path / "cool.yaml").write_text(yaml.safe_dump(file))
        return tmp_path / "cool.yaml"

    study, root = load_study(written()), tmp_path / "out"
    assert [arm.rates for arm in study.arms] == [(3e-3,), (3e-3,)]
    assert [job.name for job in jobs_of(study)] == ["from_2_seed0", "from_4_seed0"]
    tokens = 2 * 4 * 32  # two steps of four sequences each, whatever the length of the whole run
    per_token = nominal_flops(study.arms[0].config).training / 32
    assert [expected_flops(study, job) for job in jobs_of(study)] == pytest.approx([tokens * per_token] * 2)
    set_up(study, root)
    for job in jobs_of(study):
        run_job(study, job, root, init_world(long.parallel))
    results = collect(study, root)
    assert [(run["steps"], run["tokens"]) for run in results["runs"]] == [(4, 512), (6, 768)]
    assert results["differences"] == results["statements"] == []
    for step in (2, 4):
        steps = [each for each in read_jsonl(root / f"from_{step}_seed0" / "metrics.jsonl") if "train/lr" in each]
        assert [(each["step"], each["train/lr"]) for each in steps] == [(step + 1, 3e-3), (step + 2, 1.5e-3)]
        origin = TrainerState.read(root / f"from_{step}_seed0" / "checkpoints" / "latest").started_from
        assert origin["source"] == str(tmp_path / "long" / "checkpoints" / f"step_{step:08}")
    for keys, message in (
        ({"seeds": 2}, "in the order of its data, so seeds = 2 can't differ: give seeds: 1"),
        ({"lr": [1e-3, 2e-3]}, "an arm that branches or has its own length has one rate"),
        ({"budget": {"tokens": 99}}, "with match = none: give each arm its train.max_steps"),
        ({"arms": {"x": {"set": {"model": {"dim": 64}}}}}, "train.max_steps, train.max_tokens, train.max_flops: found"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_study(written(**keys))
