"""The commit protocol in one process: damage is named and refused; kills and full disks lose no checkpoint."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megamor.checkpoint import CheckpointManager, TrainerState, open_checkpoint, stored_file, verify
from megamor.checkpoint.layout import LATEST, published_steps, step_name
from megamor.checkpoint.manifest import assign_files
from megamor.errors import CheckpointError
from tests.commands import flip_bit, in_child


def content(step: int) -> bytes:
    return bytes([step % 251]) * 5000


def write_two_shards(step: int, after_first: Callable[[], None] | None = None) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "state").mkdir()
        (directory / "state" / "a.bin").write_bytes(content(step))
        if after_first:
            after_first()
        (directory / "state" / "b.bin").write_bytes(content(step + 1))

    return write


def save(manager: CheckpointManager, step: int, after_first: Callable[[], None] | None = None) -> Path:
    return manager.save(step, [write_two_shards(step, after_first)], {"config.yaml": f"step: {step}\n"})


def names(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir()}


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints", keep_last=2)


@pytest.mark.promise("R3")
def test_saves_publishes_and_keeps_the_newest(manager: CheckpointManager) -> None:
    assert manager.latest_valid() is None
    for step in (10, 20, 30):
        path = save(manager, step)
    root = manager.directory
    assert names(root) == {LATEST, step_name(20), step_name(30)}
    assert path == manager.latest_valid() == root / step_name(30)
    assert os.readlink(root / LATEST) == step_name(30)
    assert (root / LATEST / "state" / "a.bin").read_bytes() == content(30)
    verify(path)


def test_copies_given_files(manager: CheckpointManager, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tok.json"
    tokenizer.write_text("{}")
    path = manager.save(1, [], {"tokenizer.json": tokenizer, "config.yaml": "a: 1\n", "raw": b"\x00"})
    opened = open_checkpoint(path, full=True)
    assert (opened.step, opened.config_yaml) == (1, "a: 1\n")
    assert stored_file(path, "tokenizer.json").read_text() == "{}"


def flip(path: Path) -> None:
    flip_bit(path, 100)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "flipped": (flip, "state/b.bin", "state/b.bin has changed"),
    "short": (truncate, "state/b.bin", "state/b.bin has 4999 bytes instead of 5000"),
    "missing": (Path.unlink, "state/a.bin", "state/a.bin is missing"),
    "no manifest": (Path.unlink, "manifest.json", "no manifest.json"),
    "torn manifest": (lambda path: path.write_text(path.read_text()[:40]), "manifest.json", "manifest.json is damaged"),
}


@pytest.mark.promise("R3")
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_refused_and_the_previous_is_used(
    manager: CheckpointManager, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(manager, 10), save(manager, 20)
    harm, name, message = DAMAGE[kind]
    harm(bad / name)
    with pytest.raises(CheckpointError, match=message):
        verify(bad)
    with caplog.at_level(logging.ERROR):
        assert manager.latest_valid() == good
    assert message in caplog.text
    assert step_name(20) in caplog.text


@pytest.mark.promise("R3")
def test_any_flipped_byte_of_the_manifest_is_noticed_or_harmless(manager: CheckpointManager) -> None:
    path = save(manager, 10)
    manifest = path / "manifest.json"
    whole = manifest.read_text()
    unnoticed = ""
    for position, character in enumerate(whole):
        flip_bit(manifest, position)
        try:
            verify(path)
            unnoticed += character
        except CheckpointError:
            pass
        manifest.write_text(whole)
    verify(path)
    assert unnoticed.strip() == "", "only white space may change"


def test_a_manifest_of_another_format_is_refused(manager: CheckpointManager) -> None:
    manifest = save(manager, 10) / "manifest.json"
    for number in (0, 2):
        manifest.write_text(manifest.read_text().replace(f'"format": {1 if number == 0 else 0}', f'"format": {number}'))
        with pytest.raises(CheckpointError, match=f"has format {number}; this version reads format 1"):
            verify(manifest.parent)


def test_latest_is_there_at_every_moment(manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of a running training look it up: it may name the checkpoint before, but never none."""
    link, seen = manager.directory / LATEST, []
    save(manager, 10)
    for name in ("replace", "rename", "unlink", "symlink_to"):
        call = getattr(Path, name)

        def watched(self: Path, *args: object, call: Callable[..., object] = call, **options: object) -> object:
            before = link.exists()
            result = call(self, *args, **options)
            seen.append(before and link.exists())
            return result

        monkeypatch.setattr(Path, name, watched)
    save(manager, 20)
    assert link.readlink() == Path(step_name(20))
    assert len(seen) >= 3
    assert all(seen)


