"""megamor bench on tiny models: its reports, the requests that it refuses, and the tables of the documentation."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.bench import tables, train
from megamor.bench.cases import CASES, POLICIES, cases_of_config
from megamor.bench.measure import Training, build_case, make_batch, peak_in_fresh_process
from megamor.bench.report import Column, Table, number, text
from megamor.cli import bench
from megamor.model.flops import nominal_flops
from megamor.parallel import World
from tests.commands import refusal, status

TINY = """
model: {vocab_size: 64, dim: 48, num_layers: 8, num_heads: 4, num_kv_heads: 2, ffn_dim: 96, max_seq_len: 48}
recursion: {num_recursions: 3, sharing: middle_cycle}
router: {kind: expert_choice, alpha: 0.2}
data: {seq_len: 48}
optim: {warmup_steps: 0}
train: {global_batch_size: 2, micro_batch_size: 2, max_steps: 2, precision: fp32}
parallel: {backend: single}
"""
CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)


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


def test_every_case_is_measured_in_every_round_and_compared_within_it(report: dict[str, Any]) -> None:
    cases = cases_of(report)
    assert list(cases) == [*CASES, "hf-llama"]
    assert report["settings"][0]["rounds"] == 3
    reference = cases["vanilla"]["round_seconds"]
    for case in cases.values():
        assert len(case["round_seconds"]) == 3
        times = case["round_seconds"]
        expected = statistics.median(mine / theirs for mine, theirs in zip(times, reference, strict=True))
        assert case["time_ratio"]["median"] == pytest.approx(expected)
        assert case["step_seconds"]["median"] == pytest.approx(statistics.median(times))
        assert case["time_over_flops"] == pytest.approx(expected / case["flops_ratio"])


def test_batch_sizes_and_sequence_lengths_are_all_measured(config_file: Path) -> None:
    out = config_file.parent / "grid.json"
    arguments = ["train", "--config", str(config_file), "--json", str(out), "--rounds", "1", "--threads", "1"]
    bench.main([*arguments, "--no-memory", "--cases", "vanilla", "--micro-batch", "1,3", "--seq-len", "16,32"])
    settings = json.loads(out.read_text())["settings"]
    assert [(setting["seq_len"], setting["batch_size"]) for setting in settings] == [(16, 1), (16, 3), (32, 1), (32, 3)]
    for setting in settings:
        (case,) = setting["cases"]
        tokens = setting["seq_len"] * setting["batch_size"]
        assert case["tokens_per_second"] == pytest.approx(tokens / case["step_seconds"]["median"], rel=0.01)


def test_flops_are_those_of_the_realised_routing(report: dict[str, Any], config_file: Path) -> None:
    cases = cases_of(report)
    assert {cases[name]["flops_ratio"] for name in ("vanilla", "recursive", "hf-llama")} == {1.0}
    # Two of eight layers get all tokens and six get 2/3 of them on average, so 0.75. Attention, which shrinks
    # quadratically, lowers it; the head raises it.
    assert 0.70 < cases["mor_expert"]["flops_ratio"] < 0.77
    assert cases["mor_expert"]["mean_depth"] == pytest.approx(2.0)
    assert cases["mor_token"]["mean_depth"] != 2.0
    balanced = nominal_flops(cases_of_config(config_file, [], ["vanilla", "mor_token"])[1].config(), 2).training
    token = cases["mor_token"]
    assert (token["training_flops"] > balanced) == (token["mean_depth"] > 2.0)
    assert token["training_flops"] != balanced

    assert cases["hf-llama"]["parameters"] == cases["vanilla"]["parameters"] > 1.9 * cases["recursive"]["parameters"]


def test_peak_memory_is_that_of_gradients_moments_and_activations(config_file: Path) -> None:
    overrides = ["model.dim=192", "model.ffn_dim=512", "data.seq_len=256", "model.max_seq_len=256"]
    cases = cases_of_config(config_file, overrides, ["vanilla", "mor_expert"])
    vanilla, mor = (peak_in_fresh_process(case, CPU, 1, 2) for case in cases)
    if vanilla is None or mor is None:
        pytest.skip("this system can't reset a process's peak memory")
    state = 3 * 4 * Training.of(cases[0], WORLD).num_parameters
    # Backward needs at least the inputs of the seven matrix products of each token and layer.
    activations = 4 * 2 * 256 * 8 * (3 * 192 + 3 * 512)
    assert state + activations < vanilla < 3 * (state + activations)
    assert mor < vanilla


def test_the_origin_is_recorded(report: dict[str, Any], config_file: Path) -> None:
    assert report["schema"] == train.SCHEMA
    assert report["command"].startswith(f"megamor bench train --config {config_file}")
    assert report["machine"]["threads"] == 1
    assert report["versions"]["torch"]
    config = report["settings"][0]["config"]
    assert (config["router"]["kind"], config["data"]["prefetch_steps"]) == ("fixed", 1)


def test_the_baseline_computes_the_same_model(config_file: Path) -> None:
    cases = {case.name: case for case in cases_of_config(config_file, [], ["vanilla"], ["hf-llama"])}
    ours, theirs = (build_case(cases[name], cases[name].config(), CPU) for name in ("vanilla", "hf-llama"))
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
    batch = make_batch(cases["vanilla"].config(), 0, CPU)
    torch.testing.assert_close(ours(*batch).loss_sum, theirs(*batch).loss_sum, rtol=1e-5, atol=1e-4)


def test_a_step_trains_but_leaves_the_weights(config_file: Path) -> None:
    (case,) = cases_of_config(config_file, [], ["vanilla"])
    training = Training.of(case, WORLD)
    before = copy.deepcopy(training.backend.module.state_dict())
    training.step()
    torch.testing.assert_close(training.backend.module.state_dict(), before, rtol=0, atol=0)
    moments = [state["exp_avg"].abs().sum() for state in training.backend.optimizer.state.values()]
    assert len(moments) == len(before)
    assert all(moment > 0 for moment in moments)


def test_the_order_rotates_on_equal_batches(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = [Training.of(case, WORLD) for case in cases_of_config(config_file, [], ["vanilla", "recursive"])]
    seen, step = [], Training.step

    def noted(training: Training) -> Any:
        seen.append((trainings.index(training), training.number))
        return step(training)

    monkeypatch.setattr(Training, "step", noted)
    train.take_turns(trainings, 3, 0)
    assert seen == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)]
    for ours, theirs in zip(*(training.batches for training in trainings), strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert len(train.take_turns(trainings, None, 0.0)[0]) == 1, "however little time there is"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "vanilla,mor_exprt"], "unknown case 'mor_exprt'"),
        (["--cases", "mor_expert"], "add it"),
        (["recursion.num_recursions=1", "recursion.sharing=none", "router.kind=fixed"], "nothing to compare"),
        (["router.capacty=3"], "capacity"),
        (["--policies", "none,sometimes"], "sometimes"),
        (["--policies", "selective:sin"], "sin"),
        (["--threads", "1", "vanilla"], "unrecognized arguments: vanilla"),
    ],
)
def test_bad_requests_are_refused(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, bench.main, "train", "--config", config_file, *arguments)


def test_checkpointing_of_every_policy(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies trade memory for FLOPs. Peaks are replaced by a constant: a test above measures them."""
    out = tmp_path / "checkpointing_tiny.json"
    monkeypatch.setattr(train, "peak_in_fresh_process", lambda *_: 10**6)
    policies = ["--policies", ",".join(POLICIES)]
    bench.main(["train", "--config", str(config_file), *policies, "--rounds", "2", "--json", str(out)])
    report = json.loads(out.read_text())
    found = {case["policy"]: case for case in report["settings"][0]["cases"]}
    assert list(found) == list(POLICIES)
    assert all(len(policy["round_seconds"]) == 2 for policy in found.values())
    assert len({policy["training_flops"] for policy in found.values()}) == 1, "equal tokens"
    more = {name: policy["recomputed_flops_ratio"] for name, policy in found.items()}
    assert 0 == more["none"] == more["selective:sdpa+mm"] < more["selective:sdpa"] < more["block"] < more["recursion"]
    memory = {name: policy["estimated_memory_bytes"] for name, policy in found.items()}
    assert memory["block"] < memory["selective:sdpa"] < memory["selective:sdpa+mm"] < memory["none"]
    shown = tables.regenerate("<!-- generated: bench-policies -->\n<!-- /generated -->\n", tmp_path)
    assert f"| {more['block']:.1%} | 1 | {memory['block'] / 1e6:.0f} |" in shown


