"""Check that a run resumes bitwise on this machine: N steps at once against N/2 steps, a restart, and N/2 more.

examples:
  megamor verify-resume --config configs/quickstart.yaml
  megamor verify-resume --config configs/mor_360m.yaml --processes 8 --steps 6 parallel.backend=fsdp2
  megamor verify-resume --config configs/mor_135m.yaml --processes 2 train.global_batch_size=8 \\
      train.micro_batch_size=2 checkpoint.asynchronous=true

Only the number of steps differs from your run: model, data, batch, backend and precision are the same, and so is the
learning-rate schedule. If steps take long, use a smaller batch (as in the last example). Each run starts new processes
and writes below --dir, which is deleted afterwards unless --keep is given. Compared are every metric of every step
(loss, gradient norm, depths, learning rate) and every bit of weights and moments at the end. Exit status 0 if all are
equal, 2 otherwise.

A difference means that something isn't restored, or that your settings compute differently each time (a GPU kernel that
isn't deterministic). To tell which, run it with --again: it compares two runs without a restart.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamor.cli import command_parser
from megamor.errors import ConfigError, TrainingError, user_errors

if TYPE_CHECKING:
    from torch import Tensor

CLOCK_METRICS = ("time", "throughput/", "memory/")
"""Prefixes of metrics that depend on the clock and the machine."""


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train twice and compare.

    Raises:
        SystemExit: status 2 if the runs differ, or one of them fails.
    """
    parser = command_parser("verify-resume", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, as for megamor pretrain")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's configuration")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="total steps, at least 2 (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="on this machine (default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="working directory (default: a new one in the system's)"
    )
    parser.add_argument("--keep", action="store_true", help="keep both runs' directories")
    parser.add_argument("--again", action="store_true", help="don't restart: check whether a run repeats exactly")
    args = parser.parse_intermixed_args(argv)
    if args.steps < 2:
        raise ConfigError(f"--steps {args.steps}: give at least 2, one before the restart and one after it")

    from megamor.config import load_config

    load_config(args.config, args.overrides, args.processes)  # report its errors once, before processes start
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="verify_resume_", dir=args.dir))
    half = args.steps // 2
    try:
        train(args, directory, "straight", args.steps)
        if not args.again:
            train(args, directory, "restarted", half)
        train(args, directory, "restarted", args.steps)
        faults = [*differences(directory / "straight", directory / "restarted")]
    finally:
        if args.keep:
            print(f"both runs are in {directory}")
        else:
            shutil.rmtree(directory)
    what = (
        f"two runs of {args.steps} steps"
        if args.again
        else f"{args.steps} steps and {half} + {args.steps - half} steps"
    )
    if faults:
        raise TrainingError("\n  ".join([f"{what} differ:", *faults[:20], *(["..."] if len(faults) > 20 else [])]))
    print(f"{what} are the same to the last bit")


def train(args: argparse.Namespace, directory: Path, name: str, stop: int) -> None:
    """Train the run `name` up to step `stop`, in new processes.

    Raises:
        TrainingError: a process exited with an error.
    """
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    settings = [f"run.dir={directory}", f"run.name={name}", f"train.stop_at_step={stop}", "metrics.wandb=false"]
    command += ["-m", "megamor", "pretrain", "--config", str(args.config)]
    print(f"{name}: until step {stop}", flush=True)
    status = subprocess.run([*command, *args.overrides, *settings, "metrics.log_every=1"], check=False).returncode
    if status != 0:
        raise TrainingError(f"training exited with status {status}; its messages are above")


def differences(straight: Path, restarted: Path) -> Iterator[str]:
    """What differs between the directories of two runs, one line for each difference."""
    from megamor.checkpoint import iterate_state, open_checkpoint
    from megamor.metrics import read_jsonl

    yield from differing_metrics(*(read_jsonl(run / "metrics.jsonl") for run in (straight, restarted)))
    last = [open_checkpoint(run) for run in (straight, restarted)]
    if last[0].step != last[1].step:
        yield f"the last checkpoint is at step {last[1].step} instead of {last[0].step}"
        return
    yield from differing_tensors(*(dict(iterate_state(checkpoint.directory)) for checkpoint in last))


def differing_metrics(straight: Sequence[Mapping[str, Any]], restarted: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Metrics that differ, by step."""
    # A step can have two records: training's and evaluation's.
    found = {(record["step"], "train/loss" in record): record for record in restarted}
    for record in straight:
        other = found.get((record["step"], "train/loss" in record))
        if other is None:
            yield f"step {record['step']} is missing"
            continue
        for name, value in record.items():
            if not name.startswith(CLOCK_METRICS) and other.get(name) != value:
                yield f"step {record['step']}: {name} is {other.get(name)} instead of {value}"


def differing_tensors(straight: Mapping[str, Tensor], restarted: Mapping[str, Tensor]) -> Iterator[str]:
    """Weights and moments that differ."""
    for name, tensor in straight.items():
        if name not in restarted:
            yield f"{name} is missing"
        elif not tensor.equal(restarted[name]):
            off = (tensor.double() - restarted[name].double()).abs()
            yield f"{name} differs in {int(off.count_nonzero())} of {off.numel()} values, by at most {off.max():.3g}"
    yield from (f"{name} exists only after the restart" for name in restarted if name not in straight)


if __name__ == "__main__":
    main()
