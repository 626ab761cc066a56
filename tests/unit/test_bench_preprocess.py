"""megamor bench preprocess on a corpus of a few KiB, and the table from its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamor.bench import tables
from megamor.bench.preprocess import SCHEMA
from megamor.cli import bench
from megamor.corpus.tokenizer import byte_tokenizer


def test_report_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer(["<|endoftext|>"]).save(str(tmp_path / "tok.json"))
    texts = [f"document {n} " + "word " * (n % 50) for n in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "results" / "preprocess_here.json"
    command = ["preprocess", "--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tok.json")]
    bench.main([*command, "--rounds", "1", "--slow-megabytes", "0.01", "--copies", "2", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["schema"] == SCHEMA
    assert {"tokenizers", "gigatoken"} <= set(report["versions"])
    sizes = [case["text_bytes"] for case in report["cases"]]
    assert sizes[:5] == [sum(map(len, texts)) * copies for copies in (1, 2, 1, 1, 1)]
    assert 10_000 <= sizes[5] == sizes[6] < 10_500
    for case in report["cases"]:
        assert 0 < case["seconds"]["median"] < 60
        assert case["bytes_per_second"] == pytest.approx(case["text_bytes"] / case["seconds"]["median"])
    assert [memory["text_bytes"] for memory in report["memory"]] == [2 * sizes[0], sizes[5]]
    assert all(20e6 < memory["peak_bytes"] < 400e6 for memory in report["memory"])
    block = "<!-- generated: bench-preprocess -->\n<!-- /generated -->\n"
    table = tables.regenerate(block, out.parent)
    assert table.count("\n| ") == 8 + 3
    assert "| tokenizers alone (encode_batch_fast) |" in table
    assert report["command"] in table
