"""Merging shards, and finding the damaged part of a data set."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamor.cli import inspect_data, merge_data, preprocess
from megamor.corpus import merge, text
from megamor.corpus.array import parse_shard, shard_prefix, split_shard_prefix
from megamor.corpus.writer import ShardWriter
from megamor.data import shard as indexed
from megamor.data.meta import ShardMeta, meta_path
from megamor.data.shard import TokenShard
from megamor.errors import ConfigError
from tests.commands import flip_bit, refusal
from tests.unit.test_data_format import make_idx, meta_of, put

ROOT = Path(__file__).parents[2]
META = ShardMeta(tokenizer_name="t.json", tokenizer_sha256="ab", vocab_size=100, eod_id=0, eod_appended=True)


def write(prefix: Path | str, documents: list[list[int]], meta: ShardMeta = META, dtype: str = "u2") -> str:
    """A shard whose source is named after it."""
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
        counts = {"documents": len(documents), "tokens": sum(map(len, documents))}
        writer.commit(replace(meta, sources=meta.sources or [{"name": Path(prefix).name, **counts}]))
    return str(prefix)


def documents_of(prefix: Path | str) -> list[list[int]]:
    shard = TokenShard.open(prefix)
    return [shard.document(n).tolist() for n in range(shard.num_documents)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a merge that must be refused."""
    return refusal(capsys, merge_data.main, *arguments)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=6), min_size=1, max_size=5),
    dtype=st.sampled_from(["u2", "i4"]),
)
def test_merged_is_what_one_run_would_write(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[int]]], dtype: str
) -> None:
    """Includes empty shards and documents, and processes few items at a time so that every loop runs several times."""
    folder = tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "_READ_BYTES", 12)
        patch.setattr(merge, "_ENTRIES", 2)
        for index, documents in enumerate(parts):
            source = [{"name": "all", "documents": len(documents), "tokens": sum(map(len, documents))}]
            write(shard_prefix(str(folder / "x"), index, len(parts)), documents, replace(META, sources=source), dtype)
        merge_data.main(["--output-prefix", str(folder / "x")])
    whole = [document for documents in parts for document in documents]
    source = [{"name": "all", "documents": len(whole), "tokens": sum(map(len, whole))}]
    write(folder / "whole", whole, replace(META, sources=source), dtype)
    for ending in ("bin", "idx", "meta.json"):
        assert (folder / f"x.{ending}").read_bytes() == (folder / f"whole.{ending}").read_bytes(), ending


def test_block_hashes_across_shards(tmp_path: Path) -> None:
    """Shards end inside blocks of the merged file, so its block hashes must be computed anew."""
    parts = [write(tmp_path / f"p{n}", [[n] * 3_000_000, [7] * (n * 1111)]) for n in range(13)]
    merge_data.main(["--inputs", *parts, "--output-prefix", str(tmp_path / "x")])
    meta = meta_of(tmp_path / "x")
    assert len(meta.bin_block_sha256) == 2
    assert [source["name"] for source in meta.sources] == [f"p{n}" for n in range(13)]
    assert meta.sources[2] == {"name": "p2", "documents": 2, "tokens": 3_002_222}
    inspect_data.main([str(tmp_path / "x"), "--verify"])


def test_foreign_pairs_keep_their_documents(tmp_path: Path) -> None:
    """Documents of several sequences and of none, and the short document index of GPT-NeoX's merge."""
    tokens, several = np.arange(5, dtype="<u2").tobytes(), make_idx([2, 0, 3, 0], [0, 2, 2, 4])
    pairs = [
        put(tmp_path / "a", tokens, several),
        put(tmp_path / "b", np.arange(10, 15, dtype="<u2").tobytes(), make_idx([2, 3], [0])),
        put(tmp_path / "c", b"", make_idx([], [0])),
        put(tmp_path / "d", tokens, several),
    ]
    merge_data.main(["--inputs", *pairs, "--output-prefix", str(tmp_path / "x")])
    expected = [[0, 1], [], [2, 3, 4]]
    assert documents_of(tmp_path / "x") == [*expected, [10, 11], [12, 13, 14], *expected]
    assert (tmp_path / "x.idx").read_bytes() == make_idx([2, 0, 3, 0, 2, 3, 2, 0, 3, 0], [0, 2, 2, 4, 5, 6, 8, 8, 10])
    meta = meta_of(tmp_path / "x")
    assert (meta.tokenizer_sha256, meta.eod_appended, meta.documents) == (None, None, 8)
    inspect_data.main([str(tmp_path / "x")])


