"""The short quickstart: all seven steps, then a second run that finds them done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def quickstart(root: Path) -> str:
    command = [sys.executable, "-m", "megamor", "quickstart", "--short", "--root", str(root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(900)
def test_quickstart_runs_and_runs_again(tmp_path: Path) -> None:
    root = tmp_path / "quickstart"
    first = quickstart(root)
    assert "resuming after step 4" in first
    report = json.loads((root / "report.json").read_text())
    assert report["step"] == 8
    assert report["tokens_seen"] == 8 * 8 * 256
    assert {"loss_topk", "loss_causal"} <= report["network"].keys()
    assert report["floors"]["trigram"] <= report["floors"]["bigram"] < report["floors"]["unigram"]
    assert report["network"]["loss_causal"] < 8.31  # below ln 4096, the loss of a uniform guess
    assert 0.3 < report["savings"]["flops_ratio"] <= 1
    assert report["savings"]["time_ratio"] > 0
    assert "of the same model at full depth" in " ".join(first.split())
    assert (root / "depth.svg").stat().st_size > 10_000
    steps = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "train/loss" in step] == list(range(1, 9))

    checkpoint = (root / "checkpoints" / "latest" / "manifest.json").read_bytes()
    second = quickstart(root)
    assert second.count("already done") == 6
    assert (root / "checkpoints" / "latest" / "manifest.json").read_bytes() == checkpoint
