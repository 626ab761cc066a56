"""Check on this machine that your run resumes bitwise: N steps without a break against N/2, a restart, and N/2 more.

examples:
  megamor verify-resume --config configs/quickstart.yaml
  megamor verify-resume --config configs/mor_360m.yaml --processes 8 --steps 6 parallel.backend=fsdp2
  megamor verify-resume --config configs/mor_135m.yaml --processes 2 train.global_batch_size=8 \\
      train.micro_batch_size=2 checkpoint.asynchronous=true

Model, data, batch, backend and precision are those of the configuration; only the number of steps differs. If steps
take long, make the batch smaller with overrides. The learning-rate schedule stays that of the whole run. Both runs
start in new processes and write to a new directory under --dir, which is removed at the end unless you give --keep.
They must agree in every metric of every step (loss, gradient norm, depths, learning rate) and in every bit of the
final weights and optimizer state. Exit status 0 if they do, 2 otherwise.

If they differ, either something isn't restored, or this machine computes a step differently each time (some GPU
kernels are not deterministic). --again tells which: it runs the same steps twice without a restart.
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
"""Prefixes of metrics that depend on the clock and the machine, and so may differ."""
MAX_DIFFERENCES_SHOWN = 20


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Train both runs, compare them, and print the result."""
    parser = command_parser("verify-resume", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, as for megamor pretrain")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's configuration")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps of each run, at least 2 (default: 4)")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="processes to train with (default: 1)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where to work (default: the system's temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep both runs' directories")
    parser.add_argument("--again", action="store_true", help="compare two runs without a restart")
    args = parser.parse_intermixed_args(argv)  # overrides may stand before, between or after the options

    from megamor.config import load_config

    if args.steps < 2:
        raise ConfigError(f"--steps {args.steps}: give at least 2, one before the restart and one after it")
    load_config(args.config, args.overrides, args.processes)  # reports errors before processes start
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="verify_resume_", dir=args.dir))
    half = args.steps // 2
    try:
        train_until(args, directory, "straight", args.steps)
        if not args.again:
            train_until(args, directory, "restarted", half)
        train_until(args, directory, "restarted", args.steps)
        found = [*differences(directory / "straight", directory / "restarted")]
    finally:
        if args.keep:
            print(f"both runs are in {directory}")
        else:
            shutil.rmtree(directory)
    restarted = f"{args.steps} steps and {half} + {args.steps - half} steps"
    compared = f"two runs of {args.steps} steps" if args.again else restarted
    if found:
        more = ["..."] if len(found) > MAX_DIFFERENCES_SHOWN else []
        raise TrainingError("\n  ".join([f"{compared} differ:", *found[:MAX_DIFFERENCES_SHOWN], *more]))
    print(f"{compared} are the same to the last bit")


def train_until(args: argparse.Namespace, directory: Path, name: str, stop: int) -> None:
    """Train in new processes, in `directory`/`name`, until step `stop`.

    Raises:
        TrainingError: a process failed.
    """
    from megamor.config import literal, override

    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    command += ["-m", "megamor", "pretrain", "--config", str(args.config), *args.overrides]
    command += [override("run.dir", literal(directory)), f"run.name={name}", f"train.stop_at_step={stop}"]
    command += ["metrics.wandb=false", "metrics.trackio=false", "metrics.log_every=1", "checkpoint.resume_step=null"]
    print(f"{name}: training until step {stop}", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise TrainingError(f"training exited with status {status}; its messages are above")


def differences(straight: Path, restarted: Path) -> Iterator[str]:
    """Yield a line for each difference between the two runs' metrics and last checkpoints."""
    from megamor.checkpoint import iterate_state, open_checkpoint
    from megamor.metrics import read_jsonl

    yield from differing_metrics(*(read_jsonl(run / "metrics.jsonl") for run in (straight, restarted)))
    last = [open_checkpoint(run) for run in (straight, restarted)]
    if last[0].step != last[1].step:
        yield f"the last checkpoint is of step {last[1].step} instead of {last[0].step}"
        return
    yield from differing_tensors(*(dict(iterate_state(checkpoint.directory)) for checkpoint in last))


def differing_metrics(straight: Sequence[Mapping[str, Any]], restarted: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each metric that differs, step by step."""
    # A step has two records, the training metrics and the validation metrics: told apart by the loss.
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
    """Yield a line for each tensor of weights or optimizer state that differs."""
    import torch

    for name, tensor in straight.items():
        if name not in restarted:
            yield f"{name} is missing"
        elif not torch.equal(tensor, restarted[name]):
            off = (tensor.double() - restarted[name].double()).abs()
            yield f"{name} differs in {int(off.count_nonzero())} of {off.numel()} values, by at most {off.max():.3g}"
    yield from (f"{name} is only there after the restart" for name in restarted if name not in straight)