def test_loader_bench(tmp_path: Path) -> None:
    out = tmp_path / "loader_tiny.json"
    words = ["loader", "--seconds", "0.01", "--tokens", "6e5", "--documents", "3000", "--json", str(out)]
    bench.main([*words, "--directory", str(tmp_path)])
    report = json.loads(out.read_text())
    assert len(report["cases"]) == 12
    for case in report["cases"]:
        expected = case["batch_size"] * case["seq_len"] / case["step_seconds"]["median"]
        assert case["tokens_per_second"] == pytest.approx(expected)
    assert report["documents"]["documents"] == 3000
    assert 0 <= report["documents"]["best_fit_padding"] < 0.05
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert "3,000 documents" in tables.regenerate("<!-- generated: bench-loader -->\n<!-- /generated -->\n", tmp_path)


def test_a_table_is_the_same_in_the_terminal_and_in_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    milliseconds, peak = Column("ms", number("times.median", ".1f", 1e3)), Column("peak", number("peak", ".0f"))
    rows = [{"name": "a [b]", "times": {"median": 0.0123}, "peak": None}, {"name": "c"}]
    table = Table((Column("case", text("name"), left=True), milliseconds, peak), rows, "Title.", ("Note.",))
    table.show()
    for shown in (capsys.readouterr().out, "\n".join(table.markdown())):
        assert all(word in shown for word in ("Title.", "case", "ms", "a [b]", "12.3", "Note."))
        assert "peak" not in shown, "no row has a value"


