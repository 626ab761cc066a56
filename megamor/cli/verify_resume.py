"""Check on this machine that a run of yours resumes bitwise: N steps in one go against N/2, a restart, and N/2 more.

examples:
  megamor verify-resume --config configs/quickstart.yaml
  megamor verify-resume --config configs/mor_360m.yaml --processes 8 --steps 6 parallel.backend=fsdp2
  megamor verify-resume --config configs/mor_135m.yaml --processes 2 train.global_batch_size=8 \\
      train.micro_batch_size=2 checkpoint.asynchronous=true

The run is yours in everything but its length: model, data, batch, backend, precision. Shrink the batch by overrides if
steps take long; the schedule isn't shortened. Both runs are launched as yours would be, in new processes, below --dir,
which is removed afterwards (kept with --keep). Compared are every figure of every step (loss, gradient norm, depths,
learning rate) and every bit of weights and moments at the end. Exit status 0 if all are equal, 2 otherwise.

A difference means that something isn't restored, or that your setting computes differently each time (a GPU kernel
that isn't deterministic): run it with --again, which compares two runs in one go instead.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamor.checkpoint import iterate_state, open_checkpoint
from megamor.config import load_config
from megamor.errors import ConfigError, TrainingError, user_errors
from megamor.metrics import read_jsonl

PRETRAIN = Path(__file__).resolve().parents[2] / "pretrain.py"
OF_THE_MOMENT = ("time", "throughput/", "memory/")
"""Metrics that depend on the clock and the machine."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="verify_resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, as for pretrain.py")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's configuration")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="how many in all, at least 2 (default: 4)")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="on this machine (default: 1)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where to work (default: a new one under the system's)")
    parser.add_argument("--keep", action="store_true", help="leave both runs there")
    parser.add_argument("--again", action="store_true", help="don't restart: is the run the same when run twice?")
    return parser.parse_intermixed_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    if args.steps < 2:
        raise ConfigError(f"--steps {args.steps}: give at least 2, one before the restart and one after it")
    load_config(args.config, args.overrides, args.processes)  # reports errors before processes start
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="verify_resume_", dir=args.dir))
    half = args.steps // 2
    try:
        launch(args, directory, "straight", args.steps)
        if not args.again:
            launch(args, directory, "restarted", half)
        launch(args, directory, "restarted", args.steps)
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


def launch(args: argparse.Namespace, directory: Path, name: str, stop: int) -> None:
    """Train until step `stop` under `directory`/`name`, in new processes.

    Raises:
        TrainingError: they left with an error.
    """
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    settings = [f"run.dir={directory}", f"run.name={name}", f"train.stop_at_step={stop}", "metrics.wandb=false"]
    command += [str(PRETRAIN), "--config", str(args.config), *args.overrides, *settings, "metrics.log_every=1"]
    print(f"{name}: until step {stop}", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise TrainingError(f"the launch left with status {status}; its messages are above")


def differences(straight: Path, restarted: Path) -> Iterator[str]:
    """What differs between two runs' directories, a line each."""
    yield from differing_metrics(*(read_jsonl(run / "metrics.jsonl") for run in (straight, restarted)))
    last = [open_checkpoint(run) for run in (straight, restarted)]
    if last[0].step != last[1].step:
        yield f"the last checkpoint is of step {last[1].step} instead of {last[0].step}"
        return
    yield from differing_tensors(*(dict(iterate_state(checkpoint.directory)) for checkpoint in last))


def differing_metrics(straight: Sequence[Mapping[str, Any]], restarted: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Figures that differ, by step."""
    found = {(record["step"], "train/loss" in record): record for record in restarted}
    for record in straight:
        other = found.get((record["step"], "train/loss" in record))
        if other is None:
            yield f"step {record['step']} is missing"
            continue
        for name, value in record.items():
            if not name.startswith(OF_THE_MOMENT) and other.get(name) != value:
                yield f"step {record['step']}: {name} is {other.get(name)} instead of {value}"


def differing_tensors(straight: Mapping[str, Tensor], restarted: Mapping[str, Tensor]) -> Iterator[str]:
    """Weights and moments that differ."""
    for name, tensor in straight.items():
        if name not in restarted:
            yield f"{name} is missing"
        elif not torch.equal(tensor, restarted[name]):
            off = (tensor.double() - restarted[name].double()).abs()
            yield f"{name} differs in {int(off.count_nonzero())} of {off.numel()} values, by at most {off.max():.3g}"
    yield from (f"{name} is there after the restart only" for name in restarted if name not in straight)


if __name__ == "__main__":
    main()