def test_missing_shards_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in (0, 1, 3):
        write(shard_prefix(str(tmp_path / "x"), index, 5), [[index]])
    message = refused(capsys, "--output-prefix", tmp_path / "x")
    assert f"2 of the 5 shards of {tmp_path}/x are missing: 2, 4; write them with --shard 2/5" in message
    inputs = [shard_prefix(str(tmp_path / "x"), index, 5) for index in (0, 1, 3)]
    assert "missing: 2, 4" in refused(capsys, "--inputs", *inputs, "--output-prefix", tmp_path / "y")
    write(shard_prefix(str(tmp_path / "x"), 0, 2), [[0]])
    assert "runs with 2 and 5 shards" in refused(capsys, "--output-prefix", tmp_path / "x")
    assert "there are no shards" in refused(capsys, "--output-prefix", tmp_path / "other")
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer_sha256": "cd"}, "differ in tokenizer_sha256 ('ab' and 'cd')"),
        ({"eod_appended": False}, "differ in eod_appended (True and False)"),
        ({"vocab_size": 101}, "differ in vocab_size (100 and 101)"),
    ],
)
def test_shards_that_were_made_differently(
    tmp_path: Path, change: dict, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = write(tmp_path / "a", [[1]]), write(tmp_path / "b", [[2]], replace(META, **change))
    message = refused(capsys, "--inputs", one, other, "--output-prefix", tmp_path / "x")
    assert f"{one}.meta.json and {other}.meta.json {says}" in message
    write(tmp_path / "b", [[2]], replace(META, tokenizer_name="elsewhere.json"))
    merge_data.main(["--inputs", one, other, "--output-prefix", str(tmp_path / "x")])


def test_what_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, wide = write(tmp_path / "a", [[1]]), write(tmp_path / "w", [[1]], dtype="i4")
    foreign = put(tmp_path / "f", np.arange(5, dtype="<u2").tobytes(), make_idx([2, 3], [0, 1, 2]))
    modes = put(tmp_path / "m", np.arange(5, dtype="<u2").tobytes(), make_idx([2, 3], [0, 1, 2], tail=b"\0\1"))
    for inputs, says in (
        ([one, wide], f"{one}.bin holds uint16 and {wide}.bin int32"),
        ([one, foreign], f"{foreign} has no side file"),
        ([foreign, modes], "multimodal"),
        ([one, f"{tmp_path}/./a"], "are the same shard"),
        ([one, f"{tmp_path}/none"], "none.idx doesn't exist"),
    ):
        assert says in refused(capsys, "--inputs", *inputs, "--output-prefix", tmp_path / "x")
    assert "is one of the shards to merge" in refused(capsys, "--inputs", one, "--output-prefix", one)
    with ShardWriter(tmp_path / "x", "u2"):
        assert "another process is writing" in refused(capsys, "--inputs", one, "--output-prefix", tmp_path / "x")
    assert not list(tmp_path.glob("x.*"))
    arguments = ["--inputs", one, foreign, "--output-prefix", str(tmp_path / "x")]
    merge_data.main([*arguments, "--assume-same-tokenizer"])
    assert documents_of(tmp_path / "x") == [[1], [0, 1], [2, 3, 4]]


@pytest.mark.parametrize(("part", "offset"), [("a.bin", 4), ("a.idx", 34 + 4 * 3 + 8)])
def test_damaged_shards_are_not_merged(
    tmp_path: Path, part: str, offset: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [write(tmp_path / name, [[1, 2], [3], [4]]) for name in "ab"]
    flip_bit(tmp_path / part, offset)
    message = refused(capsys, "--inputs", *shards, "--output-prefix", tmp_path / "x")
    assert str(tmp_path / part) in message
    assert not list(tmp_path.glob("x.*"))


SEQUENCES = 5
PARTS = {
    "magic": ("idx", 3, "not a Megatron index"),
    "version": ("idx", 9, "version 0"),
    "item type": ("idx", 17, "dtype code 9"),
    "sequences": ("idx", 18, "its header"),
    "documents": ("idx", 26, "its header"),
    "length": ("idx", 34, "the offset of sequence 1 (and 3 others) is wrong"),
    "sign of a length": ("idx", 34 + 3, "the offset of sequence 1"),
    "offset": ("idx", 34 + 4 * SEQUENCES + 8, "the offset of sequence 1 is wrong"),
    "high byte of an offset": ("idx", 34 + 4 * SEQUENCES + 8 + 7, "the offset of sequence 1 is wrong"),
    "first offset": ("idx", 34 + 4 * SEQUENCES, "x.bin has"),
    "document index": ("idx", 34 + 12 * SEQUENCES + 8, "document index at entry 1"),
    "end of the document index": ("idx", 34 + 12 * SEQUENCES + 8 * SEQUENCES, "document index runs from 0 to 4"),
    "a token": ("bin", 6, "x.bin is damaged: bytes 0 to 29"),
    "high byte of a token": ("bin", 7, "token id 259 at token 3 is outside the vocabulary of 100"),
}


@pytest.mark.parametrize("side_file", [True, False], ids=["with side file", "foreign"])
@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_is_found_in_every_part(
    tmp_path: Path, part: str, side_file: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "x", [[n + 1] * (n + 1) for n in range(SEQUENCES)])
    ending, offset, says = PARTS[part]
    inspect_data.main([prefix, "--verify"])
    flip_bit(tmp_path / f"x.{ending}", offset)
    if not side_file:
        meta_path(prefix).unlink()
        if ending == "bin":  # no hash or vocabulary to compare tokens with
            inspect_data.main([prefix, "--verify"])
            return
    assert says in refusal(capsys, inspect_data.main, prefix, "--verify")


def test_all_faults_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x", [[1], [2, 2], [3]])
    flip_bit(tmp_path / "x.bin", 1)
    index = bytearray((tmp_path / "x.idx").read_bytes())
    struct.pack_into("<i", index, 34, -1)
    struct.pack_into("<q", index, 34 + 12 + 8, 4)
    (tmp_path / "x.idx").write_bytes(index)
    message = refusal(capsys, inspect_data.main, prefix)
    assert message.startswith("DataError: 5 faults:\n")
    for fault in ("negative length", "offset of sequence 1", "(SHA-256)", "token id 257", "bytes 0 to 7"):
        assert fault in message


def test_memory_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    """Merging 400 MB needs less than 100 MB more memory than merging an empty shard."""
    zeros = np.zeros(2**25, np.uint16)
    for name, copies in (("small", 0), ("a", 3), ("b", 3)):
        with ShardWriter(tmp_path / name, "u2") as writer:
            for _ in range(copies):
                writer.add(zeros)
            writer.commit()
    code = (
        "import resource, sys; from megamor.cli.merge_data import main; main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak_mb(*names: str) -> float:
        inputs = [str(tmp_path / name) for name in names]
        command = [sys.executable, "-c", code, "--inputs", *inputs, "--output-prefix", str(tmp_path / "out")]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        return int(shown.splitlines()[-1]) / 1024

    assert peak_mb("a", "b") - peak_mb("small") < 100


def test_names_of_shards() -> None:
    name = shard_prefix("data/pile_train", 3, 16)
    assert name == "data/pile_train_shard_00003_of_00016"
    assert split_shard_prefix(name) == ("data/pile_train", 3, 16)
    assert split_shard_prefix("data/pile_shard_x") is None
    assert parse_shard("0/1") == (0, 1)
    for wrong in ("1/1", "-1/4", "0/0", "3", "a/b", "1/2/3"):
        with pytest.raises(ConfigError, match="--shard"):
            parse_shard(wrong)


def test_merged_jobs_equal_one_preprocessing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More jobs than files, some with no text: the merged splits and side files equal those of a single run."""
    monkeypatch.setattr(text, "CHUNK_BYTES", 500)
    for name in "ab":
        lines = [json.dumps({"text": f"{name}{number} " * (number % 50 + 1)}) for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    arguments = ["--input", f"{tmp_path}/*.jsonl", "--tokenizer", "byte", "--append-eod", "--split", "0.9,0.1"]
    arguments += ["--workers", "1", "--output-prefix"]
    preprocess.main([*arguments, str(tmp_path / "one")])
    for index in range(7):
        preprocess.main([*arguments, str(tmp_path / "x"), "--shard", f"{index}/7"])
    for split in ("train", "val"):
        merge_data.main(["--output-prefix", str(tmp_path / f"x_{split}")])
        for ending in ("bin", "idx"):
            assert (tmp_path / f"x_{split}.{ending}").read_bytes() == (tmp_path / f"one_{split}.{ending}").read_bytes()
        one, merged = meta_of(tmp_path / f"one_{split}"), meta_of(tmp_path / f"x_{split}")
        assert replace(merged, tokenizer_name=None) == replace(one, tokenizer_name=None)


def test_jobs_that_end_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs write the same tokenizer file at the same time."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name * 9}) + "\n")
    command = ["--input", f"{tmp_path}/*.jsonl", "--tokenizer", "byte", "--output-prefix", str(tmp_path / "x")]
    rename = os.replace

    def with_the_other(draft: str, path: str) -> None:
        if str(path) == str(tmp_path / "x.tokenizer.json"):
            monkeypatch.setattr(os, "replace", rename)
            preprocess.main([*command, "--shard", "1/2", "--workers", "1"])
        rename(draft, path)

    monkeypatch.setattr(os, "replace", with_the_other)
    preprocess.main([*command, "--shard", "0/2", "--workers", "1"])
    assert os.replace is rename, "the other job has run"
    assert not list(tmp_path.glob("*.partial"))
    merge_data.main(["--output-prefix", str(tmp_path / "x")])
    assert documents_of(tmp_path / "x") == [[97] * 9, [98] * 9]


def test_sources_whose_tokens_are_not_in_the_listed_order_are_marked(tmp_path: Path) -> None:
    """x comes again after y; in the second case, it comes first in the list and second in the data."""
    for number, (first, second) in enumerate([((2, 2), (2, 0)), ((0, 2), (2, 0)), ((2, 2), (0, 2)), ((2, 0), (2, 2))]):
        parts = []
        for part, counts in enumerate((first, second)):
            listed = [{"name": name, "documents": n // 2, "tokens": n} for name, n in zip("xy", counts, strict=True)]
            name = tmp_path / f"{number}_{part}"
            parts.append(write(name, [[1, 2]] * (sum(counts) // 2), replace(META, sources=listed)))
        merge_data.main(["--inputs", *parts, "--output-prefix", str(tmp_path / f"all_{number}")])
        meta = meta_of(tmp_path / f"all_{number}")
        assert [source.get("scattered", False) for source in meta.sources] == [number < 2, False]
