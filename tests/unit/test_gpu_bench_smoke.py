"""The benches of published sizes, run on a CPU with a tiny model: the fields of their reports, not the timings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.bench import train
from megamor.bench.cases import PUBLISHED, SIZES, cases_of_size
from megamor.bench.measure import within_memory
from megamor.cli import bench
from tests.commands import refusal

TINY = [
    *("model.vocab_size=64", "model.dim=32", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=64"),
    *("model.num_layers=8", "model.max_seq_len=32", "data.seq_len=32", "train.precision=fp32"),
]
ARGUMENTS = [
    *("train", "--sizes", "135m", "--device", "cpu", "--micro-batch", "2", "--seconds", "0.1"),
    *("--backend", "single", "--no-compile"),
]


def measured(path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Results of a run with `arguments`."""
    bench.main([*ARGUMENTS, *arguments, "--json", str(path), *TINY])
    return [result for setting in json.loads(path.read_text())["settings"] for result in setting["cases"]]


def test_speed_beside_vanilla_on_both_sides(tmp_path: Path) -> None:
    results = measured(tmp_path / "out.json", "--cases", "vanilla,mor3_expert,mor3_token")
    assert [result["name"] for result in results] == ["vanilla", "mor3_expert", "mor3_token", "vanilla"]
    first, expert, token, last = results
    windows = [(a + b) / 2 for a, b in zip(first["round_seconds"], last["round_seconds"], strict=True)]
    for result in (expert, token):
        ratios = sorted(mine / other for mine, other in zip(result["round_seconds"], windows, strict=True))
        assert result["time_ratio"]["median"] == pytest.approx(ratios[1])
        assert result["flops_ratio"] == pytest.approx(result["training_flops"] / first["training_flops"])
        assert result["flops_ratio"] < 1
    assert expert["mean_depth"] == pytest.approx((32 + 21 + 10) / 32)
    assert first["mean_depth"] is None
    assert first["mfu"] is None, "no peak is known for a CPU"


def test_published_models_load_with_every_case() -> None:
    for size in SIZES:
        for case in cases_of_size(size, ["parallel.backend=fsdp2"], PUBLISHED):
            config = case.config(4)
            assert config.data.seq_len == 2048
            assert (config.recursion.num_recursions == 1) == (case.name == "vanilla")


@pytest.mark.parametrize("names", [["--sizes", "7b"], ["--sizes", "360m", "--cases", "mor9"]])
def test_unknown_names_are_refused(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{names[-1]!r}; choose from" in refusal(capsys, bench.main, "train", "--device", "cpu", *names)


def test_memory_that_runs_out_halves_the_micro_batch() -> None:
    def run(micro_batch: int) -> list[dict[str, Any]]:
        if micro_batch > 4:
            raise torch.OutOfMemoryError("full")
        return [{"micro_batch": micro_batch}]

    assert within_memory(run, 16, torch.device("cpu")) == [{"micro_batch": 4, "out_of_memory_at": [16, 8]}]
    with pytest.raises(torch.OutOfMemoryError):
        within_memory(lambda _: run(5), 3, torch.device("cpu"))


def test_a_failure_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[dict[str, Any]]:
        raise RuntimeError("broken kernel")

    out = tmp_path / "out.json"
    monkeypatch.setattr(train, "measure", fail)
    with pytest.raises(SystemExit) as left:
        measured(out, "--cases", "vanilla")
    assert left.value.code == 1
    assert "broken kernel" in json.loads(out.read_text())["settings"][0]["cases"][0]["error"]


def test_memory_of_every_policy(tmp_path: Path) -> None:
    policies = ("none", "selective:sdpa", "recursion", "block")
    results = measured(tmp_path / "out.json", "--cases", "mor3_expert", "--policies", ",".join(policies))
    assert [(result["name"], result["policy"]) for result in results] == [
        (name, policy) for name in ("vanilla", "mor3_expert") for policy in policies
    ]
    assert all(result["tokens_per_second"] > 0 for result in results)
    assert all(result["estimated_memory_bytes"] > 0 for result in results)
    activations = {result["policy"]: result["estimated_memory"]["activations"] for result in results[4:]}
    assert activations["block"] < activations["selective:sdpa"] < activations["none"]


def test_serving_beside_vanilla(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    models = ["--config", "configs/bench/serve_360m.yaml", "--vanilla", "configs/bench/serve_360m_vanilla.yaml"]
    arguments = ["--residents", "2,4", "--turns", "2", "--prompt-tokens", "3", "--new-tokens", "4-9"]
    policies = ["--kv-policies", "recursion_wise,share_first", "--device", "cpu", "--json", str(out)]
    bench.main(["serve", *models, *arguments, *policies, *TINY])
    settings = json.loads(out.read_text())["settings"]
    found = [(setting["config"]["recursion"]["kv_policy"], setting["workload"]["residents"]) for setting in settings]
    assert found == [(policy, count) for policy in ("recursion_wise", "share_first") for count in (2, 4)]
    for setting in settings:
        cases = {case["case"]: case for case in setting["cases"]}
        assert list(cases) == ["full", "shrink", "depthwise", "vanilla", "depthwise, equal KV bytes"]
        assert 1 < cases["depthwise"]["mean_depth"] < 3
        assert cases["depthwise"]["over_vanilla"] > 0
        assert cases["vanilla"]["of_prediction"] is None
