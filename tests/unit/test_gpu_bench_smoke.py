"""The GPU bench on a CPU with a tiny model: its bookkeeping, not its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.bench import gpu_measure as measure
from megamor.bench import gpu_memory as memory
from megamor.bench import gpu_serve as serve
from megamor.bench import gpu_train as train
from megamor.bench.gpu_cases import CASES, SIZES, plan_cases
from megamor.errors import ConfigError
from megamor.parallel import World

TINY = [
    *("model.vocab_size=64", "model.dim=32", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=64"),
    *("model.num_layers=8", "model.max_seq_len=32", "data.seq_len=32", "train.precision=fp32"),
]
ARGUMENTS = ["--device", "cpu", "--sizes", "135m", "--no-compile", "--micro-batch", "2", "--seconds-per-case", "0.1"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "out.json"
    cases = "vanilla,mor3_expert,mor3_token"
    status = train.main([*ARGUMENTS, "--backend", "single", "--cases", cases, "--json", str(out), *TINY])
    assert status == 0
    return json.loads(out.read_text())


def test_vanilla_stands_on_both_sides(report: dict[str, Any]) -> None:
    assert [result["case"] for result in report["results"]] == ["vanilla", "mor3_expert", "mor3_token", "vanilla"]
    assert report["schema"] == train.SCHEMA
    assert {"command", "date", "commit", "machine", "versions"} <= report.keys()


def test_speedups_follow_from_the_rates(report: dict[str, Any]) -> None:
    first, expert, token, last = report["results"]
    per_token = (1 / first["tokens_per_second"] + 1 / last["tokens_per_second"]) / 2
    for result in (expert, token):
        assert result["speedup"] == pytest.approx(result["tokens_per_second"] * per_token)
        assert result["implied_speedup"] == pytest.approx(first["flops_per_token"] / result["flops_per_token"])
        assert result["implied_speedup"] > 1
    assert expert["mean_depth"] == pytest.approx((32 + 21 + 10) / 32)
    assert first["mean_depth"] is None
    assert first["mfu"] is None, "no peak is known for a CPU"


def test_published_models_load_with_every_case() -> None:
    for case in plan_cases(list(SIZES), list(CASES), [True, False], "fsdp2", []):
        config = case.config(4)
        assert config.train.compile == case.compiled
        assert config.data.seq_len == 2048
        assert (config.recursion.num_recursions == 1) == (case.name == "vanilla")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="7b"):
        plan_cases(["7b"], ["vanilla"], [True], "fsdp2", [])
    with pytest.raises(ConfigError, match="mor9"):
        plan_cases(["360m"], ["mor9"], [True], "fsdp2", [])


def test_memory_that_runs_out_halves_the_micro_batch() -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    (case,) = plan_cases(["360m"], ["vanilla"], [False], "single", [])

    def run(micro_batch: int) -> dict[str, Any]:
        if micro_batch > 4:
            raise torch.OutOfMemoryError("full")
        return {"micro_batch": micro_batch}

    found = measure.measure_within_memory(case, world, 16, run)
    assert found == {"micro_batch": 4, "out_of_memory_at": [16, 8]}
    with pytest.raises(torch.OutOfMemoryError):
        measure.measure_within_memory(case, world, 3, lambda _: run(5))


def test_a_failure_or_the_time_limit_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("broken kernel")

    out = tmp_path / "out.json"
    monkeypatch.setattr(train, "measure", fail)
    arguments = [*ARGUMENTS, "--backend", "single", "--cases", "vanilla", "--json", str(out), *TINY]
    assert train.main(arguments) == 1
    assert "broken kernel" in json.loads(out.read_text())["results"][0]["error"]
    assert train.main([*arguments, "--time-limit", "0"]) == 0
    assert "skipped" in json.loads(out.read_text())["results"][0]


def test_memory_of_every_policy(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    policies = ("none", "selective:sdpa", "recursion", "block")
    arguments = ["--device", "cpu", "--size", "135m", "--micro-batch", "2", "--seconds-per-case", "0.1"]
    chosen = ["--cases", "mor3_expert", "--policies", ",".join(policies), "--backend", "single", "--json", str(out)]
    assert memory.main([*arguments, *chosen, *TINY]) == 0
    report = json.loads(out.read_text())
    assert report["schema"] == memory.SCHEMA
    assert [result["policy"] for result in report["results"]] == list(policies)
    for result in report["results"]:
        assert result["tokens_per_second"] > 0
        assert result["peak_memory_gib"] > result["estimated_gib"]["total"] > 0, (
            "a CPU's resident set has all of Python"
        )
    activations = {result["policy"]: result["estimated_gib"]["activations"] for result in report["results"]}
    assert activations["block"] < activations["selective:sdpa"] < activations["none"]


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(SystemExit):
        memory.main(["--device", "cpu", "--policies", "sometimes", *TINY])
    with pytest.raises(SystemExit):
        memory.main(["--device", "cpu", "--policies", "selective:sin", *TINY])


def test_serving_beside_vanilla(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--size", "135m", "--residents", "2,4", "--turns", "2", "--json", str(out)]
    serve.main([*arguments, "--prompt-tokens", "3", "--new-tokens", "4,9", *TINY])
    report = json.loads(out.read_text())
    assert report["schema"] == serve.SCHEMA
    settings = [(result["kv_policy"], result["workload"]["residents"]) for result in report["results"]]
    assert settings == [(policy, count) for policy in serve.KV_POLICIES for count in (2, 4)]
    for result in report["results"]:
        cases = {case["case"]: case for case in result["cases"]}
        assert list(cases) == ["full", "shrink", "depthwise", "vanilla", "depthwise, equal KV bytes"]
        assert 1 < cases["depthwise"]["mean_depth"] < 3
        assert cases["depthwise"]["over_vanilla"] > 0
        assert cases["vanilla"]["of_prediction"] is None
