"""The scripts in slurm/: shellcheck, what they pass to sbatch, and what a job runs (here, without a cluster)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from megamor.config import config_to_yaml
from megamor.corpus.array import shard_prefix
from megamor.corpus.writer import ShardWriter
from megamor.data.shard import TokenShard
from tests.resume.runs import tiny_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "preprocess.sh"
# Replaces sbatch or python: records its arguments, one a line, and prints a job number.
RECORDER = '#!/bin/bash\nprintf "%s\\n" "$@" "--end--" >> {log}\necho "10$(grep -c -- --end-- {log})"\n'


@dataclass(frozen=True)
class Cluster:
    """A directory of fake programs: `sbatch` and, if wanted, `python` only record their arguments."""

    folder: Path

    def replace(self, command: str) -> None:
        path = self.folder / command
        path.write_text(RECORDER.format(log=self.folder / f"{command}.log"))
        path.chmod(0o755)

    def calls(self, command: str) -> list[list[str]]:
        lines = (self.folder / f"{command}.log").read_text().splitlines()
        text = "\0".join(lines).split("--end--")
        return [call.strip("\0").split("\0") for call in text if call.strip("\0")]

    def run(self, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CLUSTER_"))}
        own = {"PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "CLUSTER_VENV": ""}
        environment = clean | own | {name: str(value) for name, value in variables.items()}
        command = ["bash", *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    result = Cluster(tmp_path)
    result.replace("sbatch")
    return result


OPTIONS = ["--input", "pile/*.zst", "--tokenizer", "t k.json", "--output-prefix", "data/pile", "--append-eod"]


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), "-x", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def a_run(directory: Path) -> dict[str, object]:
    """Variables of a submission of a tiny run on one node without GPUs."""
    file = directory / "run.yaml"
    file.write_text(config_to_yaml(tiny_run(directory)))
    return {"CONFIG": file, "GPUS": 0, "NODES": 1}


TRAIN = ROOT / "slurm" / "mor_1b.sh"


@pytest.mark.parametrize(
    ("variables", "overrides", "said"),
    [
        ({"NODES": 3}, [], "train.global_batch_size = 4 isn't divisible by train.micro_batch_size = 1 x 3 processes"),
        pytest.param({"GPUS": "h100:3"}, [], "micro_batch_size = 1 x 3 processes", marks=pytest.mark.slow),
        pytest.param({}, ["data.train=[nowhere]"], "nowhere.idx doesn't exist", marks=pytest.mark.slow),
        ({}, ["data.tokenizer=none.json"], "tokenizer none.json can't be read"),
        ({"LAUNCHER": "deepspeed"}, ["parallel.shard_degree=2"], "needs fsdp2, but parallel.backend = deepspeed"),
        ({"LAUNCHER": "mpirun"}, [], "LAUNCHER is mpirun"),
    ],
)
def test_what_would_end_a_job_is_found_before_it_is_queued(
    cluster: Cluster, variables: dict[str, object], overrides: list[str], said: str
) -> None:
    result = cluster.run(TRAIN, *overrides, **{**a_run(cluster.folder), **variables})
    assert result.returncode == 2
    assert said in result.stderr
    assert not (cluster.folder / "sbatch.log").exists()


def test_the_nodes_and_gpus_that_are_checked_are_those_of_the_script(cluster: Cluster) -> None:
    assert "micro_batch_size = 7 x 32 processes" in cluster.run(TRAIN, "train.micro_batch_size=7").stderr


@pytest.mark.parametrize("check", ["passes", "off", "no python", "container"])
def test_a_run_that_can_start_is_submitted(cluster: Cluster, check: str) -> None:
    variables = {**a_run(cluster.folder), "CLUSTER_LOGS": cluster.folder / "logs"}
    if check == "off":
        variables["CHECK"] = 0
    elif check == "no python":
        cluster.replace("python")
        (cluster.folder / "python").write_text("#!/bin/sh\nexit 1\n")
        variables["CLUSTER_VENV"] = "/nowhere"
    elif check == "container":
        variables["CLUSTER_CONTAINER"] = "megamor.sif"
    overrides = [] if check == "passes" else ["data.train=[nowhere]"]
    result = cluster.run(TRAIN, *overrides, **variables)
    assert result.returncode == 0, result.stderr
    (call,) = cluster.calls("sbatch")
    assert call[-1 - len(overrides) :] == [str(TRAIN), *overrides]
    assert ("the job will check" in result.stderr) == (check in ("no python", "container"))


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_SUBMIT_DIR": ROOT}, True),
        ({"SLURM_SUBMIT_DIR": ROOT / "slurm"}, True),
        ({"SLURM_SUBMIT_DIR": "/", "MEGAMOR_ROOT": ROOT}, True),
        ({"SLURM_SUBMIT_DIR": "/"}, False),
    ],
)
def test_a_job_finds_its_scripts(cluster: Cluster, variables: dict[str, object], found: bool) -> None:
    """Slurm runs a copy of the script, which was submitted from anywhere."""
    copy = cluster.folder / "job" / "slurm_script"
    copy.parent.mkdir()
    copy.write_text(TRAIN.read_text())
    job = {"SLURM_JOB_ID": 1, "SLURM_NNODES": 1, "SLURM_JOB_NAME": "x"}
    result = cluster.run(copy, LAUNCHER="mpirun", **job, **variables)
    assert result.returncode == 2
    expected = "LAUNCHER is mpirun" if found else "submit from the root of the repository or set MEGAMOR_ROOT to it"
    assert expected in result.stderr


def test_an_array_and_a_merge_that_waits_for_it(cluster: Cluster) -> None:
    result = cluster.run(SCRIPT, *OPTIONS, SHARDS=4, CPUS=3)
    assert result.returncode == 0, result.stderr
    assert "array job 101, parts 0-3 of 4; merge job 102 writes data/pile" in result.stdout
    array, merge = cluster.calls("sbatch")
    assert {"--array=0-3", "--cpus-per-task=3", "--requeue", "--open-mode=append", "--parsable"} < set(array)
    assert array[-len(OPTIONS) - 2 :] == [str(SCRIPT), "part", *OPTIONS]
    assert {"--dependency=afterok:101", "--kill-on-invalid-dep=yes"} < set(merge)
    assert merge[-3:] == [str(SCRIPT), "merge", "data/pile"]
    assert (cluster.folder / "logs").is_dir()


def test_settings_of_the_cluster_are_passed_on_and_absent_ones_are_not(cluster: Cluster) -> None:
    cluster.run(SCRIPT, *OPTIONS)
    names = ("--partition", "--account", "--qos", "--constraint", "--mem", "--time")
    assert not [option for call in cluster.calls("sbatch") for option in call if option.startswith(names)]
    (cluster.folder / "sbatch.log").unlink()
    settings = {"PARTITION": "cpu", "ACCOUNT": "me", "QOS": "low", "CONSTRAINT": "big", "SBATCH_OPTIONS": "--nice=5 -v"}
    cluster.run(
        SCRIPT, *OPTIONS, MEM="9G", TIME="1:00", TASKS="2,3", **{f"CLUSTER_{k}": v for k, v in settings.items()}
    )
    expected = {"--partition=cpu", "--account=me", "--qos=low", "--constraint=big", "--nice=5", "-v", "--mem=9G"}
    for call in cluster.calls("sbatch"):
        assert expected | {"--time=1:00"} < set(call)
    assert "--array=2,3" in cluster.calls("sbatch")[0]


@pytest.mark.parametrize("options", [[], ["--input", "x"], [*OPTIONS, "--workers", "3"], [*OPTIONS, "--shard", "0/2"]])
def test_incomplete_options_submit_nothing(cluster: Cluster, options: Sequence[str]) -> None:
    result = cluster.run(SCRIPT, *options)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert not (cluster.folder / "sbatch.log").exists()


def test_a_job_of_the_array(cluster: Cluster) -> None:
    """Also when a single job of the array is rerun, for which Slurm reports an array of one job."""
    cluster.replace("python")
    result = cluster.run(
        SCRIPT, "part", *OPTIONS, SHARDS=4, SLURM_ARRAY_TASK_ID=2, SLURM_ARRAY_TASK_COUNT=1, SLURM_CPUS_PER_TASK=3
    )
    assert result.returncode == 0, result.stderr
    assert cluster.calls("python") == [
        [str(ROOT / "tools" / "preprocess.py"), *OPTIONS, "--workers", "3", "--shard", "2/4"]
    ]


@pytest.mark.parametrize(
    ("image", "command", "before"),
    [
        ("megamor.sif", "apptainer", ["exec", "--env", "PATH=", "--bind", "/data", "megamor.sif", "python"]),
        ("registry#megamor", "srun", ["--container-image=registry#megamor", "--container-mounts=/data", "python"]),
    ],
)
def test_containers(cluster: Cluster, image: str, command: str, before: list[str]) -> None:
    cluster.replace(command)
    settings = {"CLUSTER_CONTAINER": image, "CLUSTER_MOUNTS": "/data"}
    assert cluster.run(SCRIPT, "part", "--x", SHARDS=4, SLURM_ARRAY_TASK_ID=2, **settings).returncode == 0
    (call,) = cluster.calls(command)
    shown = [part if not part.startswith("PATH=") else "PATH=" for part in call]
    assert shown[: len(before)] == before


def test_merge_job(cluster: Cluster) -> None:
    """The merge job merges the splits that exist, and reports an error if there are none."""
    for split in ("train", "val"):
        for index in range(2):
            with ShardWriter(shard_prefix(str(cluster.folder / f"x_{split}"), index, 2), "u2") as writer:
                writer.add([index])
                writer.commit()
    result = cluster.run(SCRIPT, "merge", cluster.folder / "x", SHARDS=2)
    assert result.returncode == 0, result.stderr
    for split in ("train", "val"):
        assert TokenShard.open(cluster.folder / f"x_{split}").tokens.tolist() == [0, 1]
    for index in (0, 1):
        Path(f"{shard_prefix(str(cluster.folder / 'x_val'), index, 2)}.idx").unlink()
    Path(f"{shard_prefix(str(cluster.folder / 'x_train'), 0, 2)}.idx").unlink()
    failed = cluster.run(SCRIPT, "merge", cluster.folder / "x", SHARDS=2)
    assert failed.returncode == 2
    assert "missing: 0" in failed.stderr
    nothing = cluster.run(SCRIPT, "merge", cluster.folder / "y", SHARDS=2)
    assert nothing.returncode == 2
    assert "there is no shard" in nothing.stderr


@pytest.mark.parametrize(
    ("ranks", "srun", "telling"),
    [
        ([75, 76], 137, 75),  # one rank hung and exited, the other lost the connection
        ([75, 1, 76], 137, 1),  # one ran out of memory, another waited for it until its watchdog ended it
        ([75, 137], 137, 75),
        ([1, 2], 137, 2),  # one rank reported an error of the user's, the other was killed in a collective
        ([76, 3], 76, 3),
        ([1, 1], 1, 1),
        ([0, 137], 137, 137),
        ([], 143, 143),
    ],
)
def test_a_jobs_status_is_the_one_that_explains_the_failure(
    tmp_path: Path, ranks: list[int], srun: int, telling: int
) -> None:
    for rank, status in enumerate(ranks):
        (tmp_path / f"status_{rank}").write_text(f"{status}\n")
    parts = "/^telling_status/,/^}/p; /^requeue_status/p; /^lost_rank/p; /^user_error/p"
    functions = f"source <(sed -n '{parts}' {ROOT}/slurm/train.sh)"
    command = ["bash", "-c", f"{functions}; rank_logs={tmp_path}; telling_status {srun}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{telling}\n"


@pytest.mark.promise("R24")
@pytest.mark.parametrize(
    ("stop_asked", "saved", "requeued"),
    [
        ("", ["", "step_10", "step_20"], [True, True]),
        ("", ["step_10", "step_10"], [False]),  # it hung where it had hung before
        ("", ["", ""], [False]),
        ("", ["step_10", None], [False]),
        ("yes", ["step_10"] * 4, [True, True, False]),  # preempted again and again before its first save
        ("yes", ["", "", "", "step_10", "step_10", "step_10"], [True, True, True, True, True]),
        ("yes", ["step_10", None], [True]),  # killed while it was saving
    ],
)
def test_a_job_that_saved_nothing_is_not_requeued(
    tmp_path: Path, stop_asked: str, saved: list[str | None], requeued: list[bool]
) -> None:
    """What `latest` is at each start and after the last one; None: nobody could say."""
    functions = f"source <(sed -n '/^made_no_progress/,/^}}/p' {ROOT}/slurm/train.sh); made_no_progress"
    found = []
    for start, (before, after) in enumerate(pairwise(saved)):
        logs = tmp_path / "logs" / "job_7" / f"start_{start}"
        logs.mkdir(parents=True)
        (logs / "saved_before").write_text(before or "")
        if after is not None:
            (logs / "saved_after").write_text(after)
        variables = {"CLUSTER_LOGS": tmp_path / "logs", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "7", "rank_logs": logs}
        env = {**os.environ, **{name: str(value) for name, value in variables.items()}, "stop_asked": stop_asked}
        found.append(subprocess.run(["bash", "-euc", functions], env=env, check=False).returncode != 0)
    assert found == requeued
