"""Megatron-LM and GPT-NeoX read the data that megamor writes, and the reverse; needs their checkouts.

    MEGAMOR_MEGATRON=/path/to/Megatron-LM MEGAMOR_NEOX=/path/to/gpt-neox pytest tests/contract/test_foreign_readers.py

Without the checkouts, the test vectors in tests/unit/test_data_format.py still pin the format.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamor.corpus.merge import merge_shards
from megamor.corpus.verify import verify_index
from megamor.corpus.writer import ShardWriter
from megamor.data.shard import TokenShard

DOCUMENTS = [[5, 6, 7], [], [8], list(range(300)), []]
VARIABLES = {"megatron": "MEGAMOR_MEGATRON", "neox": "MEGAMOR_NEOX"}


class Project:
    """One of the two checkouts."""

    def __init__(self, kind: str) -> None:
        checkout = os.environ.get(VARIABLES[kind])
        if not checkout:
            pytest.skip(f"{VARIABLES[kind]} names no checkout")
        self._command = [sys.executable, str(Path(__file__).with_name("foreign_code.py")), kind, checkout]
        self.kind = kind

    def run(self, *arguments: object, stdin: str = "") -> str:
        """Run foreign_code.py and parse the last line that it prints."""
        command = [*self._command, *map(str, arguments)]
        result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout.rpartition("\n")[0].rpartition("\n")[2]

    def read(self, prefix: Path) -> dict[str, Any]:
        """Sequences, item type and document index."""
        return json.loads(self.run("read", prefix))


@pytest.fixture(params=["megatron", "neox"])
def project(request: pytest.FixtureRequest) -> Project:
    return Project(request.param)


def write(prefix: Path, dtype: str) -> Path:
    with ShardWriter(prefix, dtype) as writer:
        for document in DOCUMENTS:
            writer.add(document)
        writer.commit()
    return prefix


def documents_of(prefix: Path) -> list[list[int]]:
    shard = TokenShard.open(prefix)
    verify_index(shard, None)
    return [shard.document(number).tolist() for number in range(shard.num_documents)]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_they_read_what_is_written_here(project: Project, dtype: str, tmp_path: Path) -> None:
    parts = [write(tmp_path / name, dtype) for name in "ab"]
    assert project.read(parts[0]) == {"sequences": DOCUMENTS, "dtype": dtype, "documents": list(range(6))}
    merge_shards(list(map(str, parts)), str(tmp_path / "merged"))
    merged = {"sequences": DOCUMENTS * 2, "dtype": dtype, "documents": list(range(11))}
    assert project.read(tmp_path / "merged") == merged


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_they_write_is_read_and_merged_here(project: Project, dtype: str, tmp_path: Path) -> None:
    """Documents of several sequences, of one empty sequence, and of no sequence."""
    written = [[[1, 2], [3]], [[]], [], [[4], [], [5, 6], list(range(300))]]
    expected = [[token for sequence in document for token in sequence] for document in written]
    project.run("write", tmp_path / "theirs", dtype, stdin=json.dumps(written))
    assert TokenShard.open(tmp_path / "theirs").dtype == np.dtype(dtype)
    assert documents_of(tmp_path / "theirs") == expected
    ours = write(tmp_path / "ours", dtype)
    merge_shards([str(tmp_path / "theirs"), str(ours)], str(tmp_path / "both"), assume_same_tokenizer=True)
    assert documents_of(tmp_path / "both") == [*expected, *DOCUMENTS]
    assert project.read(tmp_path / "both") == {
        "sequences": [sequence for document in written for sequence in document] + DOCUMENTS,
        "dtype": dtype,
        "documents": [0, 2, 3, 3, 7, 8, 9, 10, 11, 12],
    }


def test_what_they_merge_is_read_here(project: Project, tmp_path: Path) -> None:
    """GPT-NeoX writes a document index of just [0]; both tools accept only pairs in the folder."""
    (tmp_path / "parts").mkdir()
    for name in "ab":
        Path(f"{write(tmp_path / 'parts' / name, 'uint16')}.meta.json").unlink()
    project.run("merge", tmp_path / "parts", tmp_path / "merged")
    entries = len(project.read(tmp_path / "merged")["documents"])
    assert entries == (1 if project.kind == "neox" else 11)
    assert documents_of(tmp_path / "merged") == DOCUMENTS * 2
