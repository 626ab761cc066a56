"""Options of tools/preprocess.py: input, tokenizers, the accelerator, filters, arrays of jobs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import awkward
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megamor.cli import merge_data, preprocess
from megamor.corpus import encode, text
from megamor.corpus.cuts import cut, find_cuts, longest_fragment
from megamor.corpus.dedup import SeenHashes
from megamor.corpus.documents import document_hash, parse_chunk
from megamor.corpus.encode import GigatokenEncoder
from megamor.corpus.text import InputRange, find_files
from megamor.corpus.tokenizer import MAX_FRAGMENT, TextEncoder, byte_tokenizer, char_tokenizer
from megamor.data.shard import TokenShard
from megamor.errors import DataError
from tests.commands import status
from tests.unit.test_data_format import meta_of
from tests.unit.test_data_preprocess import EOD, TEXTS, corpus, documents, leftovers, run, tokenizer

__all__ = ["corpus", "tokenizer"]  # fixtures


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


# Input


def test_parquet_is_read_in_batches(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(text, "CHUNK_BYTES", 1000)
    table = pyarrow.table({"content": TEXTS, "n": list(range(len(TEXTS)))})
    __import__("pyarrow.parquet").parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    chunks = list(find_files([str(tmp_path / "a.parquet")], "content").chunks())
    assert len(chunks) > 4
    assert [chunk.first_record for chunk in chunks] == np.cumsum([1, *(len(c.data) for c in chunks[:-1])]).tolist()
    assert chunks[-1].position == (tmp_path / "a.parquet").stat().st_size
    assert run(tmp_path / "a.parquet", tokenizer, tmp_path / "x", "--json-key", "content") == 0
    assert documents(tmp_path / "x", tokenizer) == TEXTS


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("null", "row 3: 'text' holds NoneType"),
        ("column", "no column 'text' but other"),
        ("cut", "can't be read to its"),
    ],
)
def test_bad_parquet_is_named(
    damage: str, says: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    values = ["a", "b", None if damage == "null" else "c"]
    table = pyarrow.table({"other" if damage == "column" else "text": values})
    __import__("pyarrow.parquet").parquet.write_table(table, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    assert run(path, tokenizer, tmp_path / "out" / "x") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"DataError: {path}")
    assert says in message
    assert leftovers(tmp_path / "out") == []


def test_hugging_face_dataset_streamed_is_the_same(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "a.jsonl", TEXTS[:100])
    common = ("--hf-dataset", tmp_path / "set", "--tokenizer", tokenizer)
    assert status(preprocess.main, *common, "--output-prefix", tmp_path / "o" / "x", "--hf-streaming") == 0
    assert status(preprocess.main, *common, "--output-prefix", tmp_path / "o" / "y") == 0
    assert documents(tmp_path / "o" / "x", tokenizer) == TEXTS[:100]
    for ending in ("bin", "idx", "meta.json"):
        assert (tmp_path / f"o/x.{ending}").read_bytes() == (tmp_path / f"o/y.{ending}").read_bytes()


def test_document_separator_splits_texts_and_only_when_asked(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like TinyStories: one text file with the token's text between the stories, read in many chunks."""
    monkeypatch.setattr(text, "CHUNK_BYTES", 500)
    (tmp_path / "a.txt").write_text(EOD.join(TEXTS) + EOD)
    write_lines(tmp_path / "b.jsonl", [f"one{EOD}two", f"three{EOD}"])
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert run(files, tokenizer, tmp_path / "x", "--document-separator", EOD) == 0
    assert documents(tmp_path / "x", tokenizer) == [*TEXTS, "one", "two", "three"]
    assert run(files, tokenizer, tmp_path / "y", "--append-eod") == 0
    shard = TokenShard.open(tmp_path / "y")
    assert shard.num_documents == 3
    assert np.count_nonzero(shard.tokens == 0) == 3


