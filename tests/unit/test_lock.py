"""One writer at a time: who gets a lock, whose lock is taken over, and what happens to a holder that lost its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megamor import lock as lock_module
from megamor.corpus.fetch import fetch
from megamor.corpus.writer import ShardWriter
from megamor.errors import InUseError, MegamorError
from megamor.files import draft_for
from megamor.interop.export import export_huggingface
from megamor.lock import Holder, WriteLock
from megamor.model import build_model
from tests.resume.runs import tiny_run

HOLD = (
    "import sys, time; from megamor.lock import WriteLock\n"
    "WriteLock(sys.argv[1], 'it', 'wait').take(); print('held', flush=True); time.sleep(100)"
)


def lock_of(path: Path) -> WriteLock:
    return WriteLock(path, "it", "wait")


def foreign(path: Path, **changes: Any) -> Holder:
    """Leave the lock of a process on another machine, which doesn't write heartbeats."""
    holder = replace(Holder.of_this_process(path.parent), machine="elsewhere", host="node7", pid=12, **changes)
    path.with_name(path.name + ".lock").write_text(json.dumps(asdict(holder)))
    return holder


def held_by_another(path: Path, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(lock_module, "DYING_SECONDS", 0.3)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with lock_of(tmp_path / "x"):
        assert names(tmp_path) == ["x.lock"]
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="an error"), lock_of(tmp_path / "x"):
        raise ValueError("an error")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("impatient")
def test_the_refusal_names_the_holder(tmp_path: Path) -> None:
    process = held_by_another(tmp_path / "x", SLURM_JOB_ID="4711")
    try:
        before = (tmp_path / "x.lock").read_bytes()
        with pytest.raises(InUseError) as refusal:
            lock_of(tmp_path / "x").take()
        said = str(refusal.value)
        assert f"another process is writing it: process {process.pid} on {os.uname().nodename}, Slurm job 4711" in said
        assert f"since {time.strftime('%Y-%m-%d')}" in said
        assert names(tmp_path) == ["x.lock"]
        assert (tmp_path / "x.lock").read_bytes() == before
    finally:
        process.kill()
        process.communicate()


@pytest.mark.promise("R20")
@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_holder_on_this_machine_is_succeeded_at_once(tmp_path: Path, reaped: bool) -> None:
    process = held_by_another(tmp_path / "x")
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    began = time.monotonic()
    with lock_of(tmp_path / "x"):
        assert time.monotonic() - began < 1.0
        assert names(tmp_path) == ["x.lock"]
    process.communicate()
    assert names(tmp_path) == []


def holder_of(path: Path) -> Holder:
    holder = Holder.read(path.with_name(path.name + ".lock"))
    assert holder is not None
    return holder


def test_a_recycled_process_id_is_not_the_holder(tmp_path: Path) -> None:
    mine = Holder.of_this_process(tmp_path)
    (tmp_path / "x.lock").write_text(json.dumps(asdict(replace(mine, pid=os.getppid(), token="old", born="1"))))
    with lock_of(tmp_path / "x"):
        assert holder_of(tmp_path / "x").pid == os.getpid()


def test_a_copied_lock_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with lock_of(tmp_path / "a" / "x"):
        (tmp_path / "b" / "x.lock").write_bytes((tmp_path / "a" / "x.lock").read_bytes())
        with lock_of(tmp_path / "b" / "x"):
            assert holder_of(tmp_path / "b" / "x") != holder_of(tmp_path / "a" / "x")


@pytest.mark.promise("R20")
def test_a_requeued_job_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path / "x", job="7", restart=1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    began = time.monotonic()
    with lock_of(tmp_path / "x"):
        assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("answer", "status", "over"),
    [
        ("RUNNING", 0, False),
        ("COMPLETING", 0, False),
        ("PENDING", 0, True),
        ("", 0, True),
        ("slurm_load_jobs error: Invalid job id specified", 1, True),
        ("slurm_load_jobs error: Unable to contact slurm controller", 1, False),
    ],
)
def test_slurm_is_asked_about_the_holders_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int, over: bool
) -> None:
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(f"#!/bin/sh\n[ $3 = 12 ] && echo '{answer}' {'>&2' if status else ''}\nexit {status}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert lock_module._is_over("12") is over


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("cluster", "gone"), [("a", True), ("b", False)])
def test_the_jobs_of_another_cluster_are_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cluster: str, gone: bool
) -> None:
    foreign(tmp_path / "x", job="12", slurm=f"{cluster} {os.getuid()}")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a")
    monkeypatch.setattr(lock_module, "_is_over", lambda job: True)
    with lock_of(tmp_path / "x"):
        assert ("waiting up to" in capfd.readouterr().err) is not gone


@pytest.mark.promise("R20")
@pytest.mark.usefixtures("impatient")
def test_a_silent_holder_elsewhere_is_succeeded_after_a_wait(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path / "x")
    began = time.monotonic()
    with lock_of(tmp_path / "x"):
        assert 1.0 <= time.monotonic() - began < 5.0
    assert "it is locked by process 12 on node7" in capfd.readouterr().err


