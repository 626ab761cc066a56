"""Measure what saving a checkpoint costs a training run: blocking, and while training goes on.

examples:
  megamor bench save --json benchmarks/results/save_mine.json
  megamor bench save --config configs/mor_360m.yaml --rounds 3 --directory /scratch data.seq_len=512

A round trains `--steps` steps without a save, with a blocking save after the first, and with an asynchronous one, in
turns. The stall is the time in which no step can run; an asynchronous save also slows the steps beside it, by what it
takes of processors and disk, and that is measured too: `added` is all the time that a round lost. The files go through
the whole commit protocol (checksums, fsync); one process, model and AdamW's moments in fp32. On a CPU, steps are of one
sequence of 128 tokens unless overrides say something else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megamor.bench.cases import make_batch
from megamor.bench.origin import describe_origin
from megamor.bench.train import quartiles
from megamor.checkpoint import BackgroundSave, CheckpointManager
from megamor.config import Config, ParallelConfig, config_to_dict, load_config
from megamor.errors import ConfigError, user_errors
from megamor.model import build_model
from megamor.optim import build_adamw
from megamor.parallel import Backend, World, build_backend

SCHEMA = "megamor-bench-save/1"
SHORT = ("data.seq_len=128", "model.max_seq_len=128", "train.micro_batch_size=1", "train.precision=fp32")
"""A CPU's step is long enough with one short sequence."""
KINDS = ("none", "blocking", "asynchronous")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench save", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--config", default="configs/vanilla_135m.yaml", metavar="FILE", help="the model")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of each part of a round (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often (default: 3)")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where checkpoints go (default: the system's)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    return parser.parse_intermixed_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: torch sees no CUDA device; leave it out or install a CUDA build")
    if args.steps < 2 or args.rounds < 1:
        raise ConfigError(f"--steps {args.steps} --rounds {args.rounds}: give at least 2 and 1")
    config = load_config(args.config, [*(SHORT if device.type == "cpu" else ()), *args.overrides])
    config = replace(config, parallel=ParallelConfig("single"))
    origin = describe_origin(device)
    with TemporaryDirectory(dir=args.directory) as directory:
        measured = measure(config, device, Path(directory), args.steps, args.rounds)
    report = {
        "schema": SCHEMA,
        "command": shlex.join(["megamor", "bench", "save", *(argv or ())]),
        **origin,
        "config": config_to_dict(config),
        **measured,
    }
    print_report(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.json}")


def measure(config: Config, device: torch.device, directory: Path, steps: int, rounds: int) -> dict[str, Any]:
    """The fields of benchmarks/README.md but those that say where it was measured."""
    world = World(0, 1, 0, device)
    backend = build_backend(build_model(config), config, world, lambda module: build_adamw(module, config.optim))
    manager = CheckpointManager(directory, keep_last=1)
    bench = SaveBench(backend, config, manager)
    bench.train(2)  # warm-up
    for number in range(rounds):
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            bench.run(kind, steps)
    seconds = {kind: quartiles(bench.seconds[kind]) for kind in KINDS}
    return {
        "parameters": sum(parameter.numel() for parameter in backend.module.parameters()),
        "checkpoint_bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "steps": steps,
        "rounds": rounds,
        "step_seconds": seconds["none"]["median"] / steps,
        "blocking": {
            "stall_seconds": quartiles(bench.stalls["blocking"]),
            "added_seconds": seconds["blocking"]["median"] - seconds["none"]["median"],
        },
        "asynchronous": {
            "stall_seconds": quartiles(bench.stalls["asynchronous"]),
            "written_after_seconds": quartiles(bench.written_after),
            "added_seconds": seconds["asynchronous"]["median"] - seconds["none"]["median"],
        },
    }


class SaveBench:
    """Trains and saves, and keeps the times of the parts of all rounds by kind."""

    def __init__(self, backend: Backend, config: Config, manager: CheckpointManager) -> None:
        self.backend, self.config, self.manager = backend, config, manager
        self.background = BackgroundSave()
        self.number = 0
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.stalls: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.written_after: list[float] = []
        self.published = 0.0

    def run(self, kind: str, steps: int) -> None:
        """`steps` steps with a save of `kind` after the first; what is left of it at the end is waited for."""
        started = time.perf_counter()
        self.train(1)
        before = time.perf_counter()
        self.save(kind)
        after = time.perf_counter()
        self.train(steps - 1)
        trained = time.perf_counter()
        self.background.wait()
        ended = time.perf_counter()
        self.seconds[kind].append(ended - started)
        self.stalls[kind].append(after - before + ended - trained)
        if kind == "asynchronous":
            self.written_after.append(self.published - before)

    def save(self, kind: str) -> None:
        """Begin a save, and end it unless it is asynchronous."""
        if kind == "blocking":
            self.manager.save(self.number, [self.backend.save], {})
        elif kind == "asynchronous":
            write = partial(self.backend.copy_state().write, group=None)
            self.background.start(partial(self._publish, write))

    def _publish(self, write: Any) -> Path:
        path = self.manager.save(self.number, [write], {})
        self.published = time.perf_counter()
        return path

    def train(self, steps: int) -> None:
        """Steps on random tokens with a learning rate of 0, until the device has done them."""
        for _ in range(steps):
            self.number += 1
            inputs, labels = make_batch(self.config, self.number, self.backend.device)
            with self.backend.forward_context():
                loss = self.backend.model(inputs, labels, mode="train", step=0).loss_sum / labels.numel()
            self.backend.backward(loss, last_micro_batch=True)
            self.backend.set_lr(0.0)
            self.backend.step(1.0)
        if self.backend.device.type == "cuda":
            torch.cuda.synchronize()


def print_report(report: dict[str, Any]) -> None:
    """One table."""
    size = f"{report['parameters'] / 1e6:.0f}M parameters, {report['checkpoint_bytes'] / 1e9:.2f} GB"
    table = Table(title=f"saving a checkpoint of {size}, {report['rounds']} rounds of {report['steps']} steps")
    for heading in ("save", "stall s", "quartiles", "added s", "written after s"):
        table.add_column(heading, justify="left" if heading == "save" else "right")
    for kind in KINDS[1:]:
        stall, written = report[kind]["stall_seconds"], report[kind].get("written_after_seconds")
        table.add_row(
            kind,
            f"{stall['median']:.2f}",
            f"{stall['q1']:.2f}–{stall['q3']:.2f}",
            f"{report[kind]['added_seconds']:.2f}",
            f"{written['median']:.2f}" if written else "",
        )
    Console().print(table)
    print(f"a step takes {report['step_seconds']:.2f} s")
