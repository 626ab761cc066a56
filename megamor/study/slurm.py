"""Submit a study as arrays of Slurm jobs: first the tuning of all arms, then their runs, then the results."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from megamor.errors import EXIT_INTERRUPTED, ConfigError
from megamor.files import replace_file
from megamor.study.jobs import Job, jobs_of, read_result
from megamor.study.spec import Study

_SCRIPT = """#!/bin/bash
# Jobs of the study {name}. Slurm asks a run to save five minutes before its time is over, and queues it again.
#SBATCH --job-name={name}_{kind} --output={logs}/{kind}_%A_%a.log --open-mode=append --requeue --signal=USR1@300
names=({names})
srun {python} -m megamor study {command}
status=$?
if [ $status = {interrupted} ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi
exit $status
"""


def submit(study: Study, root: Path, options: str) -> str:
    """Submit what isn't finished, with further `options` of sbatch; returns a line for each array.

    Raises:
        ConfigError: sbatch isn't there, or refuses.
    """
    root = root.resolve()
    unfinished = [job for job in jobs_of(study) if read_result(root, job.name) is None]
    phases = {
        "tune": [job for job in unfinished if job.is_tuning],
        "train": [job for job in unfinished if not job.is_tuning and job.arm.of is None],
        "evaluate": [job for job in unfinished if job.arm.of is not None],
    }
    lines, after = [], ""
    for kind, jobs in phases.items():
        if jobs:
            after = _sbatch(study, root, kind, jobs, options, after)
            lines.append(f"{kind}: {len(jobs)} jobs, array {after}")
    number = _sbatch(study, root, "report", [], options, after)
    return "\n".join([*lines, f"report: job {number}; results will be in {root}"])


def _sbatch(study: Study, root: Path, kind: str, jobs: list[Job], options: str, after: str) -> str:
    """Submit one array, or the report; returns its number."""
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    common = f"{shlex.quote(str(study.file.resolve()))} --out {shlex.quote(str(root.parent))} --seeds {study.seeds}"
    command = f'job {common} "${{names[$SLURM_ARRAY_TASK_ID]}}"' if jobs else f"report {common}"
    script = root / f"{kind}.sh"
    text = _SCRIPT.format(
        kind=kind,
        name=study.name,
        logs=logs,
        names=" ".join(job.name for job in jobs),
        python=shlex.quote(sys.executable),
        command=command,
        interrupted=EXIT_INTERRUPTED,
    )
    replace_file(script, text)
    words = ["sbatch", "--parsable", *shlex.split(options)]
    words += [f"--array=0-{len(jobs) - 1}"] if jobs else []
    # With `afterok`, a failed run would leave the rest waiting indefinitely.
    words += [f"--dependency=afterany:{after}"] if after else []
    try:
        done = subprocess.run([*words, str(script)], check=True, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("--slurm: there is no sbatch on this machine; run the study without it") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"--slurm: sbatch refused: {error.stderr.strip()}") from error
    return done.stdout.strip().partition(";")[0]
