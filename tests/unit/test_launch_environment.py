"""Processes started by srun and mpirun form one world; what can't be told is refused; a batch script is one process."""

from __future__ import annotations

import logging

import pytest

from megamor.config import ParallelConfig
from megamor.errors import ConfigError
from megamor.parallel import init_world
from megamor.parallel.launch import first_node, launch_variables

# As Slurm 22.05 sets them.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/x", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
BATCH |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
STEP |= {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2"}
FEW = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OMPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
PMI = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}


def world(env: dict[str, str]) -> tuple[str, ...]:
    found = {**env, **launch_variables(env)}
    port = int(found["MASTER_PORT"])
    assert 20000 <= port < 32768
    return tuple(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


@pytest.mark.promise("R20")
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (STEP, ("3", "4", "1", "n1")),
        ({**STEP, "SLURM_STEP_NUM_NODES": "1"}, ("3", "4", "1", "127.0.0.1")),
        ({**STEP, "MASTER_ADDR": "10.0.0.1"}, ("3", "4", "1", "10.0.0.1")),
        ({**STEP, "WORLD_SIZE": "4"}, ("3", "4", "1", "n1")),
        ({**FEW, "SLURM_NNODES": "1"}, ("1", "2", "1", "127.0.0.1")),
        (OMPI, ("1", "2", "1", "127.0.0.1")),
        ({**STEP, **OMPI, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ("1", "2", "1", "127.0.0.1")),
        ({**PMI, "MASTER_ADDR": "h"}, ("1", "2", "0", "h")),
        ({**STEP, "PMI_SIZE": "4", "PMI_RANK": "3"}, ("3", "4", "1", "n1")),  # srun --mpi=pmi2
    ],
)  # fmt: skip
def test_the_world_that_a_launcher_describes(env: dict[str, str], expected: tuple[str, ...]) -> None:
    assert world(env) == expected


def test_the_processes_of_a_machine() -> None:
    found = [
        launch_variables(env).get("LOCAL_WORLD_SIZE")
        for env in (
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4"},
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1"},
            {**STEP, **OMPI, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
        )
    ]
    assert found == ["2", "4", None, "2"]


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"WORLD_SIZE": "8"},  # a dry run
        {**STEP, "RANK": "1", "WORLD_SIZE": "2"},  # torchrun in a step
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1 in a job of several tasks
        {**OMPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {**BATCH, "SLURM_NTASKS": "1"},
    ],
)
def test_where_nothing_is_missing_nothing_is_set(env: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert launch_variables(env) == {}
    assert caplog.text == ""


@pytest.mark.parametrize(
    "shell", [BATCH, {k: v for k, v in BATCH.items() if k != "SLURM_PROCID"}], ids=["sbatch", "salloc"]
)
def test_a_batch_script_is_one_process_and_says_so(shell: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert launch_variables(shell) == {}
    assert "trains alone, on one of 4 tasks" in caplog.text
    assert world({**shell, **OMPI}) == ("1", "2", "1", "127.0.0.1"), "unless mpirun started it"


@pytest.mark.promise("R20")
@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2, but nothing says which"),
        (FEW, "MASTER_ADDR isn't set"),
        ({**STEP, "SLURM_PTY_PORT": "1"}, "without --pty"),
        ({**STEP, "WORLD_SIZE": "1"}, "WORLD_SIZE is 1, but SLURM_STEP_NUM_TASKS is 4"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE is 2, but nothing says which"),
        (PMI, "MASTER_ADDR isn't set"),
    ],
)
def test_what_cannot_be_told_is_refused(env: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launch_variables(env)


def test_steps_and_jobs_meet_at_ports_of_their_own() -> None:
    ports = {
        launch_variables({**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})["MASTER_PORT"]
        for job in "78"
        for step in "01"
    }
    assert len(ports) == 4


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[07-09,12],cpu1", "gpu07"), ("r[1-2]n[3,5]", "r1n3"), ("a,b[1-2]", "a")],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_rank_outside_its_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="RANK is 1 in a world of 1"):
        init_world(ParallelConfig())
