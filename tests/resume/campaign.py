"""A run that is killed with SIGKILL over and over, restarted, and compared with one that was never disturbed.

    python -m tests.resume.campaign --kills 50 --backend fsdp2 --json report.json

Some kills happen at a chosen point of a save, others at a random time while a launch starts, restores, trains or saves.
One rank dies first and the others a little later, as under a launcher. After each kill the checkpoints are inspected
before the next launch cleans them up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from megamor.checkpoint import find_damage
from megamor.checkpoint.layout import LATEST, latest_step
from megamor.checkpoint.state import write_state
from megamor.config import CheckpointConfig, Config, ParallelConfig
from megamor.metrics import read_jsonl
from megamor.parallel import backend, init_world
from megamor.train import build_trainer, run_state
from tests.distributed.harness import start_ranks
from tests.distributed.runs import preload_deepspeed
from tests.resume.runs import directory_of, fit, named, repeatable, tiny_run, until

STAGES = (
    "started",
    "state",  # a rank has written its shard of the state
    "written",
    "manifest",
    "renamed",
    "latest",
    "verified",
    "expiring",
    "done",
)
ON_EVERY_RANK = frozenset({"started", "state", "written", "verified", "done"})
PATIENCE_SECONDS = 120.0
RESUMED_FROM = "resumed_from"
"""A file in which each launch records the step that it resumes from."""


@dataclass(frozen=True)
class Kill:
    """Where the next launch is killed: at `stage` of its `nth` save, or `seconds` after it has done `steps` steps.

    Without `steps`, `seconds` are counted from the start of the processes.
    """

    rank: int
    stage: str | None = None
    nth: int = 3
    seconds: float = 0.0
    steps: int = 0
    others_after: float = 0.0


@dataclass
class Report:
    """Result of a campaign. All but the first four figures must be zero.

    Attributes:
        kills: launches that died by SIGKILL, by kind.
        restarts: launches that resumed from a checkpoint.
        steps_compared: lines of metrics that were compared with the undisturbed run's.
        last_step: last step of the run.
        lost_steps: committed steps that a restart did not resume from, summed over kills.
        without_checkpoint: kills after the first commit that left no whole checkpoint where `latest` points.
        divergences: lines of metrics that differ in any bit.
    """

    kills: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    steps_compared: int = 0
    last_step: int = 0
    lost_steps: int = 0
    without_checkpoint: int = 0
    divergences: int = 0


class Campaign:
    """The killed run of `config`, on `world_size` processes, launch by launch."""

    def __init__(self, config: Config, world_size: int) -> None:
        self.config, self.world_size = config, world_size
        self.root = directory_of(config) / "checkpoints"
        self.resumed = self.root / RESUMED_FROM
        self.report = Report()
        self.seen: dict[int, dict[str, Any]] = {}

    def kill(self, kill: Kill) -> None:
        """Run one launch until `kill`, then inspect what it left."""
        committed = latest_step(self.root)
        ranks = start_ranks(_fit_until_killed, self.config, kill, world_size=self.world_size)
        processes = [process for process, _ in ranks]
        first = processes[kill.rank]
        if kill.stage is None:
            self._wait_for_steps(kill.steps, first)
            time.sleep(kill.seconds)
            first.kill()
        assert wait([first.sentinel], timeout=PATIENCE_SECONDS), f"{kill} did not happen"
        first.join()
        assert first.exitcode == -signal.SIGKILL, f"{kill}: the launch exited with {first.exitcode}"
        time.sleep(kill.others_after)
        for process, (_, receiver) in zip(processes, ranks, strict=True):
            process.kill()
            process.join()
            receiver.close()
        kind = kill.stage or ("in training" if kill.steps else "from the start on")
        self.report.kills[kind] = self.report.kills.get(kind, 0) + 1
        self._look(committed)

    def _wait_for_steps(self, count: int, process: ForkProcess) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        metrics = directory_of(self.config) / "metrics.jsonl"
        begun = None
        while count and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
            if self.resumed.exists():
                lines = metrics.read_bytes().count(b"\n")
                begun = lines if begun is None else begun
                if lines >= begun + count:
                    return

    def finish(self, steps: int) -> None:
        """Train `steps` more steps without a kill, then compare everything with a run that was never killed."""
        committed = latest_step(self.root)
        self.report.last_step = max([committed or 0, *self.seen]) + steps
        assert all(fit(until(self.config, self.report.last_step), self.world_size))
        self._look(committed)
        straight = named(replace(self.config, checkpoint=CheckpointConfig(every_steps=10**6)), "straight")
        assert all(fit(until(straight, self.report.last_step), self.world_size))
        expected = {record["step"]: record for record in read_jsonl(directory_of(straight) / "metrics.jsonl")}
        assert expected.keys() >= self.seen.keys()
        differing = [step for step, record in self.seen.items() if record != repeatable(expected[step])]
        self.report.divergences += len(differing) + len(set(range(1, self.report.last_step + 1)) - self.seen.keys())

    def _look(self, committed: int | None) -> None:
        """Count which of the steps `committed` before the last launch it lost, and which checkpoints it left."""
        if self.resumed.exists():  # it started training
            step = int(self.resumed.read_text() or 0)
            self.resumed.unlink()
            self.report.restarts += step > 0
            self.report.lost_steps += max(0, (committed or 0) - step)
        if (self.root / LATEST).is_symlink():
            self.report.without_checkpoint += bool(find_damage(self.root / LATEST))
        else:
            self.report.without_checkpoint += committed is not None
        metrics = directory_of(self.config) / "metrics.jsonl"
        for record in read_jsonl(metrics) if metrics.exists() else []:
            self.report.steps_compared += 1
            earlier = self.seen.setdefault(record["step"], repeatable(record))
            self.report.divergences += earlier != repeatable(record)


def _fit_until_killed(config: Config, kill: Kill) -> None:
    """Start a launch that will be killed."""
    with (directory_of(config).parent / "campaign.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    world = init_world(config.parallel)
    trainer = build_trainer(config, world)
    if world.is_main:
        (trainer.checkpoints.manager.directory / RESUMED_FROM).write_text(str(trainer.progress.step))
    if kill.stage and world.rank == kill.rank:
        saves = 0

        def die_at(stage: str) -> None:
            nonlocal saves
            saves += stage == "started"
            if stage == kill.stage and saves >= kill.nth:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.checkpoints.manager.on_stage = die_at
        _tell_when_state_is_written(die_at)
    trainer.fit()


def _tell_when_state_is_written(tell: Any) -> None:
    def write_and_tell(*arguments: Any, **settings: Any) -> None:
        write_state(*arguments, **settings)
        tell("state")

    for writer in (backend, run_state):
        writer.write_state = write_and_tell  # type: ignore[attr-defined]


def at_every_stage(world_size: int, random_: random.Random) -> list[Kill]:
    """A kill at each stage of a save, on one of the ranks that reach it."""
    kills = []
    for stage in STAGES:
        rank = random_.randrange(world_size) if stage in ON_EVERY_RANK else 0
        kills.append(Kill(rank, stage, others_after=random_.choice((0.0, 0.3))))
    return kills


def at_random(count: int, world_size: int, longest: float, random_: random.Random) -> list[Kill]:
    """Kills at random times: up to `longest` seconds after some steps, or (every fourth) after the start."""
    return [
        Kill(
            random_.randrange(world_size),
            seconds=random_.uniform(0.0, longest),
            steps=0 if number % 4 == 3 else random_.randrange(1, 8),
            others_after=random_.choice((0.0, 0.0, random_.uniform(0.0, 0.5))),
        )
        for number in range(count)
    ]


def run_campaign(
    directory: Path, parallel: ParallelConfig, kills: Sequence[Kill], *, world_size: int = 2, asynchronous: bool = False
) -> Report:
    """Kill a tiny run in `directory`, which saves every second step, `kills` times."""
    if parallel.backend == "deepspeed":
        preload_deepspeed()
    config = replace(
        tiny_run(directory, max_steps=100_000, eval_every=200_000),
        parallel=parallel,
        checkpoint=CheckpointConfig(every_steps=2, asynchronous=asynchronous, keep_last=2),
    )
    campaign = Campaign(config, world_size)
    for number, kill in enumerate(kills):
        campaign.kill(kill)
        print(f"kill {number + 1} of {len(kills)}: {campaign.report}", file=sys.stderr)
    campaign.finish(steps=3)
    return campaign.report


def main() -> None:
    """Run the campaign of the command line and exit with 1 if it found a fault."""
    parser = argparse.ArgumentParser(
        prog="campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="at random times, beside one at each stage of a save")
    parser.add_argument("--longest", type=float, default=0.5, help="seconds between a step and the kill (default: 0.5)")
    parser.add_argument("--backend", default="fsdp2", choices=["ddp", "fsdp2", "deepspeed"])
    parser.add_argument("--zero-stage", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--shard-degree", type=int, help="HSDP with groups of this size")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--asynchronous", action="store_true", help="save in the background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report here as well")
    args = parser.parse_args()
    random_ = random.Random(args.seed)
    kills = at_every_stage(args.processes, random_) + at_random(args.kills, args.processes, args.longest, random_)
    random_.shuffle(kills)
    parallel = ParallelConfig(args.backend, shard_degree=args.shard_degree, zero_stage=args.zero_stage)
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        report = run_campaign(
            Path(directory), parallel, kills, world_size=args.processes, asynchronous=args.asynchronous
        )
    settings = {"parallel": asdict(parallel), "processes": args.processes, "asynchronous": args.asynchronous}
    content = {**settings, **asdict(report), "minutes": round((time.monotonic() - started) / 60, 1)}
    print(json.dumps(content, indent=1))
    if args.json:
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if report.lost_steps or report.without_checkpoint or report.divergences:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
