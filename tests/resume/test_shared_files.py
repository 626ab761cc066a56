"""Checkpoints in a directory where a rank sees what others wrote only after a delay."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from megamor.checkpoint import manager, verify
from megamor.config import CheckpointConfig, Config
from megamor.parallel import init_world
from megamor.train import build_trainer
from tests.distributed.harness import RankFailed, run_ranks
from tests.resume.delayed import delayed_view
from tests.resume.runs import (
    LOSS_FREE,
    assert_same_run,
    checkpoint_names,
    directory_of,
    fit,
    named,
    tiny_run,
    trace,
    until,
)

DELAY_SECONDS = 0.7


def fit_with_delay(config: Config, delayed_ranks: tuple[int, ...] = (0, 1)) -> tuple[int, int]:
    """Run a launch; returns the step that it resumed from, and the number of lookups of paths not yet visible."""
    root = directory_of(config) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    world = init_world(config.parallel)
    with delayed_view(root, DELAY_SECONDS if world.rank in delayed_ranks else 0.0) as view:
        trainer = build_trainer(config, world)
        resumed_from = trainer.progress.step
        assert trainer.fit()
    return resumed_from, view.hidden


@pytest.fixture
def base(tmp_path: Path) -> Config:
    """A run of eight steps that is saved after every third one and deletes old checkpoints."""
    config = tiny_run(tmp_path)
    return replace(config, router=LOSS_FREE, checkpoint=CheckpointConfig(every_steps=3, keep_last=1))


@pytest.mark.promise("R3")
@pytest.mark.parametrize(("asynchronous", "delayed_rank"), [(False, 0), (True, 1)])
def test_no_rank_needs_to_see_what_another_has_just_written(
    base: Config, asynchronous: bool, delayed_rank: int
) -> None:
    straight = named(base, "straight")
    assert all(fit(straight))
    config = replace(base, checkpoint=replace(base.checkpoint, asynchronous=asynchronous))
    for resumed_from, hidden in run_ranks(fit_with_delay, until(config, 4)):
        assert resumed_from == 0
        assert hidden, "the delay had no effect"
    # A restart right after the last save: one rank doesn't see yet what was just written.
    assert [resumed_from for resumed_from, _ in run_ranks(fit_with_delay, config, (delayed_rank,))] == [4, 4]
    assert checkpoint_names(config) == ["latest", "step_00000008"]
    verify(directory_of(config) / "checkpoints" / "latest")
    assert_same_run(trace(straight), trace(config))


def test_a_run_that_ignores_the_delay_fails(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run fails if a rank doesn't wait until it sees what another rank created."""
    monkeypatch.setattr(manager, "_wait_until", lambda visible, directory: None)
    with pytest.raises(RankFailed, match=r"checkpoint/manager\.py"):  # the step of a save that fails depends on timing
        run_ranks(fit_with_delay, until(base, 4))


def test_what_the_view_hides(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    time.sleep(0.3)
    with delayed_view(tmp_path, 0.3):
        (tmp_path / "own").write_text("x")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "own"]
        assert (tmp_path / "own").read_text() == "x"
    with delayed_view(tmp_path, 0.3) as view:  # in another process, which sees the files at once
        assert not (tmp_path / "own").exists()
        with pytest.raises(FileNotFoundError):
            (tmp_path / "own").read_text()
        assert [path.name for path in tmp_path.rglob("*")] == ["old"]
        assert view.hidden >= 3
        time.sleep(0.3)
        assert (tmp_path / "own").read_text() == "x"
