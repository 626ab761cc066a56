"""The scripts of slurm/ on a real Slurm: a preempted run is requeued and ends as if it had not been interrupted."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megamor.config import Config, ParallelConfig, config_to_yaml
from tests.resume.runs import assert_same_run, checkpoint_names, fit, named, tiny_run, trace, wait_for_steps
from tests.slurm.cluster import Cluster, missing_programs, wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "mor_135m.sh"

pytestmark = pytest.mark.skipif(
    bool(missing_programs()) and not os.environ.get("MEGAMOR_NEEDS_SLURM"),
    reason="slurm isn't installed: apt-get install --no-install-recommends slurm-wlm munge",
)


@pytest.fixture
def base(tmp_path: Path) -> Config:
    """A run long enough to be interrupted."""
    return tiny_run(tmp_path, max_steps=120, eval_every=1000)


def variables(config: Config, **more: str) -> dict[str, str]:
    """The environment that a user would set for two nodes without GPUs, and none of this test's own variables.

    By default without the check before the queue, whose tests are in tests/contract/test_slurm.py.
    """
    file = Path(config.run.dir) / f"{config.run.name}.yaml"
    file.write_text(config_to_yaml(config))
    return {
        "CONFIG": str(file),
        "NODES": "2",
        "GPUS": "0",
        "TIME": "30:00",
        "MASTER_ADDR": "127.0.0.1",  # node names don't resolve on this machine
        "CLUSTER_SBATCH_OPTIONS": "--cpus-per-task=1",
        "CLUSTER_LOGS": str(Path(config.run.dir) / "logs"),
        "CLUSTER_VENV": sys.prefix,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "CHECK": "0",
        **more,
    }


def log_of(config: Config) -> str:
    """The output of all starts of the job."""
    return "".join(file.read_text() for file in sorted((Path(config.run.dir) / "logs").glob("*.log")))


@pytest.mark.promise("R4", backend="slurm")
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_preempted_job_is_queued_again_and_goes_on(cluster: Cluster, base: Config, launcher: str) -> None:
    # One group: by default each node would be one, and `straight` runs on one node.
    parallel = ParallelConfig(backend="deepspeed") if launcher == "deepspeed" else ParallelConfig(shard_degree=2)
    config = replace(base, parallel=parallel)
    job = cluster.submit([SCRIPT], variables(config, LAUNCHER=launcher, CHECK="1"))
    wait_for_steps(config, 3)
    cluster.signal(job, "USR1")
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the job is requeued")
    (stopped_at,) = [name for name in checkpoint_names(config) if name.startswith("step")]
    assert stopped_at != "step_00000120"
    cluster.wait_for(job, "COMPLETED", "FAILED")
    assert cluster.job(job)["JobState"] == "COMPLETED", log_of(config)
    assert f"resuming after step {int(stopped_at[5:])}" in log_of(config) + rank_logs(config)
    for start in (0, 1):
        assert len(list((Path(config.run.dir) / "logs").glob(f"*/start_{start}/node_*"))) == 2

    straight = named(config, "straight")
    assert fit(straight) == [True, True]
    assert_same_run(trace(straight), trace(config))


@pytest.mark.promise("R20")
def test_srun_alone_starts_one_world_and_a_batch_script_trains_alone(cluster: Cluster, base: Config) -> None:
    """Without slurm/train.sh: `srun python pretrain.py`, and python in a batch script with several tasks."""
    config = replace(base, train=replace(base.train, max_steps=8), parallel=ParallelConfig(backend="ddp"))
    alone = replace(named(config, "alone"), parallel=ParallelConfig())
    script = Path(base.run.dir) / "job.sh"
    command = f"{sys.executable} {ROOT / 'pretrain.py'} --config"
    files = {}
    for each in (config, alone):
        files[each.run.name] = Path(base.run.dir) / f"{each.run.name}.yaml"
        files[each.run.name].write_text(config_to_yaml(each))
    srun = f"srun --nodes=1 --ntasks=2 --overcommit {command} {files['tiny']}"
    script.write_text(f"#!/bin/bash\nset -e\n{srun}\n{command} {files['alone']}\n")
    script.chmod(0o755)
    output = Path(base.run.dir) / "job.log"
    job = cluster.submit(
        ["sbatch", "--ntasks=2", "--overcommit", f"--output={output}", script],
        {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    cluster.wait_for(job, "COMPLETED", "FAILED")
    said = output.read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", said
    assert said.count("tiny: starting from the beginning") == said.count("alone: starting from the beginning") == 1
    assert "so it trains alone, on one of 2 tasks" in said
    straight = named(config, "straight")
    assert fit(straight) == [True, True]
    assert_same_run(trace(straight), trace(config))
    state = json.loads((Path(base.run.dir) / "alone" / "checkpoints" / "latest" / "trainer.json").read_text())
    assert state["world_size"] == 1


def test_a_users_error_is_not_retried(cluster: Cluster, base: Config) -> None:
    job = cluster.submit([SCRIPT, "optim.learning_rate=1"], variables(base))
    ended = cluster.wait_for(job, "FAILED", "COMPLETED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    assert "optim.learning_rate" in log_of(base)


def test_plain_sbatch_from_the_directory_of_the_scripts(cluster: Cluster, base: Config) -> None:
    config = replace(base, train=replace(base.train, max_steps=4))
    log = Path(config.run.dir) / "job.log"
    options = f"--nodes=1 --gpus-per-node=0 --cpus-per-task=1 --time=30 --output={log}"
    job = cluster.submit(["bash", "-c", f"cd {ROOT}/slurm && sbatch {options} mor_1b.sh"], variables(config))
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log.read_text()
    assert checkpoint_names(config) == ["latest", "step_00000004"]


def test_missing_data_ends_a_job_before_it_starts_processes(cluster: Cluster, base: Config) -> None:
    job = cluster.submit([SCRIPT, "data.train=[nowhere]"], variables(base))
    assert cluster.wait_for(job, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert "(node 0 of the job): the run can't start here: see above" in log_of(base)
    assert "nowhere.idx doesn't exist" in log_of(base)
    assert not [*(Path(base.run.dir) / "logs").rglob("rank_*.log")]


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, base: Config) -> None:
    config = replace(base, train=replace(base.train, max_steps=100_000))
    job = cluster.submit([SCRIPT], variables(config))
    wait_for_steps(config, 3)
    cluster.cancel(job)
    cluster.wait_for(job, "CANCELLED")
    time.sleep(8)  # longer than Slurm waits before it restarts a job
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert "is requeued" not in log_of(config)


def test_the_number_of_starts_is_bounded(cluster: Cluster, base: Config) -> None:
    config = replace(base, train=replace(base.train, max_steps=100_000))
    job = cluster.submit([SCRIPT], variables(config, MAX_REQUEUES="0"))
    wait_for_steps(config, 3)
    cluster.signal(job, "USR1")
    assert cluster.wait_for(job, "FAILED")["ExitCode"] == "75:0"
    assert "isn't requeued" in log_of(config)


def test_a_sweep_trains_one_run_for_each_line(cluster: Cluster, base: Config) -> None:
    directory = Path(base.run.dir)
    (directory / "rates.txt").write_text("# learning rates\noptim.lr=1e-3\n\noptim.lr=2e-3 run.name=faster\n")
    short = replace(base, train=replace(base.train, max_steps=8))
    sweep = [ROOT / "slurm" / "sweep.sh", directory / "rates.txt", SCRIPT, "run.seed=1"]
    job = cluster.submit(sweep, variables(short, NODES="1", PROCESSES="2"))  # two tasks of one srun
    for task in ("1", "2"):
        cluster.wait_for(f"{job}_{task}", "COMPLETED")
    rates = [trace(named(short, name)).steps[2]["train/lr"] for name in ("tiny_rates_1", "faster")]
    assert rates == [1e-3, 2e-3]
    assert len([*(directory / "logs").rglob("rank_1.log")]) == 2, "each run has two processes on its node"


def rank_logs(config: Config) -> str:
    """The output of the ranks."""
    return "".join(file.read_text() for file in (Path(config.run.dir) / "logs").rglob("node_*/**/*.log"))
