"""What saving a checkpoint costs a training run: blocking, and while training continues.

A round trains some steps without a save, with a blocking save after the first, and with an asynchronous one, in turns.
The stall is the time in which no step can run. An asynchronous save also slows down the steps beside it, by the
processors and the disk that it uses; `added` is all the time that a round lost. Files go through the whole commit
protocol (checksums, fsync), from one process, with weights and AdamW's moments in fp32.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megamor.bench.measure import Training
from megamor.bench.report import Column, Row, Table, device_name, number, provenance, quartiles, rotated, spread, text
from megamor.checkpoint import BackgroundSave, CheckpointManager
from megamor.checkpoint.state import write_state
from megamor.config import ParallelConfig, config_to_dict, load_config
from megamor.errors import ConfigError
from megamor.model import build_model
from megamor.parallel import World

SCHEMA = "megamor-bench-save/1"
SHORT = ("data.seq_len=128", "model.max_seq_len=128", "train.micro_batch_size=1", "train.precision=fp32")
"""A CPU's step is long enough with one short sequence."""
KINDS = ("none", "blocking", "asynchronous")


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Train and save in a temporary directory.

    Raises:
        ConfigError: too few steps or rounds.
    """
    if args.steps < 2 or args.rounds < 1:
        raise ConfigError(f"--steps {args.steps} --rounds {args.rounds}: give at least 2 and 1")
    device = torch.device(args.device)
    config = load_config(args.config, [*(SHORT if device.type == "cpu" else ()), *args.overrides])
    config = replace(config, parallel=ParallelConfig("single"))
    with TemporaryDirectory(dir=args.directory) as directory:
        training = Training(config, World(0, 1, 0, device), build_model(config, device=device))
        rounds = Rounds(training, CheckpointManager(Path(directory), keep_last=1))
        training.window(at_least=2)
        for index in range(args.rounds):
            for kind in rotated(KINDS, index):
                rounds.train_and_save(kind, args.steps)
        size = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    report |= {
        "config": config_to_dict(config),
        "parameters": training.num_parameters,
        "checkpoint_bytes": size,
        "steps": args.steps,
        "rounds": args.rounds,
        **rounds.summary(args.steps),
    }
    save()


class Rounds:
    """Trains and saves, and keeps the times of all rounds by kind of save."""

    def __init__(self, training: Training, manager: CheckpointManager) -> None:
        self.training, self.manager = training, manager
        self.background = BackgroundSave()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.stalls: dict[str, list[float]] = defaultdict(list)
        self.written_after: list[float] = []
        self.published = 0.0

    def train_and_save(self, kind: str, steps: int) -> None:
        """Train `steps` steps with a save of `kind` after the first, and wait for it at the end."""
        started = time.perf_counter()
        self.training.window()
        before = time.perf_counter()
        if kind == "blocking":
            self.manager.save(self.training.number, [self.training.backend.save], {})
        elif kind == "asynchronous":
            write = partial(write_state, tensors=self.training.backend.copy_state())
            self.background.start(partial(self._publish, self.training.number, write))
        after = time.perf_counter()
        # Each window waits for the device, so that a stall has no steps in it that were only queued.
        self.training.window(at_least=steps - 1)
        trained = time.perf_counter()
        self.background.wait()
        ended = time.perf_counter()
        self.seconds[kind].append(ended - started)
        self.stalls[kind].append(after - before + ended - trained)
        if kind == "asynchronous":
            self.written_after.append(self.published - before)

    def _publish(self, step: int, write: Callable[[Path], None]) -> Path:
        path = self.manager.save(step, [write], {})
        self.published = time.perf_counter()
        return path

    def summary(self, steps: int) -> dict[str, Any]:
        """The fields of the report that depend on the times."""
        seconds = {kind: quartiles(self.seconds[kind])["median"] for kind in KINDS}
        found: dict[str, Any] = {"step_seconds": seconds["none"] / steps}
        for kind in KINDS[1:]:
            added = seconds[kind] - seconds["none"]
            found[kind] = {"stall_seconds": quartiles(self.stalls[kind]), "added_seconds": added}
        found["asynchronous"]["written_after_seconds"] = quartiles(self.written_after)
        return found


def tables(report: Row) -> Iterator[Table]:
    """One row for each kind of save."""
    columns = (
        Column("save", text("kind"), left=True),
        Column("stall, s (quartiles)", spread("stall_seconds", ".2f")),
        Column("added, s", number("added_seconds", ".2f")),
        Column("complete after, s", number("written_after_seconds.median", ".1f")),
    )
    title = (
        f"Saving {report['parameters'] / 1e6:.0f}M parameters, {report['checkpoint_bytes'] / 1e9:.2f} GB with AdamW's "
        f"moments, beside steps of {report['step_seconds']:.2f} s; {device_name(report)}; {report['rounds']} rounds of "
        f"{report['steps']} steps, {provenance(report, 'torch')}."
    )
    yield Table(columns, [{"kind": kind, **report[kind]} for kind in KINDS[1:]], title)