@pytest.mark.promise("R3")
def test_all_damaged_is_an_error_and_not_a_fresh_start(manager: CheckpointManager) -> None:
    flip(save(manager, 10) / "state" / "a.bin")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        manager.latest_valid()


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2)
    save(manager, 10)
    flip(save(manager, 20) / "state" / "a.bin")
    assert manager.latest_valid() == tmp_path / step_name(10)
    save(manager, 30)
    assert published_steps(tmp_path) == [10, 20, 30]
    save(manager, 40)
    assert published_steps(tmp_path) == [30, 40]


def test_moving_latest_back_leaves_later_steps_behind(manager: CheckpointManager) -> None:
    root = manager.directory
    save(manager, 10)
    save(manager, 30)
    (root / LATEST).unlink()
    (root / LATEST).symlink_to(step_name(10))
    assert manager.latest_valid() == root / step_name(10)
    save(manager, 20)
    assert manager.latest_valid() == root / step_name(20)
    flip(root / step_name(20) / "state" / "a.bin")
    assert manager.latest_valid() == root / step_name(10)


def test_saving_the_same_step_replaces_it(manager: CheckpointManager) -> None:
    save(manager, 10)
    path = manager.save(10, [], {"config.yaml": "new: 1\n"})
    assert names(path) == {"config.yaml", "manifest.json"}
    assert names(manager.directory) == {LATEST, step_name(10)}
    verify(path)


def test_unusable_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"preparing .*file/checkpoints failed on rank 0: NotADirectoryError"):
        CheckpointManager(tmp_path / "file" / "checkpoints", keep_last=1)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.promise("R16")
def test_full_disk_leaves_nothing_half_written(manager: CheckpointManager) -> None:
    good = save(manager, 10)
    before = names(manager.directory)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(manager, 20, after_first=no_space)
    assert names(manager.directory) == before
    assert manager.latest_valid() == good
    save(manager, 20)


