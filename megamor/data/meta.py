"""The side file `<prefix>.meta.json`, which describes what the `.bin`/`.idx` pair can't, and fingerprints of shards.

The side file names the tokenizer that wrote the ids, the end-of-document token, the texts that went in, and hashes to
check the pair against. Pairs from Megatron-LM and GPT-NeoX have no side file and are accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megamor.codec import EndOfText
from megamor.data.shard import TokenShard, mask_path
from megamor.errors import DataError
from megamor.files import parse_json, sha256_of_file

FORMAT = "megamor-token-shard"
BLOCK_BYTES = 64 * 2**20
_PROBES = 1024
_PROBE_BYTES = 4096


@dataclass(frozen=True)
class ShardMeta:
    """Contents of `<prefix>.meta.json`. The writer fills in token and document counts and hashes.

    None means unknown, such as the tokenizer of merged foreign data. `sources` lists the texts in order, each with at
    least a `name`. `bin_block_sha256` has one SHA-256 for each `bin_block_bytes` bytes of the `.bin` file, the last
    block shorter. `loss_mask_sha256` is that of the loss mask; None if there is none.
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
    loss_mask_sha256: str | None = None
    format: str = field(default=FORMAT)

    def to_json(self) -> str:
        """The text of the side file. It depends on the contents alone, so equal data gives equal bytes."""
        content = asdict(self)
        if self.loss_mask_sha256 is None:  # as before there were masks, so that the same data keeps its fingerprint
            del content["loss_mask_sha256"]
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def written_with(self, tokenizer: str | Path) -> bool:
        """Whether the tokenizer file `tokenizer` wrote the data; true if unknown. DataError if it can't be read."""
        return not self.tokenizer_sha256 or sha256_of_tokenizer(tokenizer) == self.tokenizer_sha256


def meta_path(prefix: str) -> Path:
    """Path of the side file of `prefix`."""
    return Path(f"{prefix}.meta.json")


def read_meta(prefix: str) -> ShardMeta | None:
    """Read `<prefix>.meta.json`, or None for a foreign pair that has no such file.

    Raises DataError if the file is there but isn't a megamor side file, or if it describes a loss mask that isn't there
    or the other way round. Unknown keys are ignored, so that files of a later version can still be read.
    """
    path = meta_path(prefix)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); delete it to treat the pair as foreign data") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a megamor side file; delete it to treat the pair as foreign data")
    try:
        meta = msgspec.convert(content, ShardMeta)
    except msgspec.ValidationError as error:
        raise DataError(f"{path} is damaged ({error}); delete it to treat the pair as foreign data") from error
    if (meta.loss_mask_sha256 is not None) != os.path.exists(mask := mask_path(prefix)):
        fault = f"is missing, but {path} describes it; copy it too" if meta.loss_mask_sha256 else "is of other data"
        raise DataError(f"{mask} {fault}, or preprocess the data again")
    return meta


def end_of_text(prefixes: Iterable[str], *, contained: bool = False) -> EndOfText | None:
    """The token that ends the texts of data sets, according to their side files; None if none of them says.

    Data sets that contain the token (`eod_appended`) come before those that only name it, which count for nothing if
    `contained`. Raises DataError if data sets differ.
    """
    known = [(prefix, meta) for prefix in prefixes if (meta := read_meta(prefix)) and meta.eod_token is not None]
    known = [(prefix, meta) for prefix, meta in known if meta.eod_appended] or ([] if contained else known)
    for prefix, meta in known[1:]:
        first_prefix, first = known[0]
        if (meta.eod_token, meta.eod_id) != (first.eod_token, first.eod_id):
            raise DataError(
                f"the texts of {first_prefix} end with {first.eod_token} (id {first.eod_id}), those of {prefix} with "
                f"{meta.eod_token} (id {meta.eod_id}); preprocess one of them again with the other's --eod-token"
            )
    for _, meta in known[:1]:
        if meta.eod_token is not None and meta.eod_id is not None:
            return EndOfText(meta.eod_token, meta.eod_id)
    return None


def sha256_of_tokenizer(path: str | Path) -> str:
    """SHA-256 of a tokenizer file. Raises DataError if it can't be read."""
    try:
        return sha256_of_file(path)
    except OSError as error:
        advice = "correct the path, or prepare tokenizer and data first (docs/data.md)"
        raise DataError(f"tokenizer {path} can't be read: {error.strerror}; {advice}") from error


class BlockHasher:
    """SHA-256 of every `block_bytes` bytes of a stream that arrives in buffers of any size."""

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
        """The hashes of all blocks so far, the unfinished one included; no `update` may follow."""
        if self._filled:
            self._close_block()
        return self._digests

    def _close_block(self) -> None:
        self._digests.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()
        self._filled = 0


def fingerprint(shard: TokenShard) -> str:
    """Identify the contents of a shard, wherever its files are, in bounded time.

    SHA-256 over the side file, which has the hashes of everything, and over size and contents of `.idx`, `.bin` and a
    loss mask: all of a file up to 4 MiB; of a larger one 1,024 blocks of 4 KiB spread evenly, the first and last ones
    included. Data that was written anew differs in nearly every block. A change in place of more than a thousandth of a
    file is always found, a smaller one may lie between the blocks: `megamor inspect-data --verify` reads everything.
    """
    side_file = meta_path(shard.prefix)
    digests = [
        sha256_of_file(side_file) if side_file.exists() else "no side file",
        _sampled_sha256(f"{shard.prefix}.idx"),
        _sampled_sha256(f"{shard.prefix}.bin"),
        *([_sampled_sha256(mask_path(shard.prefix))] if shard.loss_mask is not None else []),
    ]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def contents_shared(prefix: str, others: Sequence[str]) -> list[str]:
    """Those of the prefixes `others` that have all tokens of `prefix`, by whatever path they lead to.

    Compared are the ids (size, then the sampled hash of `fingerprint`), and names and counts of the texts in the side
    files: merged data has those of its parts.
    """
    size, texts = os.path.getsize(f"{prefix}.bin"), _texts(prefix)
    found = []
    for other in others:
        same = os.path.getsize(f"{other}.bin") == size
        same = same and _sampled_sha256(f"{other}.bin") == _sampled_sha256(f"{prefix}.bin")
        if same or (texts and texts <= _texts(other)):
            found.append(other)
    return found


def _texts(prefix: str) -> set[str]:
    meta = read_meta(prefix)
    return {json.dumps(source, sort_keys=True) for source in meta.sources if source.get("tokens")} if meta else set()


def _sampled_sha256(path: str) -> str:
    # Read, not mapped: a page fault would bring in many pages around each block.
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= _PROBES * _PROBE_BYTES:
            digest.update(file.read())
        else:
            for start in np.linspace(0, size - _PROBE_BYTES, _PROBES, dtype=np.int64).tolist():
                digest.update(os.pread(file.fileno(), _PROBE_BYTES, start))
    return digest.hexdigest()
