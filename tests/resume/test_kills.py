"""SIGKILL at every stage of a save and at random times: a restart finds a whole checkpoint and loses nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megamor.config import ParallelConfig
from tests.resume.campaign import STAGES, Report, at_every_stage, at_random, run_campaign

FSDP2 = ParallelConfig("fsdp2")


def assert_nothing_was_lost(report: Report, kills: int) -> None:
    assert sum(report.kills.values()) == kills
    assert report.restarts >= kills // 2
    assert report.steps_compared > report.last_step > 0
    assert (report.lost_steps, report.without_checkpoint, report.divergences) == (0, 0, 0)


@pytest.mark.promise("R2", "R3", backend="fsdp2")
@pytest.mark.parametrize(
    "asynchronous", [pytest.param(False, id="blocking"), pytest.param(True, id="asynchronous", marks=pytest.mark.slow)]
)
def test_killed_at_every_stage_of_a_save(tmp_path: Path, asynchronous: bool) -> None:
    kills = at_every_stage(2, random.Random(asynchronous))
    report = run_campaign(tmp_path, FSDP2, kills, asynchronous=asynchronous)
    assert_nothing_was_lost(report, len(STAGES))


@pytest.mark.promise("R2", backend="fsdp2")
def test_killed_at_random_times(tmp_path: Path) -> None:
    assert_nothing_was_lost(run_campaign(tmp_path, FSDP2, at_random(5, 2, 0.3, random.Random(0))), 5)


@pytest.mark.slow
@pytest.mark.promise("R2")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("parallel", "kills", "asynchronous", "world_size"),
    [
        pytest.param(FSDP2, 50, False, 2, id="fsdp2"),
        pytest.param(FSDP2, 50, True, 2, id="fsdp2, asynchronous"),
        pytest.param(ParallelConfig("fsdp2", shard_degree=2), 15, True, 4, id="hsdp, asynchronous"),
        pytest.param(ParallelConfig("ddp"), 15, False, 2, id="ddp"),
        pytest.param(ParallelConfig("deepspeed", zero_stage=1), 10, False, 2, id="zero 1"),
        pytest.param(ParallelConfig("deepspeed", zero_stage=2), 15, True, 2, id="zero 2, asynchronous"),
        pytest.param(ParallelConfig("deepspeed", zero_stage=3), 15, False, 2, id="zero 3"),
    ],
)
def test_long_campaign(
    tmp_path: Path, parallel: ParallelConfig, kills: int, asynchronous: bool, world_size: int
) -> None:
    plan = at_random(kills, world_size, 0.5, random.Random(1))
    report = run_campaign(tmp_path, parallel, plan, world_size=world_size, asynchronous=asynchronous)
    assert_nothing_was_lost(report, kills)
