"""The training bench on a tiny model, and the README's tables from its report."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.bench import checkpointing as bench_checkpointing
from megamor.bench import tables as readme_numbers
from megamor.bench.cases import CASES, TrainingStep, make_batch, make_cases
from megamor.bench.memory import step_memory
from megamor.bench.train import Budget, measure_rounds
from megamor.cli import bench
from megamor.model.flops import nominal_flops

TINY = """
model: {vocab_size: 64, dim: 48, num_layers: 8, num_heads: 4, num_kv_heads: 2, ffn_dim: 96, max_seq_len: 48}
recursion: {num_recursions: 3, sharing: middle_cycle}
router: {kind: expert_choice, alpha: 0.2}
data: {seq_len: 48}
optim: {warmup_steps: 0}
train: {global_batch_size: 2, micro_batch_size: 2, max_steps: 2, precision: fp32}
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def report(config_file: Path) -> dict[str, Any]:
    out = config_file.parent / "out.json"
    arguments = ["train", "--config", str(config_file), "--json", str(out), "--rounds", "3", "--threads", "1"]
    bench.main([*arguments, "--no-memory", "--baseline", "hf-llama", "data.prefetch_steps=1"])
    return json.loads(out.read_text())


def cases_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (setting,) = report["settings"]
    return {case["name"]: case for case in setting["cases"]}


def test_every_case_is_measured_in_every_round(report: dict[str, Any]) -> None:
    assert list(cases_of(report)) == [*CASES, "hf-llama"]
    assert report["settings"][0]["rounds"] == 3
    assert all(len(case["round_seconds"]) == 3 for case in cases_of(report).values())


def test_ratios_follow_from_the_times(report: dict[str, Any]) -> None:
    cases = cases_of(report)
    reference = cases["vanilla"]["round_seconds"]
    for case in cases.values():
        times = case["round_seconds"]
        expected = statistics.median(mine / theirs for mine, theirs in zip(times, reference, strict=True))
        assert case["time_ratio"]["median"] == pytest.approx(expected)
        assert case["step_seconds"]["median"] == pytest.approx(statistics.median(times))
        assert case["time_over_flops"] == pytest.approx(expected / case["flops_ratio"])
        assert case["step_seconds"]["q1"] <= case["step_seconds"]["median"] <= case["step_seconds"]["q3"]


def test_flops_are_those_of_the_realised_routing(report: dict[str, Any], config_file: Path) -> None:
    cases = cases_of(report)
    assert {cases[name]["flops_ratio"] for name in ("vanilla", "recursive", "hf-llama")} == {1.0}
    # Two of eight layers see all tokens, six see 2/3 of them on average: 0.75, which attention lowers (it shrinks
    # with the square) and the head raises.
    assert 0.70 < cases["mor_expert"]["flops_ratio"] < 0.77
    assert cases["mor_expert"]["mean_depth"] == pytest.approx(2.0)
    assert cases["mor_token"]["mean_depth"] != 2.0
    balanced = nominal_flops(make_cases(config_file, [], ["vanilla", "mor_token"])[1].config, 2).training
    token = cases["mor_token"]
    assert (token["training_flops"] > balanced) == (token["mean_depth"] > 2.0)
    assert token["training_flops"] != balanced


def test_recursive_cases_have_fewer_weights(report: dict[str, Any]) -> None:
    cases = cases_of(report)
    assert cases["hf-llama"]["parameters"] == cases["vanilla"]["parameters"] > 1.9 * cases["recursive"]["parameters"]


def test_peak_memory_is_that_of_gradients_moments_and_activations(config_file: Path) -> None:
    overrides = ["model.dim=192", "model.ffn_dim=512", "data.seq_len=256", "model.max_seq_len=256"]
    cases = make_cases(config_file, overrides, ["vanilla", "mor_expert"])
    vanilla, mor = (step_memory(case, CPU, threads=1) for case in cases)
    if vanilla is None or mor is None:
        pytest.skip("this system can't reset a process's peak memory")
    state = 3 * 4 * TrainingStep(cases[0], CPU).num_parameters()
    # Per token and layer, backward needs at least the inputs of the seven matrix products.
    activations = 4 * 2 * 256 * 8 * (3 * 192 + 3 * 512)
    assert state + activations < vanilla < 3 * (state + activations)
    assert mor < vanilla


