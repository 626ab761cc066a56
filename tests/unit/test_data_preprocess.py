"""tools/preprocess.py and megamor inspect-data, as a user runs them."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megamor.cli import inspect_data, preprocess
from megamor.corpus import text
from megamor.corpus.tokenizer import TextEncoder
from megamor.data.shard import TokenShard
from tests.commands import flip_bit, refusal, status
from tests.unit.test_data_format import meta_of

ROOT = Path(__file__).parents[2]
TEXTS = [f"Document {n}: the quick brown fox, naïve café №{n} " + "jumps " * (n % 37) for n in range(400)]
EOD = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE of 400 entries with truncation and padding enabled, which preprocessing must not apply."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False)
    result.train_from_iterator(TEXTS, trainer)
    result.enable_truncation(5)
    result.enable_padding(length=50)
    path = tmp_path_factory.mktemp("tokenizer") / "tok.json"
    result.save(str(path))
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of each kind, and chunks small enough that several workers get some."""
    monkeypatch.setattr(text, "CHUNK_BYTES", 1000)
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": t, "meta": {"n": n}}, ensure_ascii=n % 2 == 0) + "\n" for n, t in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("".join(lines[:100]))
    whole = "".join(lines[100:200]).encode()
    frames = zstandard.compress(whole[:5000]) + zstandard.compress(whole[5000:])
    (folder / "b.jsonl.zst").write_bytes(frames)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[200:399]).encode().rstrip()))
    (folder / "d.txt").write_text(TEXTS[399])
    return folder


def run(inputs: Path | list[Path], tokenizer: str, prefix: Path, *options: object) -> int:
    """Run preprocessing in this process, for speed, and return its exit status."""
    paths = inputs if isinstance(inputs, list) else [inputs]
    arguments = ["--input", *paths, "--tokenizer", tokenizer, "--output-prefix", prefix, *options]
    return status(preprocess.main, *arguments)


def documents(prefix: Path, tokenizer: str) -> list[str]:
    shard = TokenShard.open(prefix)
    decode = Tokenizer.from_file(tokenizer).decode
    return [decode(shard.document(n).tolist(), skip_special_tokens=False) for n in range(shard.num_documents)]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_all_kinds_of_files_in_order(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    out = tmp_path / "out" / "x"
    files = [corpus / "a.jsonl", corpus / "*.zst", corpus / "c*", corpus / "d.txt"]
    assert run(files, tokenizer, out, "--append-eod", "--workers", 2) == 0
    assert documents(out, tokenizer) == [t + EOD for t in TEXTS]
    meta = meta_of(out)
    assert [(s["name"], s["documents"]) for s in meta.sources] == [
        ("a.jsonl", 100), ("b.jsonl.zst", 100), ("c.jsonl.gz", 199), ("d.txt", 1)
    ]  # fmt: skip
    assert sum(s["tokens"] for s in meta.sources) == meta.tokens == TokenShard.open(out).num_tokens
    assert (meta.eod_token, meta.eod_id, meta.eod_appended, meta.vocab_size) == (EOD, 0, True, 400)
    assert leftovers(out.parent) == ["x.bin", "x.idx", "x.meta.json"]


def test_output_does_not_depend_on_workers(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    outputs = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        assert run(corpus / "*", tokenizer, folder / "x", "--split", "0.8,0.1,0.1", "--workers", workers) == 0
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(outputs[0]) == 9
    assert outputs[0] == outputs[1] == outputs[2]


def test_split_is_by_document_and_stable_when_files_are_added(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    def splits(name: str, *files: Path) -> dict[str, set[str]]:
        assert run(list(files), tokenizer, tmp_path / name, "--split", "0.75,0.25", "--workers", 1) == 0
        return {part: set(documents(tmp_path / f"{name}_{part}", tokenizer)) for part in ("train", "val")}

    few = splits("few", corpus / "b.jsonl.zst")
    many = splits("many", corpus / "a.jsonl", corpus / "b.jsonl.zst", corpus / "c.jsonl.gz")
    assert few["train"] <= many["train"]
    assert few["val"] <= many["val"]
    assert not many["train"] & many["val"]
    assert many["train"] | many["val"] == set(TEXTS[:399])
    assert 65 <= len(many["val"]) <= 135  # 100 expected, 4 standard deviations


def test_spelled_special_tokens_stay_text(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"see {EOD} here"}))
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "x", "--append-eod", "--workers", 1) == 0
    ids = TokenShard.open(tmp_path / "x").tokens.tolist()
    assert ids.count(0) == 1
    assert ids[-1] == 0
    assert documents(tmp_path / "x", tokenizer) == [f"see {EOD} here{EOD}"]


