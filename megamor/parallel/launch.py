"""What launchers other than torchrun say about the processes of a run: srun, and mpirun of Open MPI, MPICH and others.

They start several processes and describe them in variables of their own. Without those, each process would train a run
of its own. So the variables are translated to torchrun's, or the launch is refused.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Mapping

from megamor.errors import ConfigError

log = logging.getLogger("megamor.parallel")

# Each launcher's variables for WORLD_SIZE, RANK, LOCAL_RANK, and how many processes the machine has. The order matters:
# mpirun starts daemons with srun, so its processes also see Slurm's variables, which describe those daemons.
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_SLURM = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),  # of a step, where only some variables were passed on
)
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")


def launch_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun (RANK, WORLD_SIZE, …) that another launcher implies and `env` lacks.

    Raises:
        ConfigError: this is one of several processes, but not which one, or not where they meet.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return {}
    # sbatch's script and salloc's shell are one process each, whatever the number of tasks.
    in_step = "SLURM_STEP_ID" in env or not {"SLURM_JOB_ID", "SLURM_SUBMIT_DIR"} <= env.keys()
    names = next((names for names in (*_MPI, *(_SLURM if in_step else ())) if names[0] in env), None)
    if names is None or env[names[0]] == "1":
        if env.get("SLURM_NTASKS", "1") != "1" and not in_step and "WORLD_SIZE" not in env:
            log.warning("srun didn't start this process, so it trains alone, on one of %s tasks", env["SLURM_NTASKS"])
        return {}
    size, rank = env[names[0]], env.get(names[1], "")
    local = env.get(names[2]) or env.get("SLURM_LOCALID", "")
    found = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": local}
    if not all(value.isdecimal() for value in found.values()) or "SLURM_PTY_PORT" in env:
        raise ConfigError(
            f"{names[0]} is {size}, but nothing says which of several processes this is ({names[1]}, {names[2]}): "
            "start them with srun (without --pty), torchrun or megamor launch; for one alone set WORLD_SIZE=1 RANK=0"
        )
    if env.get("WORLD_SIZE", size) != size:
        raise ConfigError(f"WORLD_SIZE is {env['WORLD_SIZE']}, but {names[0]} is {size}: unset WORLD_SIZE")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    # Slurm's list looks like 8(x4); on nodes with different numbers no group can be a node.
    tasks = re.sub(r"\(x\d+\)$", "", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    per_node = env.get(names[3], "") if names[3] else tasks
    if per_node.isdecimal():
        found["LOCAL_WORLD_SIZE"] = per_node
    if env.get(names[3]) == size or env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES")) == "1":
        found["MASTER_ADDR"] = "127.0.0.1"
    elif nodes:
        found["MASTER_ADDR"] = first_node(nodes)
    elif "MASTER_ADDR" not in env:
        raise ConfigError(f"{names[0]} is {size}, and MASTER_ADDR isn't set: set it to the machine of rank 0")
    # Differs between jobs and between the steps of a job, which may run on one node at the same time.
    port = 20000 + zlib.crc32(" ".join(env.get(name, "") for name in _JOB).encode()) % 12000
    return {name: value for name, value in {**found, "MASTER_PORT": str(port)}.items() if name not in env}


def first_node(nodes: str) -> str:
    """The first name of Slurm's list of nodes, such as `gpu07` of `gpu[07-09,12],cpu1`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def adopt_launch() -> None:
    """Set the variables that `launch_variables` finds, so that torch and DeepSpeed see them too."""
    os.environ.update(launch_variables(os.environ))
