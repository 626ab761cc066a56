"""Runs and studies as the report reads them, and the table of `megamor compare`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy.stats import ttest_rel

from megamor.cli import compare, report
from megamor.errors import ConfigError
from megamor.report import content
from megamor.report.runs import FLOPS, SECONDS, read_results, read_run
from megamor.study.statistics import paired_difference
from tests.commands import refusal, status
from tests.report.fixture import (
    ARM_LOSS,
    FLOPS_PER_STEP,
    SEED_LOSS,
    SEEDS,
    STEPS,
    TOKENS_PER_STEP,
    config_of,
    lines_of,
    loss_at,
    write_run,
    write_runs,
    write_study,
)
from tests.resume.runs import directory_of, fit, named, tiny_run, until


def test_a_run_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "mor_seed1", config_of("mor", 1), lines_of("mor", 1)))
    final = loss_at(STEPS, "mor", 1)
    assert run.figure("loss") == pytest.approx(final), "the mean over the sets"
    assert run.figure("loss_topk") == pytest.approx(final - 0.01)
    assert run.figure("loss/a") == pytest.approx(final - 0.1)
    assert run.figure("loss_last3") == pytest.approx(fmean(loss_at(step, "mor", 1) for step in (80, 100, 120)))
    assert run.figure("perplexity") == pytest.approx(math.exp(final))
    expected = {"tokens": STEPS * TOKENS_PER_STEP, "executed_flops": STEPS * FLOPS_PER_STEP, "seconds": STEPS * 0.4}
    expected |= {
        "flops_per_token": 2.4e6,
        "mean_depth": 2.1,
        "peak_memory_bytes": 2**29,
        "tokens_per_second": TOKENS_PER_STEP / 0.4,
    }
    assert {name: run.figure(name) for name in expected} == pytest.approx(expected)
    places, losses = run.curve("loss", "executed_flops")
    assert places == [step * FLOPS_PER_STEP for step in range(20, 121, 20)], "validation takes the step's place"
    assert losses == pytest.approx([loss_at(step, "mor", 1) for step in range(20, 121, 20)])


def test_a_run_in_progress_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", config_of("mor", 0), lines_of("mor", 0, 5), checkpoint=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    read = read_run(run)
    assert read.figure("tokens") == 5 * TOKENS_PER_STEP
    assert read.figure("loss") is None
    assert read.figure("parameters") is None
    results = read_results([run])
    assert results.metrics()[0] == "train_loss"
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="nothing is logged yet"):
        read_results([run]).metrics()


def test_the_time_of_old_runs_is_put_together_from_their_steps(tmp_path: Path) -> None:
    lines = [line for line in lines_of("mor", 0, 40) if line["step"] % 10 == 0]
    for line in lines:
        line.pop(SECONDS, None)
    run = read_run(write_run(tmp_path / "x", config_of("mor", 0), lines))
    assert run.figure("seconds") == pytest.approx(40 * 0.4)


def test_runs_are_grouped_by_name_or_by_equal_settings(tmp_path: Path) -> None:
    def arms(*paths: Path) -> dict[str, list[int]]:
        return {arm: [run.row["seed"] for run in runs] for arm, runs in read_results(paths).groups().items()}

    write_runs(tmp_path / "a")
    assert arms(tmp_path / "a") == {arm: [0, 1, 2] for arm in sorted(ARM_LOSS)}
    for name, arm, seed in (("one", "mor", 3), ("two", "mor", 4), ("other", "random", 3)):
        write_run(tmp_path / "b" / name, config_of(arm, seed), lines_of(arm, 0))
    assert arms(tmp_path / "b") == {"one": [3, 4], "other": [3]}, "equal but for the seed"
    write_run(tmp_path / "c" / "mor_seed0", config_of("mor", 0), lines_of("mor", 0))
    assert arms(tmp_path / "a" / "mor_seed0", tmp_path / "c") == {"a/mor": [0], "c/mor": [0]}
    # Two names, one seed: no pair of samples.
    write_run(tmp_path / "c" / "mor_seed1", config_of("mor", 0), lines_of("mor", 0))
    assert sorted(arms(tmp_path / "c").values()) == [[0], [0]]


def test_what_differs_between_the_seeds_of_an_arm_is_told(tmp_path: Path) -> None:
    write_runs(tmp_path)
    config = config_of("mor", 7)
    write_run(tmp_path / "mor_seed7", replace(config, optim=replace(config.optim, lr=0.1)), lines_of("mor", 0))
    assert "The runs of mor differ in optim.lr, not only in their seed." in content.statements(read_results([tmp_path]))


def test_differences_are_those_of_the_paired_t_test(tmp_path: Path) -> None:
    write_runs(tmp_path)
    results = read_results([tmp_path])
    final = {arm: [loss_at(STEPS, arm, seed) for seed in SEEDS] for arm in ARM_LOSS}
    found = {(a, b): d for a, b, d in content.differences(results, "loss")}
    assert found.keys() == {("mor", "random"), ("mor", "vanilla"), ("random", "vanilla")}
    for (a, b), difference in found.items():
        interval = ttest_rel(final[a], final[b]).confidence_interval(0.95)
        assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    lines = content.statements(results)
    assert lines[0].startswith("Matched by tokens and executed FLOPs. Not matched by unique parameters: mor_seed0 has ")
    assert any(line.startswith("mor is better than vanilla by 0.0540 nats/token") for line in lines)
    assert any(line.startswith("mor against random: not resolved") for line in lines)


def test_more_is_better_where_it_is(tmp_path: Path) -> None:
    results = read_results([write_study(tmp_path / "s")])
    assert next(iter(content.means(results, "accuracy"))) == "expert-choice"
    lines = content.statements(results, "tasks/lambada")
    assert any(line.startswith("expert-choice is better than vanilla by 0.0011 tasks/lambada") for line in lines)
    with pytest.raises(ConfigError, match=r"no run has the metric 'speed'; they have loss, .*tasks/lambada"):
        results.values("speed")


def test_a_study_is_read_with_its_runs(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s")
    results = read_results([study])
    assert results.metrics()[0] == "loss"
    assert list(results.groups()) == ["vanilla", "expert-choice", "random (open gates)"]
    assert len(results.runs) == 9, "those that tried a learning rate don't count"
    assert all(len(run.records) > STEPS for run in results.runs)
    moved = tmp_path / "elsewhere"
    study.rename(moved)
    assert all(run.records for run in read_results([moved / "results.json"]).runs)
    alone = tmp_path / "alone" / "results.json"
    alone.parent.mkdir()
    alone.write_bytes((moved / "results.json").read_bytes())
    results = read_results([alone])
    assert not any(run.records for run in results.runs)
    assert content.loss_figures(results) == []
    assert content.leaderboard(results, "loss")[1][0][:2] == ["expert-choice", "1"]


def test_leaderboard_says_what_is_not_resolved(tmp_path: Path) -> None:
    headers, rows = content.leaderboard(read_results([write_study(tmp_path / "s")]), "loss")
    assert headers[2] == "validation loss (nats/token)"
    assert [row[:2] for row in rows] == [["expert-choice", "1"], ["random (open gates)", "2"], ["vanilla", "3"]]
    assert [row[5].endswith("not resolved") for row in rows] == [False, True, False]
    final = [loss_at(STEPS, "mor", seed) for seed in SEEDS]
    assert rows[0][2] == f"{fmean(final):.4f}"
    headers, rows = content.matched_table(read_results([tmp_path / "s"]))
    row = next(row for row in rows if row[0] == "validation loss (nats/token)")
    assert row[headers.index("expert-choice")] == f"{fmean(final):.4f} ± {stdev(final):.4f}"


def test_budgets_are_kept_apart(tmp_path: Path) -> None:
    study = json.loads((write_study(tmp_path / "s") / "results.json").read_text())
    more = [{**run, "budget": 6e12, "executed_flops": 6e12, "tokens": 2 * run["tokens"]} for run in study["runs"]]
    (tmp_path / "s" / "results.json").write_text(json.dumps({**study, "runs": study["runs"] + more, "differences": []}))
    results = read_results([tmp_path / "s"])
    assert list(results.groups())[:1] == ["vanilla at 3e+12"]
    assert len(results.groups()) == 6
    assert results.unmatched("executed_flops") is None, "within each budget"
    assert all(a[-5:] == b[-5:] for a, b, _ in content.differences(results, "loss"))
    _, rows = content.leaderboard(results, "loss")
    assert [row[1] for row in rows] == ["1", "2", "3"] * 2
    assert [row[5] == "" for row in rows] == [True, False, False] * 2


def test_compare_prints_a_table_of_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write_runs(tmp_path)
    assert status(compare.main, tmp_path, "--match", "executed_flops") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    final = [loss_at(STEPS, "mor", seed) for seed in SEEDS]
    row = next(line.split() for line in shown.splitlines() if line.startswith("mor "))
    assert row[:5] == ["mor", "3", f"{fmean(final):.4f}", f"{stdev(final):.4f}", "2.10"]
    assert "mor against random: not resolved" in " ".join(shown.split())


def test_unmatched_runs_are_refused_with_the_two_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_runs(tmp_path)
    told = refusal(capsys, compare.main, tmp_path, "--match", "parameters")
    assert "unique parameters: mor_seed0 has 1.263e+06, vanilla_seed2 2.001e+06 (1.58 times)" in told
    write_run(tmp_path / "short_seed0", config_of("vanilla", 0), lines_of("vanilla", 0, 60))
    told = refusal(capsys, compare.main, tmp_path, "--match", "tokens")
    assert f"short_seed0 has {60 * TOKENS_PER_STEP:.4g}" in told
    assert status(compare.main, tmp_path) == 0
    shown = capsys.readouterr().out
    assert "The runs are not matched, so their differences say nothing" in " ".join(shown.split())
    assert "better" not in shown
    assert not any(row[5] for row in content.leaderboard(read_results([tmp_path]), "loss")[1])
    # Runs of one size are no comparison if one of them is half-trained.
    assert content.matching(read_results([tmp_path / "vanilla_seed0", tmp_path / "short_seed0"]))[0] == []


def test_single_runs_allow_no_interval(tmp_path: Path) -> None:
    write_runs(tmp_path)
    results = read_results([tmp_path / "mor_seed0", tmp_path / "vanilla_seed0"])
    lines = content.statements(results)
    assert lines[1].startswith("One seed allows no interval, so no difference is resolved (validation loss: mor 3.1")
    assert not [line for line in lines if "better" in line]
    assert "one seed" in content.leaderboard(results, "loss")[1][1][5]


def test_different_seeds_are_not_paired(tmp_path: Path) -> None:
    write_run(tmp_path / "mor_seed0", config_of("mor", 0), lines_of("mor", 0))
    write_run(tmp_path / "vanilla_seed1", config_of("vanilla", 1), lines_of("vanilla", 1))
    results = read_results([tmp_path])
    assert content.differences(results, "loss") == []
    assert not [line for line in content.statements(results) if "better" in line]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "has no metrics.jsonl"),
        ({"results.json": "{"}, "can't be read"),
        ({"results.json": '{"schema": "x"}'}, "schema = 'x', expected megamor-study/1"),
    ],
)
def test_what_is_no_run_is_refused(
    files: dict[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for command in (compare.main, report.main):
        assert told in refusal(capsys, command, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_alarms(tmp_path: Path) -> None:
    lines = lines_of("mor", 0, 20)
    lines[3]["train/loss"] = "nan"
    lines[-2] |= {"guard/skipped_steps": 2, "routing/dead_depths": 1 / 3}
    lines[-1] |= {"validation/b/loss_causal": "inf"}
    fixed = lines_of("vanilla", 0, 20)
    fixed[-1] |= {"routing/dead_depths": 2 / 3}  # which a fixed depth is meant to have
    write_run(tmp_path / "y", config_of("vanilla", 0), fixed)
    results = read_results([write_run(tmp_path / "x", config_of("mor", 0), lines), tmp_path / "y"])
    assert results.values("loss").keys() == {"y"}
    assert content.statements(results)[1:] == [
        "x: 1 validation loss that isn't finite (left out of the means).",
        "x: 1 steps with a loss that isn't finite.",
        "x: 2 steps skipped.",
        "x: 33% of the depths are taken by no token.",
    ]


def test_figures_are_cumulative_over_restarts(tmp_path: Path) -> None:
    """The report's FLOPs, tokens and time of a run that was stopped and resumed are those of a straight one."""
    straight, resumed = named(tiny_run(tmp_path), "straight"), named(tiny_run(tmp_path), "resumed")
    fit(straight, world_size=1)
    for stop in (3, None):
        fit(until(resumed, stop), world_size=1)
    one, two = (read_run(directory_of(config)) for config in (straight, resumed))
    for name in ("executed_flops", "tokens"):
        assert one.figure(name) == two.figure(name)
    for run in (one, two):
        for metric in (FLOPS, SECONDS):
            values = [record[metric] for record in run.records if metric in record]
            assert values == sorted(values)
            assert len(set(values)) == 8


def test_seeds_cancel_in_the_differences() -> None:
    """The fixture is what it says: seeds differ more than arms."""
    assert stdev(SEED_LOSS.values()) > 0.09
    difference = paired_difference(dict(enumerate(ARM_LOSS["mor"])), dict(enumerate(ARM_LOSS["vanilla"])))
    assert difference.verdict == "a"
