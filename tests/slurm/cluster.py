"""A temporary Slurm cluster: a controller and two nodes on this machine, without systemd, in one directory.

with Cluster(directory) as cluster:
    job = cluster.submit([ROOT / "slurm" / "mor_135m.sh"], env)
    cluster.wait_for(job, "COMPLETED")
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from tests.distributed.harness import free_port

T = TypeVar("T")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
NODES = ("n1", "n2")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
SETTINGS = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MailProg=/bin/true
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Stops the daemons from using control groups.
CGROUPS = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


class Cluster:
    """A context manager that starts the cluster and ends all its processes. Keep `base` short: it holds sockets."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(base / "slurm.conf")}

    def __enter__(self) -> Cluster:
        self.base.mkdir(parents=True, exist_ok=True)
        self._configure()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def submit(self, command: Sequence[str | Path], env: Mapping[str, str]) -> str:
        """Run a command that calls sbatch; returns the job's number."""
        printed = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True)
        found = re.search(r"Submitted batch job (\d+)", printed.stdout)
        assert found is not None, printed.stdout + printed.stderr
        return found.group(1)

    def job(self, number: str) -> dict[str, str]:
        """The controller's description of a job, or of an array's task such as `5_2`."""
        text = self._run("scontrol", "--oneliner", "show", "job", number)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait_for(self, number: str, *states: str, timeout: float = 180.0) -> dict[str, str]:
        """Wait until the job is in one of `states`."""
        return wait_until(
            lambda: job if (job := self.job(number))["JobState"] in states else None, f"job {number} {states}", timeout
        )

    def signal(self, number: str, name: str) -> None:
        """Signal a job's script, as Slurm does before the time limit."""
        self._run("scancel", f"--signal={name}", "--batch", number)

    def signal_steps(self, number: str, name: str) -> None:
        """Signal what a job's script started, as Slurm does where `--signal` doesn't name the script."""
        self._run("scancel", f"--signal={name}", number)

    def cancel(self, number: str) -> None:
        """Cancel a job as a user does."""
        self._run("scancel", number)

    def _run(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout

    def _configure(self) -> None:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 RealMemory=4000"
            for name in NODES
        )
        settings = SETTINGS.format(base=self.base, host=host, user=user, nodes=nodes, controller_port=free_port())
        (self.base / "slurm.conf").write_text(settings)
        (self.base / "cgroup.conf").write_text(CGROUPS)
        for directory in ("state", *(f"spool.{name}" for name in NODES)):
            (self.base / directory).mkdir(exist_ok=True)
        key = self.base / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)

    def _start(self) -> None:
        self._run(
            "munged",
            "--force",
            f"--key-file={self.base / 'munge.key'}",
            f"--socket={self.base / 'munge.socket'}",
            f"--pid-file={self.base / 'munged.pid'}",
            f"--log-file={self.base / 'munged.log'}",
            f"--seed-file={self.base / 'munge.seed'}",
        )
        self._run("slurmctld", "-c")
        for name in NODES:
            self._run("slurmd", "-N", name)
        idle = [f"{name} idle" for name in NODES]
        wait_until(
            lambda: self._run("sinfo", "-h", "-N", "-o", "%N %t").split("\n")[: len(idle)] == idle, "nodes", 30.0
        )

    def _stop(self) -> None:
        """End all jobs and daemons, by the process ids in the daemons' pid files."""
        self._end_jobs()
        subprocess.run(["scontrol", "shutdown"], env=self.env, capture_output=True)
        daemons = [int(file.read_text()) for file in self.base.glob("*.pid")]
        deadline = time.monotonic() + 10.0
        while any(map(_runs, daemons)) and time.monotonic() < deadline:
            for file in self.base.glob("munged.pid"):
                _signal(int(file.read_text()), signal.SIGTERM)
            time.sleep(0.1)
        for daemon in filter(_runs, daemons):
            _signal(daemon, signal.SIGKILL)

    def _end_jobs(self) -> None:
        """End the processes of jobs, which outlive the daemons."""
        command, deadline = ["scancel", "--full", f"--user={getpass.getuser()}"], time.monotonic() + 20.0
        while subprocess.run(["squeue", "--noheader"], env=self.env, capture_output=True).stdout.strip():
            subprocess.run(command, env=self.env, capture_output=True)
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)


def wait_until(condition: Callable[[], T | None], what: str, timeout: float = 180.0) -> T:
    """Poll until the answer is true, and return it."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain: {what}"
        time.sleep(0.1)
    return answer


def _runs(pid: int) -> bool:
    """Whether a process exists and isn't a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