def test_the_origin_is_recorded(report: dict[str, Any], config_file: Path) -> None:
    assert report["schema"] == readme_numbers.TRAIN_SCHEMA == bench.SCHEMA
    assert f"--config {config_file}" in report["command"]
    assert report["machine"]["threads"] == 1
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or report["versions"]["torch"]
    assert report["config"]["router"]["alpha"] == 0.2
    assert report["config"]["data"]["prefetch_steps"] == 1


def test_the_baseline_computes_the_same_model(config_file: Path) -> None:
    cases = {case.name: case for case in make_cases(config_file, [], ["vanilla"], ["hf-llama"])}
    ours, theirs = cases["vanilla"].build(CPU), cases["hf-llama"].build(CPU)
    renamed = {
        "model.embed_tokens.": "embed.", "model.layers.": "prelude.", "self_attn.": "attention.", "mlp.": "ffn.",
        "post_attention_layernorm.": "ffn_norm.", "input_layernorm.": "attention_norm.", "model.norm.": "norm.",
    }  # fmt: skip
    state = {}
    for name, value in theirs.model.state_dict().items():
        for theirs_name, ours_name in renamed.items():
            name = name.replace(theirs_name, ours_name)
        state[name] = value
    state.pop("lm_head.weight")
    ours.load_state_dict(state)
    batch = make_batch(cases["vanilla"].config, 0, CPU)
    torch.testing.assert_close(ours(*batch).loss_sum, theirs(*batch).loss_sum, rtol=1e-5, atol=1e-4)


def test_a_step_trains_but_leaves_the_weights(config_file: Path) -> None:
    (case,) = make_cases(config_file, [], ["vanilla"])
    step = TrainingStep(case, CPU)
    before = copy.deepcopy(step.model.state_dict())
    step.run(*make_batch(case.config, 0, CPU))
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)
    moments = [state["exp_avg"].abs().sum() for state in step.optimizer.state.values()]
    assert len(moments) == len(before)
    assert all(moment > 0 for moment in moments)


