"""slurm/preprocess.sh on a real Slurm: the array of shards, their merge, and no merge if a shard fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamor.cli import preprocess
from tests.slurm.cluster import Cluster, missing_programs

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    bool(missing_programs()) and not os.environ.get("MEGAMOR_NEEDS_SLURM"),
    reason="slurm isn't installed: apt-get install --no-install-recommends slurm-wlm munge",
)


def options(folder: Path, prefix: str) -> list[str]:
    return [
        "--input",
        f"{folder}/*.jsonl",
        "--tokenizer",
        "byte",
        "--output-prefix",
        str(folder / prefix),
        "--append-eod",
    ]


def submit(cluster: Cluster, folder: Path, **variables: str) -> tuple[str, str]:
    """Job numbers of the array and of the merge."""
    settings = {"SHARDS": "3", "CPUS": "1", "TIME": "10:00", "CLUSTER_LOGS": str(folder / "logs")}
    result = subprocess.run(
        [ROOT / "slurm" / "preprocess.sh", *options(folder, "x")],
        env={**cluster.env, **settings, "CLUSTER_VENV": sys.prefix, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"array job (\d+), .* merge job (\d+)", result.stdout)
    assert found, result.stdout
    return found[1], found[2]


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted((folder / "logs").iterdir()))


def test_an_array_gives_what_one_run_gives(cluster: Cluster, tmp_path: Path) -> None:
    for name in "abcd":
        lines = [json.dumps({"text": f"{name} {number} " * 40}) for number in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    _, merge = submit(cluster, tmp_path)
    cluster.wait_for(merge, "COMPLETED", "FAILED", "CANCELLED")
    assert (tmp_path / "x.idx").exists(), logs(tmp_path)
    preprocess.main([*options(tmp_path, "one"), "--workers", "1"])
    for ending in ("bin", "idx"):
        assert (tmp_path / f"x.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes()


def test_a_part_that_fails_cancels_the_merge_and_can_be_run_again(cluster: Cluster, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps({"text": name * 50})] * 20))
    good = (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(good.replace('"text"', '"tixt"', 1))
    _, merge = submit(cluster, tmp_path)
    cluster.wait_for(merge, "COMPLETED", "FAILED", "CANCELLED")
    assert not (tmp_path / "x.idx").exists()
    assert "b.jsonl, line 1" in logs(tmp_path)
    failed = [number for number in range(3) if not (tmp_path / f"x_shard_0000{number}_of_00003.idx").exists()]
    assert failed == [1]
    (tmp_path / "b.jsonl").write_text(good)
    _, merge = submit(cluster, tmp_path, TASKS="1")
    cluster.wait_for(merge, "COMPLETED", "FAILED", "CANCELLED")
    assert (tmp_path / "x.idx").exists(), logs(tmp_path)
