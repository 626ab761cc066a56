"""`megamor bench save` writes real checkpoints and a report with every field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamor.cli import bench
from tests.commands import refusal

TINY = ("model.vocab_size=64", "model.dim=16", "model.num_heads=2", "model.num_kv_heads=1", "model.ffn_dim=32")


def test_report(tmp_path: Path) -> None:
    file = tmp_path / "out" / "save.json"
    arguments = ["--config", "configs/bench/cpu.yaml", "--steps", "3", "--rounds", "2", "--directory", str(tmp_path)]
    bench.main(["save", *arguments, "--json", str(file), *TINY, "model.num_layers=5"])
    report = json.loads(file.read_text())
    assert report["schema"] == "megamor-bench-save/1"
    assert report["checkpoint_bytes"] > 12 * report["parameters"]  # weights and two moments
    assert (report["steps"], report["rounds"]) == (3, 2)
    for kind in ("blocking", "asynchronous"):
        assert 0 < report[kind]["stall_seconds"]["q1"] <= report[kind]["stall_seconds"]["median"]
    assert report["asynchronous"]["written_after_seconds"]["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert "--steps 1 --rounds 3: give at least 2 and 1" in refusal(capsys, bench.main, "save", "--steps", "1")
