"""Which checkpoints are kept: the newest, every n-th, the best; none is deleted before a newer one is verified."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megamor.checkpoint import CheckpointManager, manager, verify
from megamor.checkpoint.layout import BEST, LATEST, published_steps, step_name
from megamor.checkpoint.retention import Retention, read_losses
from megamor.errors import CheckpointError


def save(manager: CheckpointManager, step: int) -> Path:
    return manager.save(step, [lambda directory: (directory / "a.bin").write_bytes(bytes([step % 251]) * 500)], {})


@pytest.mark.parametrize(
    ("keep", "damaged", "expired"),
    [
        (Retention(2), set(), [1, 2, 3, 4]),
        (Retention(9), set(), []),
        (Retention(1, every=3), set(), [1, 2, 4, 5]),
        (Retention(1, best=1), set(), [1, 3, 4, 5]),
        (Retention(2, every=4, best=2), set(), [1]),
        (Retention(2), {5}, [1, 2, 3]),  # a damaged one doesn't count as one of the two, but isn't deleted early
        (Retention(1, best=1), {2}, [1, 2, 4, 5]),  # and it can't be the best
        (Retention(1, every=2), {4}, [1, 3, 5]),  # a damaged one that is kept may be repaired
    ],
)
def test_what_expires(keep: Retention, damaged: set[int], expired: list[int]) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}
    assert keep.expired([1, 2, 3, 4, 5, 6], damaged, losses) == expired


def test_the_newest_every_nth_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, keep_last=2, keep_every=4, keep_best=1)
    for step, loss in enumerate((5.0, 3.0, 2.0, 4.0, 2.5, 2.6, 2.7, 2.8, 2.9), start=1):
        save(checkpoints, step)
        checkpoints.record_loss(step, loss)
        assert os.readlink(tmp_path / BEST) == step_name(min(step, 3))
    assert published_steps(tmp_path) == [3, 4, 8, 9]
    verify(tmp_path / BEST)
    again = CheckpointManager(tmp_path, keep_last=2, keep_best=1)  # losses are read from disk after a restart
    again.record_loss(9, 1.0)
    assert os.readlink(tmp_path / BEST) == step_name(9)
    save(again, 10)
    assert published_steps(tmp_path) == [9, 10]


def test_losses_of_steps_without_a_checkpoint_and_without_a_number(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, keep_last=1, keep_best=1)
    save(checkpoints, 2)
    checkpoints.record_loss(1, 0.5)
    checkpoints.record_loss(2, float("nan"))
    assert not (tmp_path / BEST).exists()
    checkpoints.record_loss(2, 3.0)
    assert os.readlink(tmp_path / BEST) == step_name(2)
    assert read_losses(tmp_path) == {1: 0.5, 2: 3.0}
    (tmp_path / "validation.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"validation\.json is damaged"):
        checkpoints.record_loss(3, 1.0)
    assert not list(CheckpointManager(tmp_path / "none", keep_last=1).directory.iterdir())


def test_the_lowest_loss_comes_first_and_the_earlier_of_equals() -> None:
    assert Retention.ranked([1, 2, 3, 4], {1: 2.0, 2: 1.0, 3: 1.0, 5: 0.0}) == [2, 3, 1]


def test_a_step_may_be_evaluated_before_it_is_saved(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, keep_last=2, keep_best=1)
    for step, loss in ((1, 3.0), (2, 2.0)):
        checkpoints.record_loss(step, loss)
        save(checkpoints, step)
        assert os.readlink(tmp_path / BEST) == step_name(step)


def test_a_damaged_step_that_is_saved_again_counts_as_whole(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, keep_last=2)
    for step in (1, 2):
        save(checkpoints, step)
    (tmp_path / step_name(2) / "a.bin").write_bytes(b"short")
    again = CheckpointManager(tmp_path, keep_last=1)
    assert again.latest_valid() == tmp_path / step_name(1)
    save(again, 2)
    assert published_steps(tmp_path) == [2]
    assert again.latest_valid() == tmp_path / step_name(2)


def test_the_newest_up_to_a_step_includes_that_step(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, keep_last=9)
    for step in (2, 4, 6):
        save(checkpoints, step)
    found = {at_most: checkpoints.latest_valid(at_most) for at_most in (1, 2, 3, 4, 99)}
    names = {at_most: path and path.name for at_most, path in found.items()}
    assert names == {1: None, 2: step_name(2), 3: step_name(2), 4: step_name(4), 99: step_name(6)}


@pytest.mark.promise("R3")
def test_nothing_is_deleted_when_the_new_one_can_not_be_read_back(tmp_path: Path) -> None:
    def spoil(stage: str) -> None:
        if stage == "latest":  # after its checksums were computed, before any checkpoint is deleted
            file = tmp_path / step_name(3) / "a.bin"
            file.write_bytes(bytes([1]) + file.read_bytes()[1:])

    checkpoints = CheckpointManager(tmp_path, keep_last=1)
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.on_stage = spoil
    with pytest.raises(CheckpointError, match=r"step 3 can't be read back: .*a\.bin has changed"):
        save(checkpoints, 3)
    assert published_steps(tmp_path) == [2, 3]
    assert CheckpointManager(tmp_path, keep_last=1).latest_valid() == tmp_path / step_name(2)


def test_reading_back_comes_before_deleting(tmp_path: Path) -> None:
    stages: list[str] = []
    checkpoints = CheckpointManager(tmp_path, keep_last=1, on_stage=stages.append)
    save(checkpoints, 1)
    assert stages == ["started", "written", "manifest", "renamed", "latest", "done"]
    stages.clear()
    save(checkpoints, 2)
    assert stages == ["started", "written", "manifest", "renamed", "latest", "verified", "expiring", "done"]


def test_a_step_that_latest_names_and_that_is_gone_is_not_a_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "SETTLING_SECONDS", 0.1)
    (tmp_path / LATEST).symlink_to(step_name(5))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        CheckpointManager(tmp_path, keep_last=1).latest_valid()