@pytest.mark.parametrize("function", ["manager.write_durably", "manager.sync_tree", "commit.point"])
def test_failing_to_publish_keeps_the_old_one(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    good = save(manager, 10)
    with monkeypatch.context() as patch:
        patch.setattr(f"megamor.checkpoint.{function}", lambda *args: no_space())
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(manager, 20)
    assert manager.latest_valid() == good
    assert not [name for name in names(manager.directory) if name.startswith(".")]


def test_failed_replacement_puts_the_old_one_back(manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(manager, 10)
    rename = Path.rename

    def refuse_drafts(self: Path, target: Path) -> Path:
        return no_space() if self.name.startswith(".writing") else rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_drafts)
    with pytest.raises(CheckpointError, match="No space left"):
        save(manager, 10)
    assert names(manager.directory) == {LATEST, step_name(10)}
    assert manager.latest_valid() == good


def test_a_bug_keeps_its_own_exception_and_leaves_nothing(manager: CheckpointManager) -> None:
    def buggy(directory: Path) -> None:
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        manager.save(10, [buggy], {})
    assert names(manager.directory) == set()


@pytest.mark.promise("R3")
def test_everything_is_flushed_before_it_gets_its_name(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def record_flush(descriptor: int) -> None:
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(manager.directory)}")
        fsync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return rename(self, target)

    def record_replace(self: Path, target: Path) -> Path:
        events.append(f"move {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(Path, "replace", record_replace)
    save(manager, 10)
    draft = ".writing_step_00000010"
    renamed = events.index(f"rename {draft}")
    flushed = {
        f"flush {draft}/{name}" for name in ("state/a.bin", "state/b.bin", "config.yaml", "manifest.json", "state")
    }
    assert flushed | {f"flush {draft}"} == set(events[:renamed])
    assert events.index(f"flush {draft}/manifest.json") > events.index(f"flush {draft}/state/a.bin")
    assert events[renamed + 1 :] == ["flush .", "move latest", "flush ."]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KILL_POINTS = [
    *("first shard", "written", "manifest", "between renames", "renamed"),
    *("latest", "expiring", "rmtree", "done"),
]


@pytest.mark.promise("R2", "R3")
@pytest.mark.parametrize("same_step", [False, True], ids=["new", "same"])
@pytest.mark.parametrize("point", KILL_POINTS)
def test_sigkill_anywhere_leaves_a_whole_checkpoint(
    tmp_path: Path, point: str, same_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2)
    save(manager, 5)
    save(manager, 10)
    step = 10 if same_step else 20
    rename = Path.rename

    def child() -> None:
        if point == "rmtree":
            monkeypatch.setattr(shutil, "rmtree", lambda path: (next(path.rglob("*.bin")).unlink(), die()))
        if point == "between renames":
            die_at_draft = lambda self, to: die() if self.name.startswith(".writing") else rename(self, to)  # noqa: E731
            monkeypatch.setattr(Path, "rename", die_at_draft)
        manager = CheckpointManager(tmp_path, keep_last=1, on_stage=lambda stage: die() if stage == point else None)
        save(manager, step, after_first=die if point == "first shard" else None)

    assert os.WIFSIGNALED(in_child(child)), "the kill point was not reached"
    restarted = CheckpointManager(tmp_path, keep_last=1)
    survivor = restarted.latest_valid()
    assert survivor is not None
    published = point in ("latest", "expiring", "rmtree", "done")
    assert survivor.name == step_name(step if published else 10)
    for whole in published_steps(tmp_path):
        verify(tmp_path / step_name(whole))
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    save(restarted, 30)
    assert restarted.latest_valid() == tmp_path / step_name(30)
    assert published_steps(tmp_path) == [30]


def test_file_size_limit_in_a_real_process(tmp_path: Path) -> None:
    """The operating system refuses the write with EFBIG, like a quota."""
    save(CheckpointManager(tmp_path, keep_last=1), 10)

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        manager = CheckpointManager(tmp_path, keep_last=1)
        with pytest.raises(CheckpointError, match="File too large"):
            save(manager, 20)

    assert in_child(child) == 0
    assert names(tmp_path) == {LATEST, step_name(10)}
    verify(tmp_path / LATEST)


def test_files_are_divided_among_ranks_by_size() -> None:
    sizes = {"a": 8, "b": 5, "c": 4, "d": 1}
    assigned = assign_files(sizes, dict.fromkeys(sizes, range(2)))
    assert [sum(sizes[name] for name in files) for files in assigned] == [9, 9]
    only_second = assign_files(sizes, dict.fromkeys(sizes, range(1, 2)))
    assert [sorted(files) for files in only_second] == [[], ["a", "b", "c", "d"]]


class TestOpening:
    def test_run_directory_and_latest(self, manager: CheckpointManager) -> None:
        save(manager, 10)
        run = manager.directory.parent
        for path in (run, manager.directory, manager.directory / LATEST, manager.directory / step_name(10)):
            assert open_checkpoint(path).directory == (manager.directory / step_name(10)).resolve()

    def test_falls_back_only_if_no_specific_one_was_requested(self, manager: CheckpointManager) -> None:
        save(manager, 10)
        (save(manager, 20) / "state" / "a.bin").unlink()
        assert open_checkpoint(manager.directory).step == 10
        with pytest.raises(CheckpointError, match=r"a\.bin is missing"):
            open_checkpoint(manager.directory / LATEST)

    def test_full_check_finds_what_sizes_hide(self, manager: CheckpointManager) -> None:
        path = save(manager, 10)
        flip(path / "state" / "a.bin")
        assert open_checkpoint(path).step == 10
        with pytest.raises(CheckpointError, match=r"a\.bin has changed"):
            open_checkpoint(path, full=True)

    def test_errors_for_paths_that_are_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no checkpoint at"):
            open_checkpoint(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
            open_checkpoint(tmp_path)
        (tmp_path / "part" / "state").mkdir(parents=True)
        with pytest.raises(CheckpointError, match=r"no manifest\.json: it is not a complete checkpoint"):
            open_checkpoint(tmp_path / "part")
        (tmp_path / "weights.pt").write_text("")
        with pytest.raises(CheckpointError, match="is a file"):
            open_checkpoint(tmp_path / "weights.pt")
        (tmp_path / LATEST).symlink_to("step_00000001")
        with pytest.raises(CheckpointError, match="a link to step_00000001, which is gone"):
            open_checkpoint(tmp_path / LATEST)
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
            open_checkpoint(tmp_path)

    def test_a_copy_under_another_name_knows_its_step(self, manager: CheckpointManager, tmp_path: Path) -> None:
        state = TrainerState(step=3, tokens_seen=0, data={}, world_size=1, backend="single")
        path = manager.save(3, [], {"trainer.json": state.to_json()})
        shutil.copytree(path, tmp_path / "best")
        assert open_checkpoint(tmp_path / "best", full=True).step == 3

    def test_without_tokenizer(self, manager: CheckpointManager) -> None:
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
            stored_file(save(manager, 10), "tokenizer.json")
