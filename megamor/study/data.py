"""Data of a study: a tokenizer and shards made from text files, or from a corpus of `megamor fetch-data`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megamor.codec import DEFAULT_EOD_TOKENS
from megamor.config import literal
from megamor.corpus.bpe import sample_texts, train_bpe
from megamor.corpus.documents import parse_chunk
from megamor.corpus.stdlib import source_files
from megamor.corpus.text import FileInput, find_files
from megamor.corpus.tokenizer import char_tokenizer
from megamor.errors import DataError, MegamorError
from megamor.files import replace_file

VALIDATION_FRACTION = 0.03
SAMPLE_BYTES = 12_000_000
"""Text that a BPE tokenizer is trained on, at most."""
STDLIB = "python-stdlib"
"""A corpus that every machine has: the source code of Python's standard library."""


def prepare(data: Mapping[str, Any], root: Path, vocab_size: int) -> dict[str, Any]:
    """Make tokenizer and shards below `root` unless they exist; returns the settings `data` that use them.

    Raises:
        DataError: the text is missing or too short to split.
        MegamorError: a command failed, and has printed why.
    """
    root = root.resolve()
    train, held_out, tokenizer = root / "train", root / "validation", root / "tokenizer.json"
    done = root / "prepared.json"
    wanted = json.dumps([data, vocab_size], sort_keys=True)
    if not done.exists() or done.read_text(encoding="utf-8") != wanted:
        root.mkdir(parents=True, exist_ok=True)
        files = _corpus(data, root) if "corpus" in data else _split_text(data, root)
        kind = data.get("tokenizer", "bpe")
        if kind in ("bpe", "char"):
            if kind == "bpe":
                train_file = FileInput([str(files[0])])
                sample = sample_texts(train_file, SAMPLE_BYTES, "text", None, skip_bad=False, advance=lambda read: None)
                made = train_bpe(sample, vocab_size, DEFAULT_EOD_TOKENS[:1])
            else:
                made = char_tokenizer(_texts(FileInput([*map(str, files)])))
            replace_file(tokenizer, made.to_str(pretty=True))
        else:
            replace_file(tokenizer, Path(kind).read_text(encoding="utf-8"))
        # Characters have no end of text: these corpora are one document.
        eod = [] if kind == "char" else ["--append-eod"]
        for source, prefix in zip(files, (train, held_out), strict=True):
            options = ["--input", str(source), "--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
            _call("preprocess", *options, *eod)
        replace_file(done, wanted)
    return {
        "train": [{"prefix": literal(train)}],
        "validation": {str(data.get("corpus", "text")): literal(held_out)},
        "tokenizer": literal(tokenizer),
    }


def _corpus(data: Mapping[str, Any], root: Path) -> list[Path]:
    """Training and validation files of a corpus."""
    name, raw = data["corpus"], root / "raw"
    if name == STDLIB:
        return _write_split([text for _, text in source_files()], data, root)
    split = data.get("validation_split", "test" if name == "tiny-shakespeare" else "validation")
    wanted = ("train", split)
    downloaded = Path("data/raw") / name  # where `megamor fetch-data` writes unless told otherwise
    raw = downloaded if all(any(downloaded.glob(f"{each}.*")) for each in wanted) else raw / name
    if not all(any(raw.glob(f"{each}.*")) for each in wanted):
        local = ["--from", str(data["from"])] if "from" in data else []
        _call("fetch-data", name, "--output-dir", str(raw.parent), "--splits", *wanted, *local)
    found = [next(raw.glob(f"{each}.*"), None) for each in wanted]
    return [path for path in found if path is not None]


def _split_text(data: Mapping[str, Any], root: Path) -> list[Path]:
    """Files of a user's text, split by document, or at a line if there are too few documents."""
    return _write_split([*_texts(find_files(data["text"], option="data.text"))], data, root)


def _write_split(texts: Sequence[str], data: Mapping[str, Any], root: Path) -> list[Path]:
    fraction = float(data.get("validation", VALIDATION_FRACTION))
    every = max(2, round(1 / fraction))
    if len(texts) >= 10 * every:
        held_out = set(texts[::every])  # without copies of them in training
        parts = [[t for t in texts if t not in held_out], [*texts[::every]]]
    else:
        cuts = [_cut(text, int(len(text) * (1 - fraction))) for text in texts]
        pairs = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
        parts = [[first for first, _ in pairs], [second for _, second in pairs]]
    paths = [root / "train.jsonl", root / "validation.jsonl"]
    for path, part in zip(paths, parts, strict=True):
        if not any(text.strip() for text in part):
            raise DataError(f"data.text: the text is too short to keep {fraction:.0%} of it for validation: add text")
        replace_file(path, "".join(json.dumps({"text": text}) + "\n" for text in part if text.strip()))
    return paths


def _cut(text: str, end: int) -> int:
    """Where to cut `text` in two: after the last line break before `end` or, if lines are long, there."""
    line = text.rfind("\n", max(0, 2 * end - len(text)), end) + 1
    return line or end


def _texts(files: FileInput) -> Iterator[str]:
    for chunk in files.chunks():
        yield from parse_chunk(chunk, "text", None).texts


def _call(command: str, *options: str) -> None:
    status = subprocess.run([sys.executable, "-m", "megamor", command, *options], check=False).returncode
    if status:
        raise MegamorError(f"megamor {command} exited with status {status}; its message is above")
