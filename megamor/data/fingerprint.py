"""Is this the data that the run was started with? A fingerprint of contents, wherever the files lie."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from megamor.data.meta import meta_path, sha256_of_file
from megamor.data.shard import TokenShard

_PROBES = 1024
_PROBE_BYTES = 4096


def fingerprint(shard: TokenShard) -> str:
    """Identify the contents of a shard in bounded time.

    SHA-256 over the side file, which has the hashes of everything, and over size and contents of `.idx` and `.bin`: the
    whole file up to 4 MiB, of a larger one 1,024 blocks of 4 KiB spread evenly, the first and last ones included. So
    data that was written anew is told apart by nearly every block, and a change in place of more than a thousandth of a
    file is found wherever it is; a smaller one may lie between the blocks. megamor inspect-data --verify reads all.
    """
    side_file = meta_path(shard.prefix)
    parts = [
        sha256_of_file(side_file) if side_file.exists() else "no side file",
        _sampled(f"{shard.prefix}.idx"),
        _sampled(f"{shard.prefix}.bin"),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sampled(path: str) -> str:
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