@pytest.mark.parametrize("separator", ["\n", EOD, "aba"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_records_are_whole_however_the_file_is_read(
    separator: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = separator.join(["x" * n for n in (3, 0, 100, 7, 1)] * 9).encode()
    (tmp_path / "a.txt").write_bytes(whole)
    monkeypatch.setattr(text, "CHUNK_BYTES", size)
    found = list(find_files([str(tmp_path / "a.txt")], separator=separator).chunks())
    assert b"".join(chunk.data for chunk in found) == whole  # type: ignore[misc]
    counted = [1]
    for chunk in found[:-1]:
        assert chunk.data[-len(separator) :] == separator.encode()
        counted.append(counted[-1] + chunk.data.count(separator.encode()))  # type: ignore[arg-type]
    assert [chunk.first_record for chunk in found] == counted


def test_a_separator_ends_a_block_and_half_of_one_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\n\n\ncde")
    monkeypatch.setattr(text, "CHUNK_BYTES", 4)
    assert [chunk.data for chunk in find_files([str(tmp_path / "a.txt")], separator="\n\n").chunks()] == [
        b"ab\n\n",
        b"\ncde",
    ]


@pytest.mark.parametrize("line", ['{"text": "a"} {"text": "b"}', '{"text":\n"a"}', '{"text": "a", "\udcff": 1}', ""])
def test_lines_decoded_in_place_are_checked_like_others(line: str) -> None:
    """What msgspec would accept in a whole chunk, or doesn't look at, is an error or a blank line all the same."""
    data = b'{"text": "one"}\n' + line.encode(errors="surrogateescape") + b'\n{"text": " "}\n{"text": "two"}'
    chunk = text.TextChunk(text.FIRST, "a.jsonl", 1, "jsonl", data, len(data), len(data))
    if not line:
        found = parse_chunk(chunk, "text")
        assert (found.texts, found.numbers, found.counts.blank, found.counts.empty) == (["one", "two"], [1, 4], 1, 1)
        return
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: "):
        parse_chunk(chunk, "text")


def test_line_of_100_megabytes(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps({"text": "the quick brown fox " * 5_000_000}).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n'))
    assert run(tmp_path / "a.jsonl.zst", tokenizer, tmp_path / "x", "--accelerator", "auto") == 0
    assert TokenShard.open(tmp_path / "x").num_documents == 3


@pytest.mark.parametrize("accelerator", ["none", "gigatoken"])
def test_endless_word_is_refused(
    accelerator: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.jsonl", ["fine", "x" * (MAX_FRAGMENT + 1)])
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out" / "x", "--accelerator", accelerator) == 2
    assert re.search(r"a.jsonl, in the records .*4,194,305 characters without a space", capsys.readouterr().err)
    assert leftovers(tmp_path / "out") == []


# Tokenizers


def test_char_vocabulary_is_of_all_inputs_and_splits(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    write_lines(tmp_path / "b.jsonl", ["ŷ☃"])
    out = tmp_path / "out" / "x"
    assert run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "char", out, "--split", "0.8,0.2", "--append-eod") == 0
    made = out.parent / "x.tokenizer.json"
    characters = sorted(set("".join([*TEXTS, "ŷ☃"])))
    vocabulary = Tokenizer.from_file(str(made)).get_vocab(with_added_tokens=True)
    assert vocabulary == {**{c: n for n, c in enumerate(characters)}, EOD: len(characters)}
    for part in ("train", "val"):
        shard, meta = TokenShard.open(f"{out}_{part}"), meta_of(f"{out}_{part}")
        assert (meta.tokenizer_name, meta.vocab_size) == ("x.tokenizer.json", len(characters) + 1)
        first = "".join([*characters, EOD][i] for i in shard.document(0))
        assert first.removesuffix(EOD) in TEXTS
    from megamor.cli import inspect_data

    inspect_data.main([f"{out}_train"])  # finds and accepts the tokenizer next to it


@given(st.text())
def test_char_and_byte_are_exact_and_survive_being_saved(text: str) -> None:
    made = Tokenizer.from_str(byte_tokenizer([EOD]).to_str())
    ids = TextEncoder.of(made, "byte", need_eod=True).encode([text])[0]
    assert bytes(ids.tolist()) == text.encode()
    assert made.decode(ids.tolist()) == text
    made = Tokenizer.from_str(char_tokenizer([text, "ab"], [EOD]).to_str())
    ids = TextEncoder.of(made, "char", need_eod=True).encode([text])[0]
    assert [sorted({*text, "a", "b"})[i] for i in ids] == list(text)
    assert made.decode(ids.tolist()) == text


def test_tokenizer_by_directory_and_by_name(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_bytes(Path(tokenizer).read_bytes())
    write_lines(tmp_path / "a.jsonl", TEXTS[:3])
    assert run(tmp_path / "a.jsonl", str(tmp_path / "model"), tmp_path / "x") == 0
    assert documents(tmp_path / "x", tokenizer) == TEXTS[:3]
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: tokenizer)
    assert run(tmp_path / "a.jsonl", "org/name", tmp_path / "y") == 0
    assert (tmp_path / "y.tokenizer.json").read_bytes() == Path(tokenizer).read_bytes()

    def unreachable(name: str, file: str) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    capsys.readouterr()
    assert run(tmp_path / "a.jsonl", "org/name", tmp_path / "z") == 2
    assert "could be fetched under that name from the Hugging Face hub: no network" in capsys.readouterr().err
    assert run(tmp_path / "a.jsonl", str(tmp_path), tmp_path / "z") == 2
    assert "no tokenizer.json in that directory" in capsys.readouterr().err


# Where a text may be cut

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SNIPPETS = [*" \n\t\u00a0\u2028\u3000a½.—世。", "Zé", "'s", "12", "e\u0301", "  "]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(SNIPPETS), min_size=2, max_size=60).map("".join), st.integers(0, 5))
def test_cutting_a_text_never_changes_its_words(text: str, size: int) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for first in (pre_tokenizers.Split(Regex(GPT2), "isolated"), pre_tokenizers.Digits(individual_digits=True)):
        words = pre_tokenizers.Sequence([first, byte_level if isinstance(first, pre_tokenizers.Split) else
                                         pre_tokenizers.ByteLevel(add_prefix_space=False)])  # fmt: skip
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = words
        cuts = find_cuts(made)
        assert cuts is not None
        parts = cut(text, size, cuts)
        assert "".join(parts) == text
        assert longest_fragment(text, size, cuts) == max(map(len, parts))
        together = [word for word, _ in words.pre_tokenize_str(text)]
        assert [word for part in parts for word, _ in words.pre_tokenize_str(part)] == together


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")),
        lambda t: setattr(t, "normalizer", __import__("tokenizers").normalizers.Prepend("_")),
        lambda t: t.add_tokens(["not me"]),
        lambda t: t.add_tokens([__import__("tokenizers").AddedToken("x", single_word=True, special=False)]),
    ],
)
def test_unknown_tokenizers_are_not_cut(change: Callable[[Tokenizer], Any]) -> None:
    made = byte_tokenizer()
    assert find_cuts(made) is not None
    change(made)
    assert find_cuts(made) is None
    assert cut("a b " * 100, 2, None) == ["a b " * 100]


# The accelerator


def test_accelerator_writes_the_same_bytes(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    found = []
    for name in ("none", "gigatoken"):
        assert run(corpus / "*", tokenizer, tmp_path / name / "x", "--accelerator", name, "--workers", 3) == 0
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert found[0] == found[1]


@pytest.mark.parametrize("wrong", ["a.jsonl", "b.jsonl.zst", "c.jsonl.gz", "d.txt"])
def test_difference_in_any_file_stops_the_run(
    wrong: str,
    corpus: Path,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An accelerator that encodes only the first document of one file wrongly."""
    marks = {"a.jsonl": 0, "b.jsonl.zst": 100, "c.jsonl.gz": 200, "d.txt": 399}
    original = GigatokenEncoder._load

    class Wrong:
        def __init__(self, right: Any) -> None:
            self.right = right

        def encode_batch(self, texts: list[bytes], *, parallel: bool) -> Any:
            ids = self.right.encode_batch(texts, parallel=parallel).to_list()
            return awkward.Array(
                [
                    own[: -1 if text == TEXTS[marks[wrong]].encode() else None]
                    for own, text in zip(ids, texts, strict=True)
                ]
            )

    monkeypatch.setattr(GigatokenEncoder, "_load", lambda self: Wrong(original(self)))
    assert run(corpus / "*", tokenizer, tmp_path / "out" / "x", "--accelerator", "gigatoken") == 2
    message = capsys.readouterr().err
    assert f"{wrong}, in the records from 1 on: gigatoken and tokenizers give different ids" in message
    assert "use --accelerator none" in message
    assert leftovers(tmp_path / "out") == []


def test_the_beginning_of_a_long_document_is_checked(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a bounded prefix is compared: `tokenizers` doesn't get the rest of a long document."""
    monkeypatch.setattr(encode, "_CHECKED_CHARACTERS", 100)
    asked: list[str] = []
    original = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: asked.extend(texts) or original(self, texts))
    write_lines(tmp_path / "a.jsonl", ["short", " ".join(TEXTS)])
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "x", "--accelerator", "gigatoken") == 0
    assert asked == ["short", " ".join(TEXTS)[:95]]


def test_accelerator_that_is_missing_or_lacks_support(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS[:3])
    assert run(tmp_path / "a.jsonl", "char", tmp_path / "x", "--accelerator", "gigatoken") == 2
    assert "gigatoken doesn't support this tokenizer: " in capsys.readouterr().err
    assert run(tmp_path / "a.jsonl", "char", tmp_path / "x") == 0
    assert "accelerator: none (" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "y", "--accelerator", "gigatoken") == 2
    assert "not installed; pip install 'megamor[fast]'" in capsys.readouterr().err
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "y") == 0
    assert "accelerator: none (" in capsys.readouterr().out