def test_end_of_document_not_marked_special_by_the_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    loose = Tokenizer.from_file(tokenizer)
    loose.add_tokens([AddedToken("<END>", special=False)])
    loose.save(str(tmp_path / "loose.json"))
    encoder = TextEncoder.load(str(tmp_path / "loose.json"), eod_token="<END>")
    assert encoder.eod_id == 400
    assert 400 not in encoder.encode(["a <END> b"])[0]


def test_empty_documents_and_blank_lines_are_counted(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\r\n\n{"text": ""}\n{"text": " \\n"}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("")
    assert run([tmp_path / "a.jsonl", tmp_path / "b.txt"], tokenizer, tmp_path / "x", "--workers", 1) == 0
    assert documents(tmp_path / "x", tokenizer) == ["one", "two"]
    assert "3 documents without text, 1 blank line" in capsys.readouterr().out


BAD_LINES = {
    "not_json": (b"nonsense", "not JSON"),
    "cut_short": (b'{"text": "abc', "not JSON"),
    "no_key": (b'{"txt": "b"}', "no key 'text' .found: txt."),
    "not_an_object": (b"[1]", "no key 'text'"),
    "not_a_string": (b'{"text": 3}', "'text' holds int"),
    "null": (b'{"text": null}', "'text' holds NoneType"),
    "not_utf8": (b'{"text": "\xff"}', "0xff.*is not UTF-8"),
    "half_surrogate": (b'{"text": "\\ud800"}', "surrogate"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_stops_with_file_and_line(
    name: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", 200)
    line, says = BAD_LINES[name]
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 57 + line + b"\n" + good)
    out = tmp_path / "out"
    assert run(tmp_path / "a.jsonl", tokenizer, out / "x") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"DataError: {tmp_path}/a.jsonl, line 58: ")
    assert message.count("\n") == 1
    assert re.search(says, message)
    assert leftovers(out) == []


def test_bad_lines_are_skipped_counted_and_reported_on_request(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = b'{"text": "good"}'
    lines = [good, *(line for line, _ in BAD_LINES.values()), good]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "x", "--on-bad-line", "skip", "--workers", 2) == 0
    assert documents(tmp_path / "x", tokenizer) == ["good", "good"]
    out = capsys.readouterr().out
    assert f"skipped: {len(BAD_LINES)} bad lines" in out
    assert all(f"a.jsonl, line {number}: " in out for number in range(2, 2 + len(BAD_LINES)))


def bad_file(folder: Path, name: str) -> Path:
    """A damaged or missing input called `name`."""
    path = folder / name
    lines = b'{"text": "%s"}\n' % os.urandom(20_000).hex().encode()
    if name.startswith("truncated"):
        packed = zstandard.compress(lines) if name.endswith("zst") else gzip.compress(lines)
        path.write_bytes(packed[:-1000])
    elif name.startswith("garbage"):
        path.write_bytes(b"garbage" * 100)
    elif name.startswith("latin1"):
        path.write_bytes("café".encode("latin1"))
    elif name == "folder":
        path.mkdir()
    elif name.startswith(("empty", "unknown")):
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("truncated.jsonl.zst", "can't be read to its end.*cut short"),
        ("truncated.jsonl.gz", "can't be read to its end"),
        ("garbage.jsonl.zst", "can't be read to its end"),
        ("garbage.jsonl.gz", "can't be read to its end"),
        ("latin1.txt", "document 1: byte 3 .0xe9. is not UTF-8"),
        ("absent.jsonl", "no such file"),
        ("absent*.jsonl", "no such file"),
        ("folder", "is a directory"),
        ("unknown.csv", "unknown kind of file"),
        ("empty.jsonl", "would have no document"),
    ],
)
def test_bad_files_are_named(
    name: str, says: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_file(tmp_path, name)
    out = tmp_path / "out"
    assert run(path, tokenizer, out / "x", "--workers", 1) == 2
    message = capsys.readouterr().err
    assert name in message or name.startswith("empty")
    assert message.count("\n") == 1
    assert re.search(says, message)
    assert leftovers(out) == []


def test_document_larger_than_the_limit(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 10_000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 20_000}) + "\n")
    (tmp_path / "b.txt").write_text("b" * 20_000)
    for name in ("a.jsonl", "b.txt"):
        assert run(tmp_path / name, tokenizer, tmp_path / "x") == 2
        assert f"{name}: " in (message := capsys.readouterr().err)
        assert "split it into documents" in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--split", "0.9,0.2"), "add up to 1"),
        (("--split", "1"), "add up to 1"),
        (("--split", "a,b"), "add up to 1"),
        (("--split", "0.999999,0.000001"), "x_val would have no document"),
        (("--workers", "0"), "give at least 1"),
        (("--eod-token", "<none>"), "has no token <none>"),
        (("--tokenizer", "/nowhere.json"), "no such file"),
        (("--tokenizer", __file__), "is not a tokenizer.json"),
        (("--output-prefix", f"{__file__}/x"), "can't be written"),
    ],
)
def test_bad_options(
    arguments: tuple[str, str], says: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out" / "x", *arguments) == 2
    assert says in capsys.readouterr().err
    assert leftovers(tmp_path / "out") == []


def test_same_file_twice_is_refused(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert run([tmp_path / "a.jsonl", tmp_path / "*.jsonl"], tokenizer, tmp_path / "x") == 2
    assert "names one file twice" in capsys.readouterr().err


def test_hugging_face_dataset_on_disk(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"content": TEXTS[:30], "other": list(range(30))})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "set"))
    common = ("--hf-dataset", tmp_path / "set", "--tokenizer", tokenizer, "--output-prefix", tmp_path / "x")
    assert status(preprocess.main, *common, "--json-key", "content", "--workers", 2) == 0
    assert documents(tmp_path / "x", tokenizer) == TEXTS[:30]
    assert "no column 'text' but content, other" in refusal(capsys, preprocess.main, *common)
    assert "no split 'nope'" in refusal(capsys, preprocess.main, *common, "--hf-split", "nope")


