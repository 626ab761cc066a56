"""The planner's arithmetic, and its answer if a run doesn't fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamor.bench.tables import RESULTS
from megamor.cli import plan
from megamor.config import Config, config_from_dict, load_config
from megamor.metrics.gpus import GPUS
from megamor.model.flops import nominal_flops
from megamor.plan.estimate import (
    ADAMW_BYTES,
    HOP_SECONDS,
    USABLE,
    Cluster,
    communication_seconds,
    estimate,
    nearest_that_fits,
    run_seconds,
)
from megamor.plan.memory import step_memory, unit_parameters
from megamor.plan.recommend import laws
from tests.commands import refusal

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = str(CONFIGS / "mor_1b.yaml")


def report(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "plan.json"
    plan.main(["--config", RECIPE, "--json", str(out), *arguments])
    return json.loads(out.read_text())


def test_every_backend_and_policy_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = report(tmp_path, "--gpus", "64", "--gpu", "h200")
    lines = {(row["backend"], row["activation_checkpointing"]) for row in found["rows"]}
    backends = {"ddp", "fsdp2", "fsdp2, kept", "hsdp", "hsdp, kept", "zero1", "zero2", "zero3"}
    assert lines == {(b, p) for b in backends for p in ("none", "selective", "block", "recursion")}
    assert all(row["fits"] and row["instead"] is None for row in found["rows"])
    assert all(0 < row["mfu_without_overlap"] <= row["mfu_bound"] <= 1 for row in found["rows"])
    assert "hsdp" in capsys.readouterr().out


def test_a_run_that_does_not_fit_gets_a_suggestion(tmp_path: Path) -> None:
    found = report(tmp_path, "--gpus", "8", "--gpu", "a100-40", "train.micro_batch_size=16")
    tight = [row for row in found["rows"] if not row["fits"]]
    assert {row["activation_checkpointing"] for row in tight} >= {"none"}
    assert all(row["memory"]["total"] > found["usable_memory"] and "train." in row["instead"] for row in tight)
    config = load_config(RECIPE, ["train.micro_batch_size=16", "parallel.backend=ddp"])
    cluster = Cluster(GPUS["a100-40"], 8, 8)
    assert step_memory(config, 8).total > USABLE * cluster.gpu.memory
    change, changed = nearest_that_fits(config, cluster) or ("", config)
    again = load_config(RECIPE, ["train.micro_batch_size=16", "parallel.backend=ddp", *change.split()])
    assert again.train == changed.train
    assert step_memory(again, 8).total <= USABLE * cluster.gpu.memory


def test_a_run_that_nothing_makes_fit_is_reported(tmp_path: Path) -> None:
    long = ["data.seq_len=1048576", "model.max_seq_len=1048576", "train.micro_batch_size=1"]
    found = report(tmp_path, "--gpus", "8", "--gpu", "l40s", *long)
    assert all("nothing fits" in row["instead"] for row in found["rows"])


def test_bounds_by_hand() -> None:
    """DDP on one node: compute at peak speed, gradients over a ring of links, AdamW bound by memory."""
    config = load_config(RECIPE, ["parallel.backend=ddp", "train.micro_batch_size=8"])
    gpu = GPUS["h100"]
    cluster = Cluster(gpu, 8, 8)
    found = estimate(config, cluster)
    size = 772_282_368
    assert found.traffic.sent == pytest.approx(2 * 4 * size * 7 / 8, rel=1e-3)
    compute = nominal_flops(config, 1024 / 8).training / 989.4e12
    communication = 2 * 4 * size * 7 / 8 / 450e9
    update = ADAMW_BYTES * size / 3350e9
    assert found.compute_seconds == pytest.approx(compute)
    assert found.communication_seconds == pytest.approx(communication, rel=1e-3)
    assert found.mfu_without_overlap == pytest.approx(compute / (compute + communication + update), rel=1e-3)
    assert found.mfu_bound == pytest.approx(compute / (compute + update), rel=1e-3)


def test_hours_of_a_budget_of_flops() -> None:
    """As many FLOPs take as long, however the budget is given."""
    cluster = Cluster(GPUS["h100"], 8, 8)
    by_steps = load_config(RECIPE, ["train.max_steps=1000", "train.max_tokens=null"])
    flops = 1000 * nominal_flops(by_steps, by_steps.train.global_batch_size).training
    by_flops = load_config(RECIPE, ["train.max_steps=null", "train.max_tokens=null", f"train.max_flops={flops!r}"])
    assert run_seconds(by_steps, cluster, 0.4) == pytest.approx(flops / (8 * 989.4e12 * 0.4))
    assert run_seconds(by_flops, cluster, 0.4) == pytest.approx(flops / (8 * 989.4e12 * 0.4))


def test_rings_over_nodes_use_the_network() -> None:
    gpu = GPUS["h100"]
    one, two = Cluster(gpu, 8, 8), Cluster(gpu, 16, 8)
    assert one.bandwidth(8, neighbours=True) == gpu.link
    assert two.bandwidth(16, neighbours=True) == 8 * gpu.network, "all ports of a node at once"
    assert two.bandwidth(2, neighbours=False) == gpu.network, "replicas of groups on nodes: one port each"
    config = load_config(RECIPE, ["parallel.backend=fsdp2", "parallel.shard_degree=8", "train.micro_batch_size=8"])
    traffic = estimate(config, two).traffic
    expected = traffic.sent_among_shards / gpu.link + traffic.sent_among_replicas / gpu.network
    expected += (4 + 4) * 7 * HOP_SECONDS  # four units, kept gathered over eight micro-batches; four reductions
    assert communication_seconds(traffic, two) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8", "--gpu", "h300"], "--gpu h300"),
        (["--gpus", "48", "--gpu", "h100"], "isn't divisible"),
        (["--gpus", "8", "--gpu", "h100", "--mfu", "2"], "--mfu 2"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in refusal(capsys, plan.main, "--config", RECIPE, *arguments)


def test_every_gpu_has_a_peak_and_a_source() -> None:
    for gpu in GPUS.values():
        assert gpu.bf16_peak > 1e14
        assert gpu.source


@pytest.mark.parametrize("path", sorted(RESULTS.glob("checkpointing_*.json")), ids=lambda path: path.stem)
def test_the_estimate_matches_measured_memory(path: Path) -> None:
    """Measured resident memory of processes with steps of seconds, compared with the estimate, within 10 %."""
    (measured,) = json.loads(path.read_text(encoding="utf-8"))["settings"]
    assert len(measured["cases"]) >= 5
    for found in measured["cases"]:
        case = policy_case_of(measured["config"], found["policy"])
        estimated = step_memory(case, 1, on_gpu=False).total - 4 * sum(unit_parameters(case).values())
        assert estimated == pytest.approx(found["peak_memory_bytes"], rel=0.1), found["policy"]


def policy_case_of(config: dict[str, Any], policy: str) -> Config:
    """A stored configuration under a policy in the bench's notation."""
    mode, _, kept = policy.partition(":")
    ops = {"selective_ops": kept.split("+")} if kept else {}
    train = {**config["train"], "activation_checkpointing": mode, **ops}
    return config_from_dict({**config, "train": train})