@pytest.mark.promise("R20")
def test_a_heartbeat_from_elsewhere_is_a_refusal(tmp_path: Path) -> None:
    foreign(tmp_path / "x")
    beat = multiprocessing.get_context("fork").Process(target=_touch_later, args=(tmp_path / "x.lock",), daemon=True)
    beat.start()
    with pytest.raises(InUseError, match="process 12 on node7"):
        lock_of(tmp_path / "x").take()
    beat.join()


def _touch_later(path: Path) -> None:
    time.sleep(0.5)
    os.utime(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b"\x00", b"\xff\xfe", b'{"token": 5}', b'{"token": "../y"}', b'{"token": ""}', b"[" * 9999],
)
@pytest.mark.usefixtures("impatient")
def test_an_unreadable_lock_counts_as_silent(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.lock").write_bytes(content)
    with lock_of(tmp_path / "x"):
        assert names(tmp_path) == ["x.lock"]


def test_a_holder_that_was_succeeded_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.1)
    lock = lock_of(tmp_path / "x")
    lock.take()
    lock.check()
    assert lock.lost is None
    foreign(tmp_path / "x", token="other")
    with pytest.raises(InUseError, match="was taken over by process 12 on node7"):
        lock.check()
    _until(lambda: lock.lost is not None)
    before = (tmp_path / "x.lock").read_bytes()
    lock.release()
    assert (tmp_path / "x.lock").read_bytes() == before, "the successor's lock stays"


def test_a_deleted_lock_stops_its_holder(tmp_path: Path) -> None:
    with lock_of(tmp_path / "x") as lock:
        (tmp_path / "x.lock").unlink()
        with pytest.raises(InUseError, match="was deleted"):
            lock.check()


def test_the_heartbeat_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.1)
    with lock_of(tmp_path / "x"):
        os.utime(tmp_path / "x.lock", (0, 0))
        _until(lambda: (tmp_path / "x.lock").stat().st_mtime > 0)
        assert (tmp_path / "x.lock").stat().st_mtime > 0


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_does_not_exclude_itself_where_it_may_start_again(tmp_path: Path) -> None:
    first = WriteLock(tmp_path / "x", "it", "wait", steal_from_self=True)
    first.take()
    with pytest.raises(InUseError, match=f"process {os.getpid()} on "):
        lock_of(tmp_path / "x").take()
    with WriteLock(tmp_path / "x", "it", "wait", steal_from_self=True):
        with pytest.raises(InUseError, match="taken over"):
            first.check()
        first.release()
        assert names(tmp_path) == ["x.lock"]


def _race(path: Path, start: Any, results: Any) -> None:
    start.wait()
    lock = lock_of(path)
    try:
        lock.take()
    except InUseError:
        results.put(0)
        return
    # Nobody else may be in here: the counter is neither locked nor atomic.
    counter = path.with_name("inside")
    counter.write_text(str(int(counter.read_text()) + 1))
    inside = counter.read_text()
    time.sleep(0.3)
    results.put(1 if counter.read_text() == inside else 100)
    time.sleep(0.5)
    lock.release()


@pytest.mark.promise("R20")
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("stale", [0, 1, 3], ids=["free", "stale", "successor died too"])
def test_of_many_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: int, links: bool) -> None:
    """Of processes that find no lock, or one of a dead holder, at the same moment, exactly one gets it."""
    monkeypatch.setattr(lock_module, "DYING_SECONDS", 0.1)
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    dead = replace(Holder.of_this_process(tmp_path), born="1")
    slot = tmp_path / "x.lock"
    for number in range(stale):
        slot.write_text(json.dumps(asdict(replace(dead, token=f"t{number}"))))
        slot = tmp_path / f"x.lock.t{number}"
    (tmp_path / "inside").write_text("0")
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path / "x", start, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    start.set()
    won = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sum(won) == 1
    assert (tmp_path / "inside").read_text() == "1"
    assert "x.lock" not in names(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".x.lock")]


def _no_links(source: object, target: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("tool", ["draft_for", "export-hf", "fetch-data", "preprocess"])
def test_two_tools_do_not_write_to_one_place(tmp_path: Path, tool: str) -> None:
    place = tmp_path / "out" / "tinystories"
    place.parent.mkdir()
    process = held_by_another(place)
    try:
        with pytest.raises(MegamorError, match=f"another process is writing {place}: process {process.pid} on "):
            write_with(tool, place)
    finally:
        process.kill()
        process.communicate()
    assert names(place.parent) == ["tinystories.lock"], "nothing else was written"
    if tool != "fetch-data":  # which would compare the text with the published one
        write_with(tool, place)
        assert "tinystories.lock" not in names(place.parent)


def write_with(tool: str, place: Path) -> None:
    if tool == "draft_for":
        with draft_for(place) as draft:
            draft.touch()
    elif tool == "export-hf":
        export_huggingface(build_model(tiny_run(place.parent.parent)), place)
    elif tool == "preprocess":
        with ShardWriter(place, "u2") as writer:
            writer.add([1, 2])
            writer.commit()
    else:
        source = place.parent.parent / "source"
        source.mkdir(exist_ok=True)
        fetch("tinystories", place, ["validation"], local=str(source))