def test_the_order_rotates(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_cases(config_file, [], ["vanilla", "recursive", "mor_expert"])
    seen = []
    run = TrainingStep.run
    monkeypatch.setattr(TrainingStep, "run", lambda step, *batch: (seen.append(step.case.name), run(step, *batch))[1])
    measure_rounds(cases, CPU, Budget(seconds=0, rounds=3), lambda _: None)
    rounds = [seen[start : start + 3] for start in range(6, 15, 3)]
    assert [order[0] for order in rounds] == ["vanilla", "recursive", "mor_expert"]
    assert all(set(order) == {"vanilla", "recursive", "mor_expert"} for order in rounds)


def test_the_budget_of_seconds_gives_at_least_one_round(config_file: Path) -> None:
    cases = make_cases(config_file, [], ["vanilla"])
    assert len(measure_rounds(cases, CPU, Budget(seconds=0), lambda _: None)["vanilla"].seconds) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "vanilla,mor_exprt"], "unknown case 'mor_exprt'"),
        (["--cases", "mor_expert"], "add it"),
        (["recursion.num_recursions=1", "recursion.sharing=none", "router.kind=fixed"], "nothing to compare"),
        (["router.capacty=3"], "capacity"),
    ],
)
def test_bad_requests_are_refused(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        bench.main(["train", "--config", str(config_file), *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


README = """# Title

Before.

<!-- generated: bench-train -->
stale contents
<!-- /generated -->

After.
"""


@pytest.fixture
def readme(tmp_path: Path, report: dict[str, Any]) -> list[str]:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "train_tiny.json").write_text(json.dumps(report))
    return ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")]


def status_of(arguments: list[str]) -> int:
    try:
        readme_numbers.main(arguments)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_readme_follows_the_results(readme: list[str], tmp_path: Path, report: dict[str, Any]) -> None:
    assert status_of(["--check", *readme]) == 1
    assert (tmp_path / "README.md").read_text() == README
    assert status_of(["--write", *readme]) == 0
    assert status_of(["--check", *readme]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n\nBefore.\n")
    assert text.endswith("<!-- /generated -->\n\nAfter.\n")
    assert "stale contents" not in text
    assert all(case["label"] in text for case in cases_of(report).values())
    assert f"{cases_of(report)['mor_expert']['time_ratio']['median']:.3f}" in text

    report = copy.deepcopy(report)
    report["settings"][0]["cases"][1]["flops_ratio"] = 0.123
    (tmp_path / "results" / "train_tiny.json").write_text(json.dumps(report))
    assert status_of(["--check", *readme]) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- /generated -->", ""),
        ("<!-- generated: bench-train -->", ""),
        ("bench-train", "bench-nothing"),
        ("stale contents", "<!-- generated: bench-train -->"),
    ],
)
def test_broken_blocks_are_refused(readme: list[str], tmp_path: Path, old: str, new: str) -> None:
    broken = README.replace(old, new)
    (tmp_path / "README.md").write_text(broken)
    assert status_of(["--write", *readme]) == 2
    assert (tmp_path / "README.md").read_text() == broken


def test_missing_or_foreign_results_are_refused(readme: list[str], tmp_path: Path) -> None:
    result = tmp_path / "results" / "train_tiny.json"
    result.write_text('{"schema": "something else"}')
    assert status_of(["--check", *readme]) == 2
    result.unlink()
    assert status_of(["--check", *readme]) == 2


def test_the_projects_own_readme_follows_its_results() -> None:
    assert status_of(["--check"]) == 0


def test_loader_bench(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["loader", "--seconds", "0.01", "--tokens", "6e5", "--documents", "3000", "--json", str(out)]
    bench.main([*words, "--directory", str(tmp_path)])
    report = json.loads(out.read_text())
    assert report["command"].endswith(" ".join([*words[1:], "--directory", str(tmp_path)]))
    assert len(report["cases"]) == 12
    for case in report["cases"]:
        expected = case["batch_size"] * case["seq_len"] / case["step_seconds"]["median"]
        assert case["tokens_per_second"] == pytest.approx(expected)
    assert report["documents"]["documents"] == 3000
    assert 0 <= report["documents"]["best_fit_padding"] < 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_checkpointing_of_every_policy(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies trade memory for FLOPs; that peaks are measured in processes of their own is tested above."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(bench_checkpointing, "step_memory", lambda *_: None)
    bench.main(["checkpointing", "--config", str(config_file), "--rounds", "2", "--threads", "1", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["schema"] == bench_checkpointing.SCHEMA
    found = {policy["policy"]: policy for policy in report["policies"]}
    assert list(found) == list(bench_checkpointing.POLICIES)
    assert all(len(policy["round_seconds"]) == 2 for policy in found.values())
    assert len({policy["training_flops"] for policy in found.values()}) == 1
    more = {name: policy["recomputed_flops_ratio"] for name, policy in found.items()}
    assert 0 == more["none"] == more["selective:sdpa+mm"] < more["selective:sdpa"] < more["block"] < more["recursion"]
    memory = {name: policy["estimated_memory_bytes"] for name, policy in found.items()}
    assert memory["block"] < memory["selective:sdpa"] < memory["selective:sdpa+mm"] < memory["none"]


def test_a_policy_that_is_none_is_refused(config_file: Path) -> None:
    with pytest.raises(SystemExit):
        bench.main(["checkpointing", "--config", str(config_file), "--policies", "none,sometimes"])