def test_full_disk_leaves_nothing(tokenizer: str, corpus: Path, tmp_path: Path) -> None:
    """A separate process with a file size limit in place of a full disk; the old data set survives."""
    out = tmp_path / "out" / "x"
    (tmp_path / "small.jsonl").write_text('{"text": "small"}')
    assert run(tmp_path / "small.jsonl", tokenizer, out) == 0
    tool = f"{sys.executable} {ROOT}/tools/preprocess.py"
    command = f"ulimit -f 8; {tool} --input '{corpus}/*' --tokenizer {tokenizer} --output-prefix {out} --workers 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"DataError: {out} can't be written: ")
    assert result.stderr.count("\n") == 1
    assert leftovers(out.parent) == ["x.bin", "x.idx", "x.meta.json"]
    assert documents(out, tokenizer) == ["small"]


def test_inspect_reports_and_decodes(
    corpus: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    assert run(corpus / "a.jsonl", tokenizer, out, "--append-eod") == 0
    capsys.readouterr()
    inspect_data.main([str(out), "--tokenizer", tokenizer, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 100
    assert report["tokens"] == TokenShard.open(out).num_tokens
    assert report["contents_verified"] is True
    assert report["first_documents"][0]["text"] == TEXTS[0] + EOD
    (tmp_path / "tok.json").write_bytes(Path(tokenizer).read_bytes())
    inspect_data.main([str(out)])  # the tokenizer next to it
    shown = capsys.readouterr().out
    assert re.search("^documents +100$", shown, re.MULTILINE)
    assert "uint16" in shown
    assert repr(TEXTS[0])[1:-2] in shown


@pytest.mark.parametrize("damage", ["bin byte", "bin length", "idx byte", "idx length", "tokenizer"])
def test_inspect_exits_with_an_error_for_damage(
    damage: str, corpus: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    assert run(corpus / "a.jsonl", tokenizer, out) == 0
    kind, _, what = damage.partition(" ")
    if what == "byte":
        flip_bit(Path(f"{out}.{kind}"), 100, bit=4)
    elif what == "length":
        os.truncate(f"{out}.{kind}", Path(f"{out}.{kind}").stat().st_size - 4)
    other = tmp_path / "other.json"
    other.write_text(Path(tokenizer).read_text() + "\n")
    message = refusal(capsys, inspect_data.main, out, "--tokenizer", other)
    assert (f"x.{kind}" if what else "other.json is not the tokenizer") in message
