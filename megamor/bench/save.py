"""What saving a checkpoint costs a training run: blocking, and while training continues.

The stall is the time in which no step can run. An asynchronous save also slows down the steps beside it; `added` is all
the time that was lost. Files go through the whole commit protocol, from one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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
    one = replace(config.train, global_batch_size=config.train.micro_batch_size)  # a step is one micro-batch
    config = replace(config, parallel=ParallelConfig("single"), train=one)
    times: dict[str, list[Times]] = {kind: [] for kind in KINDS}
    with TemporaryDirectory(dir=args.directory) as directory:
        training = Training(config, World(0, 1, 0, device), build_model(config, device=device))
        manager, background = CheckpointManager(Path(directory), keep_last=1), BackgroundSave()
        training.window(at_least=2)
        for index in range(args.rounds):
            for kind in rotated(KINDS, index):
                times[kind].append(train_and_save(kind, args.steps, training, manager, background))
        size = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    seconds = {kind: quartiles([found.seconds for found in times[kind]])["median"] for kind in KINDS}
    report |= {
        "config": config_to_dict(config),
        "parameters": training.num_parameters,
        "checkpoint_bytes": size,
        "steps": args.steps,
        "rounds": args.rounds,
        "step_seconds": seconds["none"] / args.steps,
    }
    for kind in KINDS[1:]:
        stalls = quartiles([found.stall for found in times[kind]])
        report[kind] = {"stall_seconds": stalls, "added_seconds": seconds[kind] - seconds["none"]}
    written = quartiles([found.written_after for found in times["asynchronous"]])
    report["asynchronous"]["written_after_seconds"] = written
    save()


class Times(NamedTuple):
    """Seconds of some steps with a save, of the time in which none could run, and until the save was published."""

    seconds: float
    stall: float
    written_after: float


def train_and_save(
    kind: str, steps: int, training: Training, manager: CheckpointManager, background: BackgroundSave
) -> Times:
    """Train `steps` steps with a save of `kind` after the first, and wait for it at the end."""
    published = 0.0

    def publish(step: int, write: Callable[[Path], None]) -> Path:
        nonlocal published
        path = manager.save(step, [write], {})
        published = time.perf_counter()
        return path

    started = time.perf_counter()
    training.window()
    before = time.perf_counter()
    if kind == "blocking":
        publish(training.number, training.backend.save)
    elif kind == "asynchronous":
        write = partial(write_state, tensors=training.backend.copy_state())
        background.start(partial(publish, training.number, write))
    after = time.perf_counter()
    # Each window waits for the device, so that a stall has no steps in it that were only queued.
    training.window(at_least=steps - 1)
    trained = time.perf_counter()
    background.wait()
    ended = time.perf_counter()
    return Times(ended - started, after - before + ended - trained, published - before)


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
