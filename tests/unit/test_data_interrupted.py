"""Preprocessing that was killed, interrupted or failed resumes, and writes the same bytes as an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer

from megamor.cli import preprocess
from megamor.corpus import preprocess as preprocess_module
from megamor.corpus import text
from megamor.corpus.journal import Journal, JournalEntry
from megamor.corpus.preprocess import Interrupted, interruptible
from megamor.corpus.text import ChunkId
from megamor.corpus.tokenizer import byte_tokenizer
from megamor.corpus.writer import ShardWriter
from megamor.data.shard import TokenShard
from tests.commands import in_child, refusal

ROOT = Path(__file__).parents[2]
NUMBERS = random.Random(0)
WORDS = ["routing", "recursion", "naïve", "token", "№", "depth", "a", "of", "1984", "\n"]
TEXTS = [" ".join(NUMBERS.choices(WORDS, k=1 + n % 90)) + f" {n % 400}" for n in range(700)]
OPTIONS = ["--append-eod", "--split", "0.9,0.1", "--deduplicate", "--min-length", "20", "--workers", "2"]
# The command with small chunks, and a journal that is written after each of them.
SMALL_STEPS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from megamor.corpus import preprocess, text
from megamor.cli.preprocess import main
text.CHUNK_BYTES, preprocess.JOURNAL_SECONDS = 4000, 0
main()
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files with duplicates within and between them, and small chunks for runs in this process."""
    monkeypatch.setattr(text, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(preprocess_module, "JOURNAL_SECONDS", 0.0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "b.jsonl").write_bytes(lines[: len(lines) // 3].rpartition(b"\n")[0])
    (folder / "c.txt").write_text(" ".join(TEXTS[:50]))
    byte_tokenizer(["<|endoftext|>"]).save(str(tmp_path / "tok.json"))
    return folder


def arguments(corpus: Path, prefix: Path, *more: str) -> list[str]:
    files = [str(corpus / name) for name in ("a.jsonl.zst", "b.jsonl", "c.txt")]
    tokenizer = str(corpus.parent / "tok.json")
    return ["--input", *files, "--tokenizer", tokenizer, "--output-prefix", str(prefix), *OPTIONS, *more]


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def expected(corpus: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    preprocess.main(arguments(corpus, tmp_path / "whole" / "x"))
    found = outputs(tmp_path / "whole")
    assert sorted(found) == [f"x_{s}.{e}" for s in ("train", "val") for e in ("bin", "idx", "meta.json")]
    return found


def killed_at(count: int, names: tuple[str, ...]) -> Callable[[], None]:
    """Patch functions of `os` so that this process is killed just before the `count`-th call of any of them."""
    calls = iter(range(count))

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    def patch() -> None:
        for name in names:
            setattr(os, name, counted(getattr(os, name)))

    return patch


def test_killed_between_any_two_steps_that_reach_the_disk(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A kill may come before every rename and sync, including the last renames, which give the files their names."""
    kills, folder = 0, tmp_path / "out"
    for start in (0, 1):  # one run that is killed and resumed at every second point
        for count in range(start, 400, 2):

            def action(count: int = count) -> None:
                killed_at(count, ("replace", "fsync"))()
                preprocess.main(arguments(corpus, folder / "x"))

            status = in_child(action)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), f"the run failed after {kills} kills: {status}"
            kills += 1
            if not {"x_train.idx", "x_val.idx"} & set(outputs(folder)):
                assert not {"x_train.bin", "x_val.bin"} <= set(outputs(folder)) or "x.journal" in outputs(folder)
        assert outputs(folder) == expected
    assert kills > 10


def test_killed_at_random_times(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The command itself, killed five times after it has done some work."""
    folder, kills, sizes = tmp_path / "out", 0, [0]
    command = [sys.executable, "-c", SMALL_STEPS, *arguments(corpus, folder / "x")]
    while kills < 5:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        journal = folder / "x.journal"
        before = journal.stat().st_mtime_ns if journal.exists() else 0
        while process.poll() is None and (not journal.exists() or journal.stat().st_mtime_ns == before):
            time.sleep(0.002)
        time.sleep(NUMBERS.random() * 0.03)
        process.kill()
        _, said = process.communicate()
        if process.returncode == 0:
            break  # it finished before the kill
        kills += 1
        assert kills == 1 or "resuming an interrupted run" in said
        sizes.append((folder / "x_train.bin.partial").stat().st_size)
    assert kills >= 2
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert outputs(folder) == expected


def test_no_chunk_twice(corpus: Path, tmp_path: Path) -> None:
    """Without deduplication, which would hide it."""
    options = [option for option in arguments(corpus, tmp_path / "whole" / "x") if option != "--deduplicate"]
    preprocess.main(options)
    options[options.index("--output-prefix") + 1] = str(tmp_path / "out" / "x")
    for count in (10, 45, 31):
        assert os.WIFSIGNALED(in_child(lambda count=count: (killed_at(count, ("fsync",))(), preprocess.main(options))))
    preprocess.main(options)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_resume(
    signum: signal.Signals, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", SMALL_STEPS, *arguments(corpus, folder / "x")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "x.journal").exists():
        time.sleep(0.002)
    process.send_signal(signum)
    _, said = process.communicate()
    assert process.returncode == 128 + signum
    assert said.count("\n") == 1
    assert said.startswith(f"stopped by {signum.name} after ")
    assert said.endswith("rerun the same command to resume\n")
    assert not {"x_train.idx", "x_val.idx"} & set(outputs(folder))
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stderr.startswith("resuming an interrupted run after ")
    assert outputs(folder) == expected


def test_a_signal_stops_once() -> None:
    """A second signal doesn't interrupt the cleanup; afterwards the old handlers are back."""
    before, done = signal.getsignal(signal.SIGINT), []

    def stopped() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                done.append("cleaned up")

    with pytest.raises(Interrupted, match="SIGTERM"):
        stopped()
    assert done == ["cleaned up"]
    assert signal.getsignal(signal.SIGINT) is before


def stop_in_the_middle(corpus: Path, folder: Path, *more: str) -> None:
    """Leave an interrupted run behind."""
    status = in_child(lambda: (killed_at(30, ("replace",))(), preprocess.main(arguments(corpus, folder / "x", *more))))
    assert os.WIFSIGNALED(status)
    assert "x.journal" in outputs(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("option", "differs in: --min-length"),
        ("input", "differs in: the input"),
        ("tokenizer", "differs in: --tokenizer"),
        ("restart", "starting from the beginning: --restart"),
        ("shorter", "shorter than .*x.journal says"),
        ("damaged", "x.journal is damaged"),
        ("workers", "resuming"),
    ],
)
def test_another_run_starts_over_and_says_why(
    change: str, says: str, corpus: Path, expected: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, more = tmp_path / "out", list[str]()
    stop_in_the_middle(corpus, folder, *(["--min-length", "3"] if change == "option" else []))
    capfd.readouterr()
    if change == "input":
        os.utime(corpus / "a.jsonl.zst", (1, 1))
    elif change == "tokenizer":
        content = Tokenizer.from_file(str(corpus.parent / "tok.json")).to_str(pretty=True)
        (corpus.parent / "tok.json").write_text(content + "\n")
    elif change == "shorter":
        os.truncate(folder / "x_train.bin.partial", 100)
    elif change == "damaged":
        os.truncate(folder / "x.journal", 100)
    else:
        more = {"restart": ["--restart"], "workers": ["--workers", "5"]}.get(change, [])
    preprocess.main(arguments(corpus, folder / "x", *more))
    assert re.search(says, capfd.readouterr().err)
    found = outputs(folder)
    if change != "tokenizer":  # its hash is in the side file
        assert found == expected
    assert sorted(found) == sorted(expected)


def test_after_a_bad_line_finished_work_is_kept(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run resumes at the bad line with --on-bad-line skip."""
    lines = (corpus / "b.jsonl").read_bytes()
    (corpus / "b.jsonl").write_bytes(lines + b"\nnonsense\n")
    said = refusal(capsys, preprocess.main, *arguments(corpus, tmp_path / "out" / "x"))
    assert "b.jsonl, line" in said
    assert "finished work is kept" in said
    preprocess.main(arguments(corpus, tmp_path / "out" / "x", "--on-bad-line", "skip"))
    assert "resuming" in capsys.readouterr().err
    assert outputs(tmp_path / "out") == expected


def test_after_a_full_disk_finished_work_is_kept(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", SMALL_STEPS, *arguments(corpus, folder / "x")]
    full = subprocess.run(
        ["bash", "-c", 'ulimit -f 64; exec "$@"', "-", *command], check=False, capture_output=True, text=True
    )
    assert full.returncode == 2
    assert "can't be written: File too large" in full.stderr
    assert not {"x_train.idx", "x_train.bin"} & set(outputs(folder))
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "resuming" in again.stderr
    assert outputs(folder) == expected


def test_second_run_on_one_prefix_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It must not touch the files of the first run, which continues undisturbed."""
    folder = tmp_path / "out"
    stop_in_the_middle(corpus, folder)
    before = {name: content for name, content in outputs(folder).items() if not name.endswith(".lock")}
    with ShardWriter(folder / "x_val", np.uint16, resume=True) as other:
        other.keep_partial = True
        message = refusal(capsys, preprocess.main, *arguments(corpus, folder / "x"))
    assert "another process is writing" in message
    assert outputs(folder) == before
    preprocess.main(arguments(corpus, folder / "x"))
    assert TokenShard.open(folder / "x_train").num_documents > 100


def test_journal_remembers_and_compares(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "x"), {"a": (1, 2), "b": None})
    assert journal.read() == (None, "")
    entry = JournalEntry(ChunkId(2, 7), [(3, 40), (0, 0)], {"bad": 1})
    journal.write(entry)
    found, reason = Journal(str(tmp_path / "x"), {"a": [1, 2], "b": None}).read()
    assert reason == ""
    assert found is not None
    assert (found.next, list(map(tuple, found.written)), found.counts, found.complete) == (
        ChunkId(2, 7), [(3, 40), (0, 0)], {"bad": 1}, False,
    )  # fmt: skip
    found, reason = Journal(str(tmp_path / "x"), {"a": [1], "c": 1}).read()
    assert found is None
    assert reason.endswith("differs in: a, c")
