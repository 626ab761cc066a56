"""slurm/node.sh reports what stops a node from training, in one line that names the node. Runs without Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamor.config import config_to_yaml
from tests.resume.runs import tiny_run

ROOT = Path(__file__).parents[2]


def check(directory: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run `node.sh check` on a simulated node whose torch sees two GPUs."""
    tools = directory / "bin"
    tools.mkdir()
    (tools / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'count_gpus' in ''.join(sys.orig_argv):\n"
        "    import os, torch\n"
        "    torch.cuda.is_available = lambda: 'BROKEN' not in os.environ\n"
        "    torch.cuda.device_count = lambda: 2\n"
    )
    file = directory / "config.yaml"
    file.write_text(config_to_yaml(tiny_run(directory)))
    node = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "GPUS": "0", "CONFIG": str(file), "CLUSTER_VENV": sys.prefix}
    node["PYTHONPATH"] = f"{tools}:{ROOT}"
    path = f"{tools}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "slurm" / "node.sh", "check", directory / "logs"],
        env={**os.environ, **node, "PATH": path, "VISIBILITY_SECONDS": "1", **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("gpus", ["0", "2"])
def test_a_good_node(tmp_path: Path, gpus: str) -> None:
    found = check(tmp_path, GPUS=gpus)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert (tmp_path / ".job_7").exists()  # the file that the other nodes wait for


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"GPUS": "8"}, "(node 0 of the job): 2 GPUs instead of 8"),
        pytest.param(
            {"GPUS": "2", "BROKEN": "1", "CUDA_VISIBLE_DEVICES": "0,1"},
            "torch can't use this node's GPUs: see above",
            marks=[pytest.mark.slow, pytest.mark.promise("R24")],
        ),
        ({"SLURM_NODEID": "1"}, "(node 1 of the job): run.dir {} isn't the directory that node 0 sees"),
        ({"CONFIG": "nowhere.yaml"}, "nowhere.yaml"),
        ({"CLUSTER_VENV": "/nowhere", "PATH": "/usr/bin:/bin"}, "python"),
    ],
    ids=["too few GPUs", "unusable GPUs", "own directory", "no configuration", "no environment"],
)
def test_a_bad_node(tmp_path: Path, variables: dict[str, str], says: str) -> None:
    found = check(tmp_path, **variables)
    assert found.returncode == 2
    assert says.format(tmp_path) in found.stderr
    assert "Traceback" not in found.stderr
