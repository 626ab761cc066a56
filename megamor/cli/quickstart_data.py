"""Data of the quickstart: a corpus that every machine has, and a tokenizer made for it."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megamor.files import draft_for

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_SAMPLE_CHARACTERS = 12_000_000


def standard_library() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(limit_bytes: int | None = None) -> Iterator[tuple[str, str]]:
    """Name and text of the standard library's Python files, in order of their names; undecodable ones are left out."""
    root, total = standard_library(), 0
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield str(path.relative_to(root)), text
            total += len(text)
            if limit_bytes is not None and total >= limit_bytes:
                return


def write_corpus(path: Path, limit_bytes: int | None = None) -> dict[str, int]:
    """Write the corpus as JSON lines, one document a file; returns the number of documents and characters."""
    documents = characters = 0
    with draft_for(path) as draft, draft.open("w", encoding="utf-8") as out:
        for name, text in source_files(limit_bytes):
            out.write(json.dumps({"text": text, "meta": {"path": name}}) + "\n")
            documents += 1
            characters += len(text)
    return {"documents": documents, "characters": characters}


def train_tokenizer(corpus: Path, path: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on documents spread evenly over the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_documents(corpus), trainer)
    with draft_for(path) as draft:
        tokenizer.save(str(draft))


def sample_documents(corpus: Path) -> Iterator[str]:
    """Every n-th document, n such that about `TOKENIZER_SAMPLE_CHARACTERS` come together."""
    stride = max(1, corpus.stat().st_size // TOKENIZER_SAMPLE_CHARACTERS)
    with corpus.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number % stride == 0:
                yield json.loads(line)["text"]
