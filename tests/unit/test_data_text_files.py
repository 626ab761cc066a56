"""Raw text in every form in which it comes: endings, compressions, JSON that isn't lines, marks, separators, keys."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megamor.cli import preprocess
from megamor.corpus import text
from megamor.corpus.dedup import read_held_out
from megamor.corpus.documents import parse_chunk
from megamor.corpus.text import COMPRESSIONS, SUFFIXES, find_files
from megamor.errors import DataError
from tests.commands import status
from tests.unit.test_data_preprocess import documents, leftovers

STORIES = ["one\nand a half", "zwei Gänse", "trois — 三"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
BOM = "\ufeff"


def lines_of(stories: list[str]) -> str:
    return "".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in stories)


def read(path: Path, key: str = "text", separator: str | None = None, **options: Any) -> list[str]:
    chunks = find_files([str(path)], key, separator).chunks()
    return [each for chunk in chunks for each in parse_chunk(chunk, key, separator, **options).texts]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Preprocess files of this test with the byte tokenizer, to `tmp_path / "out/x"`."""

    def command(*arguments: object) -> int:
        return status(
            preprocess.main, "--tokenizer", "byte", "--output-prefix", tmp_path / "out/x", "--workers", 1, *arguments
        )

    return command


def written(tmp_path: Path) -> list[str]:
    return documents(tmp_path / "out/x", str(tmp_path / "out/x.tokenizer.json"))


# --- endings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", SUFFIXES[:-1])
def test_every_ending_in_both_cases(ending: str, tmp_path: Path) -> None:
    compression = next(each for each in reversed(COMPRESSIONS) if ending.endswith(each))
    separator = "\n--\n" if ".txt" in ending else None
    content = (separator.join(STORIES) if separator else lines_of(STORIES)).encode()
    for name in (f"a{ending}", f"A{ending.upper()}"):
        (tmp_path / name).write_bytes(PACK[compression](content))
        assert read(tmp_path / name, separator=separator) == STORIES