def test_the_word_cache_is_dropped_when_it_grows_large(
    corpus: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BYTES_BETWEEN_RENEWALS", 5000)
    monkeypatch.setattr(encode, "_MEMORY_LIMIT", 0)
    loads, original = [], GigatokenEncoder._load
    monkeypatch.setattr(GigatokenEncoder, "_load", lambda self: loads.append(1) or original(self))
    assert run(corpus / "*", tokenizer, tmp_path / "x", "--accelerator", "gigatoken") == 0
    assert len(loads) > 3
    assert documents(tmp_path / "x", tokenizer) == TEXTS


# Filters


def test_minimum_length_counts_tokens_of_the_text(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.jsonl", ["xy", "xyz", "xyzw", EOD])
    lengths = [len(ids) for ids in TextEncoder.load(tokenizer).encode(["xy", "xyz", "xyzw"])]
    assert lengths == [2, 3, 4]
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "x", "--min-length", 3, "--append-eod") == 0
    assert documents(tmp_path / "x", tokenizer) == [f"xyz{EOD}", f"xyzw{EOD}", EOD + EOD]
    assert "1 document below --min-length" in capsys.readouterr().out


def test_document_of_only_a_special_token_is_text(tokenizer: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [EOD])
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "x", "--append-eod") == 0
    shard = TokenShard.open(tmp_path / "x")
    assert shard.num_documents == 1
    assert shard.tokens.tolist().count(0) == 1
    assert documents(tmp_path / "x", tokenizer) == [EOD + EOD]


