"""Is this the data that the run was started with? A fingerprint of contents, wherever the files lie."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from megamor.data.indexed import TokenShard
from megamor.data.meta import meta_path, sha256_of_file

_PROBES = 1024
_PROBE_BYTES = 4096


def fingerprint(shard: TokenShard) -> str:
    """Identify the contents of a shard in bounded time.

    SHA-256 over the side file, which has the hashes of everything, and over size and contents of `.idx` and `.bin`: the
    whole file up to 4 MiB, of a larger one 1,024 blocks of 4 KiB spread evenly, the first and last ones included. So
    data that was written anew is told apart by nearly every block, and a change in place of more than a thousandth of a
    file is found wherever it is; a smaller one may lie between the blocks. tools/inspect_data.py --verify reads all.
    """
    side_file = meta_path(shard.prefix)
    parts = [
        sha256_of_file(side_file) if side_file.exists() else "no side file",
        _sampled(shard.index_bytes),
        _sampled(shard.tokens.view(np.uint8)),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sampled(data: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(str(len(data)).encode())
    if len(data) <= _PROBES * _PROBE_BYTES:
        digest.update(data.tobytes())
    else:
        for start in np.linspace(0, len(data) - _PROBE_BYTES, _PROBES, dtype=np.int64):
            digest.update(data[start : start + _PROBE_BYTES].tobytes())
    return digest.hexdigest()
