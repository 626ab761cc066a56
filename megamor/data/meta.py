"""The side file `<prefix>.meta.json`: what the `.bin`/`.idx` pair itself can't say.

Which tokenizer wrote the ids, whether documents end with an end-of-document token, which texts went in, and the hashes
that prove the pair is still what was written. Pairs from Megatron-LM and GPT-NeoX have none and are accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megamor.errors import DataError

FORMAT = "megamor-token-shard"
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ShardMeta:
    """Contents of `<prefix>.meta.json`. Token and document counts and hashes are filled in by the writer.

    None is what isn't known, such as the tokenizer of merged foreign data. `sources` lists the texts in order, each
    with at least a `name`. `bin_block_sha256` has one SHA-256 for each `bin_block_bytes` bytes of the `.bin` file, the
    last block shorter.
    """

    tokenizer_name: str | None = None
    tokenizer_sha256: str | None = None
    vocab_size: int | None = None
    eod_token: str | None = None
    eod_id: int | None = None
    eod_appended: bool | None = None
    sources: Sequence[Mapping[str, Any]] = ()
    dtype: str = ""
    documents: int = 0
    tokens: int = 0
    idx_sha256: str = ""
    bin_block_bytes: int = BLOCK_BYTES
    bin_block_sha256: Sequence[str] = ()
    format: str = field(default=FORMAT)

    def to_json(self) -> str:
        """The text of the side file: a function of the contents alone, so equal data gives equal bytes."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def meta_path(prefix: str) -> Path:
    """Where the side file of `prefix` lives."""
    return Path(f"{prefix}.meta.json")


def read_meta(prefix: str) -> ShardMeta | None:
    """Read `<prefix>.meta.json`, or None for a foreign pair that has no such file.

    Raises DataError if the file is there but isn't a megamor side file. Keys this version doesn't know are ignored, so
    that files of a later version can still be read.
    """
    path = meta_path(prefix)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); delete it to treat the pair as foreign data") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a megamor side file; delete it to treat the pair as foreign data")
    known = {f.name for f in fields(ShardMeta)}
    return ShardMeta(**{key: value for key, value in content.items() if key in known})


class BlockHasher:
    """SHA-256 of every `block_bytes` bytes of a stream, fed piece by piece."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._hash = hashlib.sha256()
        self._filled = 0
        self._digests: list[str] = []

    def update(self, data: memoryview) -> None:
        """Add bytes (a one-dimensional view of bytes)."""
        while len(data):
            taken = data[: self._block_bytes - self._filled]
            self._hash.update(taken)
            self._filled += len(taken)
            data = data[len(taken) :]
            if self._filled == self._block_bytes:
                self._close_block()

    def digests(self) -> list[str]:
        """The hashes of all blocks so far; ends the stream."""
        if self._filled:
            self._close_block()
        return self._digests

    def _close_block(self) -> None:
        self._digests.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()
        self._filled = 0


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal. Raises DataError if it can't be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    return digest.hexdigest()
