"""`megamor study run --slurm` on a real Slurm: tuning, runs, report; a signalled run resumes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from megamor.cli import study
from tests.slurm.cluster import Cluster, missing_programs, wait_until
from tests.unit.test_study import study_file

pytestmark = pytest.mark.skipif(
    bool(missing_programs()) and not os.environ.get("MEGAMOR_NEEDS_SLURM"),
    reason="slurm isn't installed: apt-get install --no-install-recommends slurm-wlm munge",
)


@pytest.mark.slow
def test_a_study_as_arrays_of_jobs(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("".join(f"{i} to be or not to be\n" for i in range(2000)), encoding="utf-8")
    data = {"text": ["book.txt"], "tokenizer": "char"}
    file = study_file(tmp_path, data=data, arms=["recursive", "mor"], lr=[2e-3, 8e-3], seeds=1, budget={"flops": 2e9})
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env[name])
    root = tmp_path / "studies" / "mine"
    options = ["--sbatch", "--cpus-per-task=1 --ntasks=1"]

    study.main(["run", str(file), "--out", str(tmp_path / "studies"), "--slurm", *options])

    found = re.search(r"train: 2 jobs, array (\d+)", capsys.readouterr().out)
    assert found is not None
    wait_until(lambda: (root / "recursive_seed0/metrics.jsonl").exists(), "the first run begins", timeout=400)
    cluster.signal_steps(f"{found[1]}_0", "USR1")
    wait_until(lambda: (root / "report.html").exists(), "the report is written", timeout=400)
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    assert [run["arm"] for run in results["runs"]] == ["recursive", "mor"]
    assert all(len(arm["tuning"]) >= 2 for arm in results["arms"])
    assert "stopped on request" in "".join(log.read_text() for log in (root / "logs").glob("train_*.log"))
