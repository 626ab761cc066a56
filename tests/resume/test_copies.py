"""Run directories that were copied: links that became directories or files, and ids of experiment trackers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamor.checkpoint import CheckpointManager, open_checkpoint
from megamor.checkpoint.layout import step_name
from megamor.config import CheckpointConfig, Config
from megamor.errors import CheckpointError
from megamor.train import Trainer
from tests.resume.runs import assert_same_run, checkpoint_names, directory_of, fit, named, tiny_run, trace, until


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three of four steps of a run that saves each of them and has a best one."""
    base = tiny_run(tmp_path_factory.mktemp("copies"), max_steps=4, eval_every=2)
    base = replace(base, checkpoint=CheckpointConfig(every_steps=1, keep_last=9, keep_best=1))
    assert fit(until(base, 3), world_size=1) == [True]
    return base


@pytest.fixture(scope="module")
def straight(original: Config) -> Config:
    """The same run in one launch."""
    config = named(original, "straight")
    assert fit(config, world_size=1) == [True]
    return config


def follow_links(source: Path, target: Path) -> None:
    """`cp -rL`."""
    shutil.copytree(source, target, symlinks=False)


def lose_links(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
    (target / "checkpoints" / "latest").unlink()
    (target / "checkpoints" / "best").unlink()


def write_links_as_files(source: Path, target: Path) -> None:
    """As a file system without symbolic links, or an archive, leaves them."""
    lose_links(source, target)
    for name in ("latest", "best"):
        (target / "checkpoints" / name).write_text((source / "checkpoints" / name).readlink().name)


def point_into_the_original(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
    (target / "checkpoints" / "latest").unlink()
    (target / "checkpoints" / "latest").symlink_to(source / "checkpoints" / step_name(3))


def only_what_latest_named(source: Path, target: Path) -> None:
    (target / "checkpoints").mkdir(parents=True)
    shutil.copytree(source / "checkpoints" / "latest", target / "checkpoints" / "latest")
    shutil.copy(source / "metrics.jsonl", target)


@pytest.mark.promise("R19")
@pytest.mark.parametrize(
    "copy", [follow_links, lose_links, write_links_as_files, point_into_the_original, only_what_latest_named]
)
def test_a_copied_run_resumes(original: Config, straight: Config, copy: Callable[[Path, Path], None]) -> None:
    config = named(original, copy.__name__)
    before = sorted(path.name for path in (directory_of(original) / "checkpoints").iterdir())
    copy(directory_of(original), directory_of(config))
    assert fit(config, world_size=1) == [True]
    root = directory_of(config) / "checkpoints"
    assert (root / "latest").is_symlink()
    assert (root / "latest").readlink() == Path(step_name(4))
    assert open_checkpoint(directory_of(config)).step == 4
    assert (root / "best").is_symlink()
    assert_same_run(trace(straight), trace(config))
    assert ("set_aside" in checkpoint_names(config)) == (
        copy is follow_links
    )  # duplicates, which nobody asked to delete
    assert sorted(path.name for path in (directory_of(original) / "checkpoints").iterdir()) == before


def test_a_directory_in_the_place_of_latest_is_kept(
    original: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a strange directory nor the only whole copy of a damaged checkpoint is deleted."""
    root = tmp_path / "checkpoints"
    follow_links(directory_of(original) / "checkpoints", root)
    (root / step_name(3) / "trainer.json").write_text("{}")
    shutil.rmtree(root / "best")
    (root / "best").mkdir()
    (root / "best" / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        assert CheckpointManager(root, keep_last=9).latest_valid() == root / step_name(2)
    assert open_checkpoint(root / "set_aside" / "latest" / "latest", full=True).step == 3
    assert (root / "set_aside" / "best" / "best" / "notes.txt").read_text() == "mine"
    assert f"it is now {root}/set_aside/latest/latest" in caplog.text


def test_a_link_to_nothing_falls_back_and_says_so(
    original: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(directory_of(original) / "checkpoints", root, symlinks=True)
    shutil.rmtree(root / step_name(3))
    assert CheckpointManager(root, keep_last=9).latest_valid() == root / step_name(2)
    assert f"{root / step_name(3)} is damaged and not used" in caplog.text


def in_tracker(identifier: str) -> Callable[[Trainer], None]:
    """Give the run an id in a tracker, as the sink does that starts one."""

    def spoil(trainer: Trainer) -> None:
        (directory_of(trainer.config) / "found").write_text(json.dumps(trainer.progress.run_ids))
        trainer.progress.run_ids.setdefault("wandb", identifier)

    return spoil


def ids_of(config: Config) -> tuple[Any, Any]:
    """The ids that the latest launch found and those that it saved."""
    state = json.loads((directory_of(config) / "checkpoints" / "latest" / "trainer.json").read_text())
    return json.loads((directory_of(config) / "found").read_text()), state["run_ids"]


@pytest.mark.promise("R19")
def test_a_copy_gets_an_id_of_its_own_and_a_moved_run_keeps_its(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    base = tiny_run(tmp_path, max_steps=6)
    fit(until(base, 1), world_size=1, spoil=in_tracker("first"))
    fit(until(base, 2), world_size=1, spoil=in_tracker("unused"))
    assert ids_of(base) == ({"wandb": "first"}, {"wandb": "first"})
    copied, moved = named(base, "copied"), named(base, "moved")
    shutil.copytree(directory_of(base), directory_of(copied), symlinks=True)
    capfd.readouterr()
    fit(until(copied, 3), world_size=1, spoil=in_tracker("second"))
    assert f"this is a copy of the run {directory_of(base)}: new ids" in capfd.readouterr().out
    assert ids_of(copied) == ({}, {"wandb": "second"})
    fit(until(copied, 4), world_size=1, spoil=in_tracker("unused"))
    assert ids_of(copied) == ({"wandb": "second"}, {"wandb": "second"})
    directory_of(base).rename(directory_of(moved))
    fit(until(moved, 3), world_size=1, spoil=in_tracker("unused"))
    assert ids_of(moved) == ({"wandb": "first"}, {"wandb": "first"})


def test_a_directory_that_cannot_be_written_to_is_found_at_the_start(
    original: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the first save, hours later."""

    def read_only(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        CheckpointManager(directory_of(original) / "checkpoints", keep_last=9)
