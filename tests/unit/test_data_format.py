"""Token shards on disk: the bytes of the format, what the reader accepts, and what an interrupted writer leaves."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamor.corpus import writer as writer_module
from megamor.corpus.verify import token_faults, verify_index
from megamor.corpus.writer import ShardWriter
from megamor.data.meta import BlockHasher, ShardMeta, fingerprint, read_meta
from megamor.data.shard import TokenShard, dtype_for_vocab
from megamor.errors import DataError
from tests.commands import flip_bit

# Both foreign readers return exactly the documents [1, 2, 0] and [513, 0] from these.
BIN_U16 = bytes.fromhex("01000200000001020000")
IDX_U16 = bytes.fromhex(
    "4d4d4944494458000001000000000000000802000000000000000300000000000000030000000200000000000000000000000600000000000000"
    "000000000000000001000000000000000200000000000000"
)
BIN_I32 = bytes.fromhex("0100000002000000000000000102000000000000")
DOCUMENTS = [[1, 2, 0], [513, 0]]


def idx_i32() -> bytes:
    """The uint16 test vector with the type code and the second offset of int32."""
    return IDX_U16[:17] + b"\x04" + IDX_U16[18:50] + b"\x0c" + IDX_U16[51:]


def put(prefix: Path, bin_bytes: bytes, idx_bytes: bytes) -> str:
    Path(f"{prefix}.bin").write_bytes(bin_bytes)
    Path(f"{prefix}.idx").write_bytes(idx_bytes)
    return str(prefix)


def meta_of(prefix: Path | str) -> ShardMeta:
    """The side file of a shard that must have one."""
    meta = read_meta(str(prefix))
    assert meta is not None
    return meta


def make_idx(lengths: list[int], documents: list[int], *, code: int = 8, size: int = 2, tail: bytes = b"") -> bytes:
    """An index built by the table of the format, independently of the writer."""
    starts = [sum(lengths[:i]) * size for i in range(len(lengths))]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    body = struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(documents)}q", *lengths, *starts, *documents)
    return header + body + tail


@pytest.mark.parametrize(("dtype", "bin_bytes", "idx_bytes"), [("u2", BIN_U16, IDX_U16), ("i4", BIN_I32, idx_i32())])
def test_vectors_both_ways(tmp_path: Path, dtype: str, bin_bytes: bytes, idx_bytes: bytes) -> None:
    shard = TokenShard.open(put(tmp_path / "given", bin_bytes, idx_bytes))
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == DOCUMENTS
    with ShardWriter(tmp_path / "written", dtype) as writer:
        for document in DOCUMENTS:
            writer.add(document)
        writer.commit()
    assert (tmp_path / "written.bin").read_bytes() == bin_bytes
    assert (tmp_path / "written.idx").read_bytes() == idx_bytes


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**15 - 1), max_size=20), max_size=12),
    dtype=st.sampled_from(["u2", "i4", "i8"]),
    in_one_call=st.booleans(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str, in_one_call: bool
) -> None:
    prefix = tmp_path_factory.mktemp("data") / "x"
    with ShardWriter(prefix, dtype) as writer:
        if in_one_call:
            flat = np.array([token for document in documents for token in document], np.int64)
            writer.add_documents(flat, np.array([len(document) for document in documents], np.int32))
        else:
            for document in documents:
                writer.add(document)
        writer.commit()
    shard = TokenShard.open(prefix)
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == documents
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    size = np.dtype(dtype).itemsize
    expected = make_idx(
        [len(d) for d in documents], list(range(len(documents) + 1)), code={"u2": 8, "i4": 4, "i8": 5}[dtype], size=size
    )
    assert Path(f"{prefix}.idx").read_bytes() == expected
    meta = read_meta(str(prefix))
    verify_index(shard, meta)
    assert list(token_faults(shard, meta)) == []


def test_documents_of_several_sequences_and_empty_ones(tmp_path: Path) -> None:
    idx = make_idx([2, 0, 3, 0], [0, 2, 2, 4])
    shard = TokenShard.open(put(tmp_path / "x", np.arange(5, dtype="<u2").tobytes(), idx))
    assert [shard.document(i).tolist() for i in range(3)] == [[0, 1], [], [2, 3, 4]]
    assert shard.lengths.tolist() == [2, 0, 3, 0]
    verify_index(shard, None)


@pytest.mark.parametrize(
    "idx_bytes",
    [make_idx([2, 3], [0]), make_idx([2, 3], [0, 1, 2], tail=b"\0\1")],
    ids=["short document index: one document a sequence", "multimodal: trailing modes"],
)
def test_indexes_of_other_tools(tmp_path: Path, idx_bytes: bytes) -> None:
    shard = TokenShard.open(put(tmp_path / "x", np.arange(5, dtype="<u2").tobytes(), idx_bytes))
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == [[0, 1], [2, 3, 4]]


def test_offsets_beyond_two_gibibytes(tmp_path: Path) -> None:
    """Byte offsets are 64 bits: computed and checked for a (sparse) file of over 4 GiB."""
    lengths = [2**29, 2**29, 3]
    idx = make_idx(lengths, [0, 1, 2, 3], code=4, size=4)
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(sum(lengths) * 4)
        file.seek(2**32)
        file.write(struct.pack("<3i", 7, 8, 9))
    (tmp_path / "x.idx").write_bytes(idx)
    shard = TokenShard.open(tmp_path / "x")
    assert shard.document(2).tolist() == [7, 8, 9]
    verify_index(shard, None)


@pytest.mark.parametrize("chunk", [2, 1000])
def test_writer_computes_offsets_in_64_bits_and_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(writer_module, "_ENTRIES", chunk)
    lengths = [2**30, 5, 2**30, 0, 7]
    file = io.BytesIO(bytes(34) + struct.pack("<5i", *lengths))
    assert writer_module.write_index(file, len(lengths), sum(lengths), np.dtype("<i4")) == len(lengths)
    assert file.getvalue() == make_idx(lengths, list(range(6)), code=4, size=4)


def test_dtype_of_vocabulary() -> None:
    assert dtype_for_vocab(65_499) == np.uint16
    assert dtype_for_vocab(65_500) == np.int32


OK_BIN = np.arange(5, dtype="<u2").tobytes()
OK_IDX = make_idx([2, 3], [0, 1, 2])


@pytest.mark.parametrize(
    ("bin_bytes", "idx_bytes", "file", "says"),
    [
        (OK_BIN[:-1], OK_IDX, "x.bin", "9 bytes.*says 10"),
        (OK_BIN + b"\0\0", OK_IDX, "x.bin", "12 bytes.*says 10"),
        (b"", OK_IDX, "x.bin", "0 bytes.*says 10"),
        (OK_BIN, OK_IDX[:-1], "x.idx", "81 bytes.*needs 82"),
        (OK_BIN, OK_IDX[:20], "x.idx", "20 bytes"),
        (OK_BIN, b"", "x.idx", "not a Megatron index"),
        (OK_BIN, b"TNTIDX\0\0" + OK_IDX[8:], "x.idx", "TNTIDX format"),
        (OK_BIN, b"PARQUET\0\0" + OK_IDX[9:], "x.idx", "not a Megatron index"),
        (OK_BIN, OK_IDX[:9] + b"\x02" + OK_IDX[10:], "x.idx", "version 2"),
        (OK_BIN, make_idx([2, 3], [0, 1, 2], code=7), "x.idx", "dtype code 7"),
        (OK_BIN, make_idx([2, 3], [0, 1, 1]), "x.idx", "document index"),
        (OK_BIN, make_idx([2, 3], [1, 1, 2]), "x.idx", "document index"),
        (OK_BIN, make_idx([2, 3], []), "x.idx", "damaged"),
    ],
)
def test_damaged_pairs_are_refused(tmp_path: Path, bin_bytes: bytes, idx_bytes: bytes, file: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        TokenShard.open(put(tmp_path / "x", bin_bytes, idx_bytes))
    assert str(tmp_path / file) in str(caught.value)


def test_missing_pair_suggests_existing_ones(tmp_path: Path) -> None:
    put(tmp_path / "there", OK_BIN, OK_IDX)
    with pytest.raises(DataError, match=r"absent\.idx doesn't exist.*there"):
        TokenShard.open(tmp_path / "absent")
    with pytest.raises(DataError, match=r"without the ending: .*there$"):
        TokenShard.open(tmp_path / "there.bin")


WRONG_OFFSET = bytearray(make_idx([1, 2, 2], [0, 1, 2, 3]))
struct.pack_into("<q", WRONG_OFFSET, 34 + 12 + 8, 4)


@pytest.mark.parametrize(
    ("idx_bytes", "says"),
    [
        (make_idx([5, -3, 3], [0, 1, 2, 3]), "negative length"),
        (make_idx([2, 3], [0, 2, 1, 2]), "document index"),
        (WRONG_OFFSET, "offset of sequence 1"),
    ],
)
def test_verify_finds_damage_inside_the_index(tmp_path: Path, idx_bytes: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        verify_index(TokenShard.open(put(tmp_path / "x", OK_BIN, idx_bytes)), None)


def written(prefix: Path, documents: list[list[int]], **meta: object) -> TokenShard:
    with ShardWriter(prefix, "u2") as writer:
        for document in documents:
            writer.add(document)
        writer.commit(ShardMeta(**meta))  # type: ignore[arg-type]
    return TokenShard.open(prefix)


def test_verify_finds_one_flipped_bit_and_foreign_ids(tmp_path: Path) -> None:
    written(tmp_path / "x", [[1, 2, 3]] * 100, vocab_size=4)
    flip_bit(tmp_path / "x.bin", 300)
    (fault,) = token_faults(TokenShard.open(tmp_path / "x"), meta_of(tmp_path / "x"))
    assert "x.bin is damaged: bytes 0 to 599" in fault
    written(tmp_path / "y", [[1, 2, 9]], vocab_size=4)
    (fault,) = token_faults(TokenShard.open(tmp_path / "y"), meta_of(tmp_path / "y"))
    assert "y.bin is damaged: token id 9 at token 2 is" in fault


def test_verify_notices_the_index_of_another_pair(tmp_path: Path) -> None:
    written(tmp_path / "x", [[1, 2], [3]])
    written(tmp_path / "y", [[1], [2, 3]])
    (tmp_path / "x.idx").write_bytes((tmp_path / "y.idx").read_bytes())
    with pytest.raises(DataError, match="SHA-256"):
        verify_index(TokenShard.open(tmp_path / "x"), read_meta(str(tmp_path / "x")))


def test_nothing_under_the_final_name_until_commit(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", "u2") as writer:
        writer.add([1, 2])
        assert not {"x.bin", "x.idx", "x.meta.json"} & {p.name for p in tmp_path.iterdir()}
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "x", "u2") as writer:
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_aborted_rewrite_leaves_the_old_data(tmp_path: Path) -> None:
    written(tmp_path / "x", [[1, 2]])
    with ShardWriter(tmp_path / "x", "u2") as writer:
        writer.add([9] * 50)
    assert TokenShard.open(tmp_path / "x").tokens.tolist() == [1, 2]
    written(tmp_path / "x", [[9] * 50])
    assert TokenShard.open(tmp_path / "x").num_tokens == 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.meta.json"]


def test_remains_of_a_killed_run_are_overwritten(tmp_path: Path) -> None:
    for name in ("x.bin.partial", "x.idx.partial"):
        (tmp_path / name).write_bytes(b"rubbish" * 1000)
    assert written(tmp_path / "x", [[1, 2]]).tokens.tolist() == [1, 2]


def test_second_writer_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", "u2") as first:
        first.add([1])
        with pytest.raises(DataError, match="another process is writing"):
            ShardWriter(tmp_path / "x", "u2")
        first.add([2])
        first.commit()
    assert TokenShard.open(tmp_path / "x").tokens.tolist() == [1, 2]


@pytest.mark.parametrize("ids", [[65_536], [-1]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with ShardWriter(tmp_path / "x", "u2") as writer, pytest.raises(DataError, match="don't fit uint16"):
        writer.add(ids)


def test_unwritable_path_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't be written"):
        ShardWriter(tmp_path / "file" / "x", "u2")


def test_block_hashes_do_not_depend_on_how_data_is_fed() -> None:
    data = bytes(range(256)) * 10
    whole, fed = BlockHasher(1000), BlockHasher(1000)
    whole.update(memoryview(data))
    for start in range(0, len(data), 77):
        fed.update(memoryview(data)[start : start + 77])
    digests = whole.digests()
    assert digests == fed.digests()
    assert len(digests) == 3


def test_meta_survives_unknown_keys_and_refuses_other_files(tmp_path: Path) -> None:
    written(tmp_path / "x", [[1]], vocab_size=7)
    path = tmp_path / "x.meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": 1}))
    assert meta_of(tmp_path / "x").vocab_size == 7
    for text in ("{}", "[1]", "{"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"x\.meta\.json"):
            read_meta(str(tmp_path / "x"))


def test_fingerprint_depends_on_contents_not_on_the_path(tmp_path: Path) -> None:
    same = [fingerprint(written(tmp_path / name, [[1, 2], [3]])) for name in ("a", "b")]
    other_tokens = fingerprint(written(tmp_path / "c", [[1, 2], [4]]))
    other_cut = fingerprint(written(tmp_path / "d", [[1], [2, 3]]))
    assert same[0] == same[1]
    assert len({same[0], other_tokens, other_cut}) == 3
    foreign = fingerprint(TokenShard.open(put(tmp_path / "e", BIN_U16, IDX_U16)))
    changed = fingerprint(TokenShard.open(put(tmp_path / "e", BIN_U16[:-2] + b"\x05\x00", IDX_U16)))
    assert foreign != changed


@pytest.mark.parametrize("wrong", [{"sources": 3}, {"tokens": "x"}, {"eod_id": "x"}, {"bin_block_sha256": 7}])
def test_a_side_file_with_values_of_other_types_is_damaged(wrong: dict[str, object], tmp_path: Path) -> None:
    side_file = tmp_path / "a.meta.json"
    side_file.write_text(json.dumps({"format": "megamor-token-shard", **wrong}))
    with pytest.raises(DataError, match=rf"a\.meta\.json is damaged \(.*{next(iter(wrong))}"):
        read_meta(str(tmp_path / "a"))
    side_file.write_text(json.dumps({"format": "megamor-token-shard", "sources": [{"name": "x"}], "of_later": 1}))
    assert read_meta(str(tmp_path / "a")) == ShardMeta(sources=[{"name": "x"}])