@pytest.mark.parametrize("workers", [1, 4])
def test_first_of_equal_documents_is_kept(
    workers: int, corpus: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = write_lines(tmp_path / "again.jsonl", [*TEXTS[50:150], "new", "new", *TEXTS[:10]])
    files = [corpus / "a.jsonl", again, corpus / "b.jsonl.zst"]
    assert run(files, tokenizer, tmp_path / "x", "--deduplicate", "--workers", workers) == 0
    assert documents(tmp_path / "x", tokenizer) == [*TEXTS[:150], "new", *TEXTS[150:200]]
    assert "111 duplicates" in capsys.readouterr().out
    assert not (tmp_path / "x.hashes.partial").exists()
    assert [source["documents"] for source in meta_of(tmp_path / "x").sources] == [100, 51, 50]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 40).map(lambda n: n * 0x0505050505050505), max_size=30), max_size=12))
def test_seen_hashes_is_a_set(batches: list[list[int]]) -> None:
    seen, known = SeenHashes(), set[int]()
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in known)
            known.add(value)
        assert seen.add(np.array(batch, np.uint64)).tolist() == expected
    assert len(seen) == len(known)


def test_seen_hashes_takes_eight_bytes_each() -> None:
    seen, numbers = SeenHashes(), np.random.default_rng(0)
    for _ in range(300):
        assert seen.add(numbers.integers(0, 2**64, 1000, np.uint64)).all()
    runs = [run for runs in seen._buckets for run in runs]
    assert sum(run.nbytes for run in runs) == 8 * len(seen) == 8 * 300_000
    assert len(runs) < 16 * 17