def test_laws_by_hand() -> None:
    """At 8 x 108M parameters: (N / 108M)^(2/3) = 4 and ^(-1/3) = 1/2."""
    found = laws(8 * 108e6, tokens=1.16e9 * 2**10)
    assert found["OLMo ladder"]["batch"] == pytest.approx(4 * 327_680)
    assert found["OLMo ladder"]["learning rate"] == pytest.approx(0.0047 / 4)
    assert found["nanochat"]["batch"] == pytest.approx(2**19 * 2**3.83)
    assert found["Chinchilla"]["tokens"] == pytest.approx(160 * 108e6)


def test_recommendation_compares_the_recipe(capsys: pytest.CaptureFixture) -> None:
    plan.main(["--config", "configs/mor_360m.yaml", "--recommend"])
    lines = capsys.readouterr().out.splitlines()
    assert "314.64M parameters at full depth without embedding, 29.70G tokens" in lines[0]
    assert [line for line in lines if line.startswith("MoR paper") and "follows" in line] == lines[-2:]
    assert any(line.startswith("OLMo ladder  learning rate") and "1.82 times the law's" in line for line in lines)
    plan.main(["--parameters", "350e6", "--flops", "2.1e19", "--recommend"])
    printed = capsys.readouterr().out
    assert "350.00M parameters at full depth without embedding, 10.00G tokens" in printed
    assert "here" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recommend"], "--recommend needs --config or --parameters"),
        (["--recommend", "--parameters", "-1"], "must be positive"),
        (["--config", "x.yaml"], "arguments are required"),
        (["--recommend", "--parameters", "1e8", "optim.lr=1e-3"], "key=value needs --config"),
        (["--recommend", "--parameters", "1e8", "--tokens", "1e9", "--flops", "1e20"], "not both"),
        (["--recommend", "--parameters", "1e8", "--json", "x.json"], "writes no --json"),
        (["--config", "x.yaml", "--gpu", "h100", "--gpus", "8", "--tokens", "1e9"], "need --recommend"),
    ],
)
def test_arguments_that_contradict(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in refusal(capsys, plan.main, *arguments)
