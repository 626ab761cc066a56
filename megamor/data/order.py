"""The order of training samples within one source: a keyed permutation of its windows, another one for each epoch.

The permutation is computed, not stored: any position can be asked for in constant time, it needs no memory, no cache
file and no compiled helper, and position p gives the same window however long the run becomes. It is a Feistel network
over the mixed-radix digits (left, right) of the window number, with steps "add a keyed hash of the other digit", each
of which can be undone; the few values that land beyond the last window are permuted again until they land inside
(cycle walking, Black and Rogaway 2002), which keeps the map one-to-one.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def shuffled_windows(positions: NDArray[np.int64], num_windows: int, seed: int) -> NDArray[np.int64]:
    """Windows at `positions` [n] of the endless sequence of epochs over `num_windows` windows; returns [n].

    Position p belongs to epoch p // num_windows, and each epoch holds every window exactly once.
    """
    epochs, within = np.divmod(np.asarray(positions, np.int64), num_windows)
    windows = np.empty_like(within)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(within[chosen], num_windows, _round_keys(seed, int(epoch)))
    return windows


def shuffled_in_blocks(
    positions: NDArray[np.int64], block_sizes: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Like `shuffled_windows` for windows that come in blocks: (block [n], window within the block [n]) at `positions`.

    Each epoch goes through the blocks in another order, one after the other, so that few are in use at a time, and
    through the windows of each in another order. Memory and time grow with the number of blocks, not of windows.
    """
    epochs, within = np.divmod(np.asarray(positions, np.int64), block_sizes.sum())
    blocks, windows = np.empty_like(within), np.empty_like(within)
    for epoch in np.unique(epochs):
        chosen = np.flatnonzero(epochs == epoch)
        order = permute(np.arange(len(block_sizes)), len(block_sizes), _round_keys(seed, int(epoch)))
        ends = np.cumsum(block_sizes[order])
        turn = np.searchsorted(ends, within[chosen], side="right")
        blocks[chosen] = order[turn]
        windows[chosen] = within[chosen] - (ends[turn] - block_sizes[order[turn]])
        for block in np.unique(blocks[chosen]):
            inside = chosen[blocks[chosen] == block]
            keys = _round_keys(seed, int(epoch), int(block))
            windows[inside] = permute(windows[inside], int(block_sizes[block]), keys)
    return blocks, windows


def permute(values: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply the permutation of [0, size) with round keys `keys` to `values` [n], each within [0, size)."""
    # left < lefts, right < rights with lefts * rights barely above size: hardly any value needs a second walk.
    lefts = isqrt(size - 1) + 1
    rights = -(-size // lefts)
    result = values.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = _feistel(result[outside], np.uint64(lefts), np.uint64(rights), keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], lefts: np.uint64, rights: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = np.divmod(values, rights)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right ^ key) % lefts) % lefts
        else:
            right = (right + _mix(left ^ key) % rights) % rights
    return left * rights + right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): an input bit changes each output bit half the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1024)
def _round_keys(seed: int, *which: int) -> NDArray[np.uint64]:
    """Keys of the rounds, for an epoch or a block of one. The source has no part in it: it may be moved or renamed."""
    name = " ".join(map(str, ("megamor sample order", seed, *which)))
    digest = hashlib.blake2b(name.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8")