@pytest.mark.parametrize("form", ["texts", "hashes"])
def test_held_out_documents_are_in_no_split(
    form: str, corpus: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = TEXTS[90:110]
    if form == "texts":
        path = write_lines(tmp_path / "secret.jsonl", secret)
    else:
        path = tmp_path / "secret.hashes"
        path.write_text("".join(f"{document_hash(t.encode()):016x}  {n}\n" for n, t in enumerate(secret)))
    assert run(corpus / "*", tokenizer, tmp_path / "x", "--split", "0.5,0.5", "--holdout", path) == 0
    found = {t for part in ("train", "val") for t in documents(tmp_path / f"x_{part}", tokenizer)}
    assert found == set(TEXTS) - set(secret)
    assert "20 documents of --holdout" in capsys.readouterr().out


def test_bad_held_out_list(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS[:3])
    for content, says in (("0123\n", "line 1: '0123' is not a hash"), ("\n", "names no document")):
        (tmp_path / "list").write_text(content)
        assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out" / "x", "--holdout", tmp_path / "list") == 2
        assert says in capsys.readouterr().err
    assert run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out" / "x", "--holdout", tmp_path / "no.jsonl") == 2
    assert "--holdout" in capsys.readouterr().err
    assert leftovers(tmp_path / "out") == []


# Arrays of jobs


@pytest.mark.parametrize("count", [1, 3, 11])
def test_shards_merge_into_what_one_run_writes(count: int, corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    """Also with more jobs than files, and with splits of which a shard has no document."""
    common = ("--split", "0.9,0.1", "--append-eod")
    assert run(corpus / "*", tokenizer, tmp_path / "whole" / "x", *common) == 0
    sizes = []
    for index in range(count):
        assert run(corpus / "*", tokenizer, tmp_path / "parts" / "x", *common, "--shard", f"{index}/{count}") == 0
        sizes.append(TokenShard.open(tmp_path / f"parts/x_train_shard_{index:05d}_of_{count:05d}").num_documents)
    for part in ("train", "val"):
        merge_data.main(["--output-prefix", str(tmp_path / "parts" / f"x_{part}")])
        for ending in ("bin", "idx", "meta.json"):
            name = f"x_{part}.{ending}"
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len([size for size in sizes if size]) >= min(count, 4)


def test_every_chunk_belongs_to_exactly_one_shard(corpus: Path) -> None:
    files = find_files([str(corpus / "*")])
    whole = [chunk.id for chunk in files.chunks()]
    for count in (1, 2, 5, 40):
        parts = [[chunk.id for chunk in files.chunks(InputRange(index, count))] for index in range(count)]
        assert [chunk for part in parts for chunk in part] == whole
    assert [chunk.id for chunk in files.chunks(start=whole[7])] == whole[7:]
    assert [c.id for c in files.chunks(InputRange(1, 2), whole[-2])] == whole[-2:]


# Failing environments


def test_output_directory_that_can_not_be_written(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS[:3])
    assert run(tmp_path / "a.jsonl", tokenizer, Path("/proc/self/x")) == 2  # a read-only file system
    assert re.fullmatch(r"DataError: /proc/self/x can't be written: .*\n", capsys.readouterr().err)


def test_read_only_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run as another user, because root ignores permissions."""
    write_lines(tmp_path / "a.jsonl", TEXTS[:3])
    (tmp_path / "out").mkdir(mode=0o555)
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            code = run(tmp_path / "a.jsonl", "byte", tmp_path / "out" / "x", "--accelerator", "none")
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert re.fullmatch(r"DataError: .*/out/x can't be written: Permission denied; .*\n", capfd.readouterr().err)
    assert leftovers(tmp_path / "out") == []


def test_an_empty_end_of_text_is_not_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """A shell variable that isn't set."""
    with pytest.raises(SystemExit, match="2"):
        preprocess.parse_arguments(["--input", "a", "--tokenizer", "byte", "--output-prefix", "d", "--eod-token", ""])
    assert "--eod-token: the token is empty" in capsys.readouterr().err