PAGE = """# Title

Before.

<!-- generated: bench-train -->
stale contents
<!-- /generated -->

After.
"""


@pytest.fixture
def page(tmp_path: Path, report: dict[str, Any]) -> list[str]:
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "train_tiny.json").write_text(json.dumps(report))
    return [str(tmp_path / "page.md"), "--results", str(tmp_path / "results")]


def test_a_page_is_generated_from_the_results(page: list[str], tmp_path: Path, report: dict[str, Any]) -> None:
    assert status(tables.main, "--check", *page) == 1
    assert (tmp_path / "page.md").read_text() == PAGE
    assert status(tables.main, "--write", *page) == 0
    assert status(tables.main, "--check", *page) == 0
    written = (tmp_path / "page.md").read_text()
    assert written.startswith("# Title\n\nBefore.\n")
    assert written.endswith("<!-- /generated -->\n\nAfter.\n")
    assert "stale contents" not in written
    assert all(case["label"] in written for case in cases_of(report).values())
    assert f"{cases_of(report)['mor_expert']['time_ratio']['median']:.3f}" in written

    report = copy.deepcopy(report)
    report["settings"][0]["cases"][1]["flops_ratio"] = 0.123
    (tmp_path / "results" / "train_tiny.json").write_text(json.dumps(report))
    assert status(tables.main, "--check", *page) == 1


def test_broken_blocks_and_missing_or_foreign_results_are_refused(page: list[str], tmp_path: Path) -> None:
    begin = "<!-- generated: bench-train -->"
    changes = [("<!-- /generated -->", ""), (begin, ""), ("bench-train", "bench-nothing"), ("stale contents", begin)]
    for broken in (PAGE.replace(*change) for change in changes):
        (tmp_path / "page.md").write_text(broken)
        assert status(tables.main, "--write", *page) == 2
        assert (tmp_path / "page.md").read_text() == broken
    (tmp_path / "page.md").write_text(PAGE)
    result = tmp_path / "results" / "train_tiny.json"
    result.write_text('{"schema": "something else"}')
    assert status(tables.main, "--check", *page) == 2
    result.unlink()
    assert status(tables.main, "--check", *page) == 2


def test_the_documentations_tables_are_current() -> None:
    """Every table of the documentation, from new and old reports."""
    assert status(tables.main, "--check") == 0