def test_unknown_endings_are_named(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.csv", "a.jsonl.zip", "a.json5", "jsonl", "a.parquet.gz", "a.tar.gz"):
        (tmp_path / name).write_text(lines_of(STORIES))
        assert run("--input", tmp_path / name) == 2
        assert f"{name}: unknown kind of file; known are .parquet, and .jsonl," in capsys.readouterr().err


JSON_FORMS = {
    "array": json.dumps([{"text": story} for story in STORIES]),
    "indented array": "\n " + json.dumps([{"text": story, "meta": {"n": [1]}} for story in STORIES], indent=2) + "\n",
    "joined arrays": "".join(json.dumps([{"text": story}]) + "\n" for story in STORIES),
    "arrays with marks": "".join(BOM + json.dumps([{"text": story}]) for story in STORIES),
    "lines": lines_of(STORIES),
    "lines after a mark": BOM + lines_of(STORIES),
    "Windows lines": lines_of(STORIES).replace("\n", "\r\n"),
    "one line": lines_of(STORIES[:1]).rstrip(),
    "one object": json.dumps({"text": STORIES[0], "meta": {"a": 1}}),
    "one indented object": json.dumps({"meta": {"a": 1}, "text": STORIES[0]}, indent=4, ensure_ascii=False) + "\n",
}


@pytest.mark.parametrize("size", [1, 7, 2**20])
@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_of_every_form(form: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", size)
    (tmp_path / "a.json").write_text(JSON_FORMS[form], encoding="utf-8")
    assert read(tmp_path / "a.json") == (STORIES[:1] if "one" in form else STORIES)


def test_empty_json(tmp_path: Path) -> None:
    for content in ("", " \n", "[]", "[ ]\n[]"):
        (tmp_path / "a.json").write_text(content)
        assert read(tmp_path / "a.json") == []


WRONG_JSON = {
    '[{"text": "a"}, {"text": "b"': "object 2: not JSON",
    '[{"text": "a"}, {"text": "b"}': "object 3: not JSON (the array has no end)",
    '[{"text": "a"}, {"text": "b"},': "object 3: not JSON (the array has no end)",
    '[{"text": "a"}, nonsense, {"text": "b"}]': "object 2: not JSON",
    '[{"text": "a"}] and more': "object 2: not JSON",
    '["a", "b"]': "object 1: no key 'text' (found: str)",
    '[{"text": "a"}, {"text": 1}]': "object 2: 'text' holds int",
    '{"data": [{"text": "a"}]}': "line 1: no key 'text' (found: data)",
    '{\n"text":\n"a"\n': "object 1: not JSON",
}


@pytest.mark.parametrize("size", [5, 2**20])
@pytest.mark.parametrize("content", WRONG_JSON)
def test_json_that_is_wrong_is_named(content: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", size)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(f"a.json, {WRONG_JSON[content]}")):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("form", ["[%s]", "%s", "%s\n%s\n"])
def test_what_python_refuses_to_convert(form: str, tmp_path: Path) -> None:
    """Integers of thousands of digits beside the text, and brackets that are nested too deeply."""
    (tmp_path / "a.json").write_text(form.replace("%s", '{"text": "a", "n": %s}' % ("9" * 5000)))
    assert read(tmp_path / "a.json") == ["a"] * form.count("%s")
    (tmp_path / "a.json").write_text(form.replace("%s", '{"text": "a", "n": %s}' % ("[" * 99999 + "]" * 99999)))
    with pytest.raises(DataError, match=r"a\.json, (object|line) 1: JSON nested too deeply"):
        read(tmp_path / "a.json")


def test_bad_elements_can_be_skipped_and_a_bad_first_line_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "\xe9"}, {"no": 1}, {"text": "b"}]')
    assert read(tmp_path / "a.json", skip_bad=True) == ["a", "b"]
    (tmp_path / "b.json").write_text('{"text": "a",,}\n{"text": "b"}\n{"text": "c"}\n')
    assert read(tmp_path / "b.json", skip_bad=True) == ["b", "c"]


# --- damage and marks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
def test_compressed_files_of_several_parts_and_cut_ones(compression: str, tmp_path: Path) -> None:
    parts = [PACK[compression](lines_of([story]).encode()) for story in STORIES]
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(b"".join(parts))
    assert read(path) == STORIES
    for damaged in (b"".join(parts)[:-3], b"", b"no such thing at all"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.jsonl{compression} can't be read to its end"):
            read(path)


@pytest.mark.parametrize("size", [1, 5, 2**20])
def test_byte_order_marks_are_no_text(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, and where files with one were joined, with and without a line end between."""
    monkeypatch.setattr(text, "CHUNK_BYTES", size)
    (tmp_path / "a.jsonl").write_text("".join(BOM + lines_of([story]) for story in STORIES) + BOM + "\n")
    assert read(tmp_path / "a.jsonl") == STORIES
    (tmp_path / "a.txt").write_text(f"{BOM}one\n{BOM}two{BOM}three")
    assert read(tmp_path / "a.txt") == ["one\ntwothree"]
    (tmp_path / "b.txt").write_text(f"{BOM}one\n\n{BOM}two\n{BOM}\nthree")
    assert read(tmp_path / "b.txt", separator="\n\n") in (["one", "two\n\nthree"], ["one", "two", "three"])
    (tmp_path / "c.jsonl").write_text(lines_of([f"{BOM}kept"]))  # within JSON it is a character of the text
    assert read(tmp_path / "c.jsonl") == [f"{BOM}kept"]


def test_utf_16_and_binary_files_are_refused(tmp_path: Path) -> None:
    for content, says in (("text".encode("utf-16-le"), "NUL byte"), ("text".encode("utf-16"), "is not UTF-8")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.txt, document 1: .*{says}"):
            read(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(lines_of(["text"]).encode("utf-16-le"))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a\0b"}))  # JSON can spell it
    assert read(tmp_path / "b.jsonl") == ["a\0b"]


# --- keys -------------------------------------------------------------------------------------------------------------

KEYED: list[tuple[Any, str | None]] = [
    ({"meta": {"text": "nested"}}, "nested"),
    ({"meta.text": "literal", "meta": {"text": "nested"}}, "literal"),
    ({"meta.text": 1, "meta": {"text": "nested"}}, None),
    ({"meta": {"text": 1}}, None),
    ({"meta": "text"}, None),
    ({"meta": {"other": "x"}}, None),
    ({"text": "x"}, None),
    ([1], None),
]


@pytest.mark.parametrize(("record", "found"), KEYED)
def test_nested_keys(record: Any, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    if found is None:
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: (no key|'meta\.text' holds)"):
            read(tmp_path / "a.jsonl", "meta.text")
    else:
        assert read(tmp_path / "a.jsonl", "meta.text") == [found]


def test_deeper_keys(tmp_path: Path) -> None:
    for record in ({"a": {"b": {"c": "x"}}}, {"a": {"b.c": "x"}}):
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        assert read(tmp_path / "a.jsonl", "a.b.c") == ["x"]


@pytest.mark.parametrize("literal", [False, True])
def test_nested_columns(literal: bool, run: Callable[..., int], tmp_path: Path) -> None:
    """Of a parquet file, and of a dataset."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    columns: dict[str, Any] = {"meta": [{"text": story, "n": 1} for story in STORIES]}
    if literal:
        columns["meta.text"] = [story.upper() for story in STORIES]
    expected = [story.upper() if literal else story for story in STORIES]
    __import__("pyarrow.parquet").parquet.write_table(pyarrow.table(columns), tmp_path / "a.PARQUET")
    assert read(tmp_path / "a.PARQUET", "meta.text") == expected
    with pytest.raises(DataError, match="row 1: no key 'other'"):
        read(tmp_path / "a.PARQUET", "meta.other")
    with pytest.raises(DataError, match="row 1: 'meta' holds dict, not a string"):
        read(tmp_path / "a.PARQUET", "meta")
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "set"))
    assert run("--hf-dataset", tmp_path / "set", "--json-key", "meta.text") == 0
    assert written(tmp_path) == expected


# --- separators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "between"),
    [(r"\n\n", "\n\n"), ("\n\n", "\n\n"), (r"\t", "\t"), ("§\\n", "§\n"), (r"\u4e09\x2d", "三-"), (r"\\n", "\\n")],
)
@pytest.mark.parametrize("option", ["--document-separator", "--separator"])
def test_escape_sequences_of_a_separator(
    option: str, given: str, between: str, run: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(between.join(["one", "two", "three"]))
    assert run("--input", tmp_path / "a.txt", option, given) == 0
    assert written(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("given", ["", "\\", r"\x1", "--"])
def test_separators_that_are_none(
    given: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert run("--input", tmp_path / "a.txt", f"--document-separator={given}") == 2
    assert "argument --document-separator" in capsys.readouterr().err


def test_a_separator_that_never_occurs_is_refused(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n\r\n")
    (tmp_path / "b.jsonl").write_text(lines_of(["one", "two"]))
    arguments = ("--input", tmp_path / "a.txt", tmp_path / "b.jsonl", "--separator")
    assert run(*arguments, r"\n\n") == 2
    message = capsys.readouterr().err
    assert "--document-separator '\\n\\n' occurs nowhere in the input" in message
    assert r"after Windows line ends it begins with '\r\n'" in message
    assert leftovers(tmp_path / "out") == []
    assert run(*arguments, r"\r\n\r\n") == 0
    assert written(tmp_path) == ["one", "two", "one", "two"]


def test_a_separator_that_lines_lack_is_announced(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.jsonl").write_text(lines_of(["one", "two"]))
    assert run("--input", tmp_path / "b.jsonl", "--separator", "<|endoftext|>") == 0
    assert "warning: --document-separator '<|endoftext|>' occurs nowhere in the input" in capsys.readouterr().err
    assert run("--input", tmp_path / "b.jsonl", "--separator", "n") == 0
    assert "warning" not in capsys.readouterr().err


def test_files_that_became_one_document_are_listed(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one==two")
    (tmp_path / "b.txt").write_text("one--two")
    (tmp_path / "c.jsonl").write_text(lines_of(["one"]))
    assert run("--separator", "==", "--input", *(tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl"))) == 0
    assert "one document each: b.txt\n" in capsys.readouterr().out


def test_held_out_documents_are_separated_like_the_input(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one==two==three")
    (tmp_path / "held.TXT").write_text("two==four")
    assert len(read_held_out(str(tmp_path / "held.TXT"), "text", "==")) == 2
    arguments = ("--input", tmp_path / "a.txt", "--holdout", tmp_path / "held.TXT")
    assert run(*arguments, "--separator", "==") == 0
    assert written(tmp_path) == ["one", "three"]
    assert "left out: 1 document of --holdout" in capsys.readouterr().out
    assert run(*arguments) == 0
    assert "no document of --holdout is in the input" in capsys.readouterr().out
