"""The order of training samples: a keyed shuffle of each source, and the phases of a run.

**Shuffle.** Each epoch reads the windows of a source in another order. The permutation is computed, not stored: any
position is found in constant time, without memory, cache file or compiled helper, and position p gives the same window
however long the run becomes. It is a Feistel network over the mixed-radix digits (left, right) of the window number,
whose steps "add a keyed hash of the other digit" can each be undone. The few values beyond the last window are permuted
again until they are inside (cycle walking, Black and Rogaway 2002), which keeps the map one-to-one.

**Phases.** Samples are numbered from 0 over all steps of a run: with global batch size B, step s of a run that never
changed takes samples s * B to (s + 1) * B - 1. Rank, world size and micro-batch size don't matter. A change of global
batch size, blend or sequence length starts a new *phase* at the next sample. Positions within a source are counted in
tokens of its shuffled stream, independent of samples, so each phase continues every source exactly where the previous
one stopped. The phases and the number of samples used are the whole state of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamor.data.blend import Blend
from megamor.errors import DataError

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
    """Like `shuffled_windows` for windows in blocks: (block [n], window within the block [n]) at `positions` [n].

    Each epoch reads the blocks one after the other in another order, so that few are in use at a time, and the windows
    of each block in another order. Memory and time grow with the number of blocks, not of windows.
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
    # lefts * rights is barely above size, so hardly any value needs a second pass.
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
    """Keys of the rounds for an epoch, or for a block in an epoch.

    They don't depend on the source's name or path: data may be moved or renamed without a change of order.
    """
    name = " ".join(map(str, ("megamor sample order", seed, *which)))
    digest = hashlib.blake2b(name.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


# Phases with equal weights share a schedule, since a long one is slow to make.
_blend = lru_cache(maxsize=16)(Blend)


@dataclass(frozen=True)
class Phase:
    """A range of samples with one global batch size, one sequence length and one blend.

    `weights` are the fractions by source key, adding up to 1. `consumed` are the tokens read from each source before
    `first_sample`. A change of batch size or sequence length alone does not restart the schedule of the blend, so that
    schedule may have begun in an earlier phase, at `blend_first_sample`.
    """

    first_sample: int
    global_batch_size: int
    seq_len: int
    blend_first_sample: int
    weights: Mapping[str, float]
    consumed: Mapping[str, int]

    @property
    def blend(self) -> Blend:
        """The schedule of this phase."""
        return _blend(tuple(self.weights.values()))

    @cached_property
    def given_before(self) -> NDArray[np.int64]:
        """Samples that the schedule took from each of `weights` before this phase."""
        return self.blend.counts(self.first_sample - self.blend_first_sample)

    def consumed_at(self, sample: int) -> dict[str, int]:
        """Tokens read from each source before sample number `sample` of this phase."""
        given = self.blend.counts(sample - self.blend_first_sample) - self.given_before
        totals = dict(self.consumed)
        for source, count in zip(self.weights, given.tolist(), strict=True):
            totals[source] = totals.get(source, 0) + count * self.seq_len
        return totals


class SampleOrder:
    """The phases of a run, in order: maps sample numbers to sources and positions. Immutable."""

    def __init__(self, phases: tuple[Phase, ...]) -> None:
        assert phases[0].first_sample == 0, "a run starts at sample 0"
        self.phases = phases
        self.sources = tuple(dict.fromkeys(source for phase in phases for source in phase.weights))

    @classmethod
    def start(cls, global_batch_size: int, seq_len: int, weights: Mapping[str, float]) -> SampleOrder:
        """The order of a run from its beginning, with any positive `weights` by source key."""
        return cls((Phase(0, global_batch_size, seq_len, 0, _normalised(weights), {}),))

    def changed_at(
        self, sample: int, global_batch_size: int, seq_len: int, weights: Mapping[str, float]
    ) -> SampleOrder:
        """The order of the same run with these settings from `sample` on; `self` if they are the current ones."""
        last, weights = self.phases[-1], _normalised(weights)
        same_blend = weights == last.weights
        if same_blend and (global_batch_size, seq_len) == (last.global_batch_size, last.seq_len):
            return self
        if same_blend:
            # The schedule depends on the order of the sources, which may be listed differently now.
            weights = dict(last.weights)
        blend_start = last.blend_first_sample if same_blend else sample
        phase = Phase(sample, global_batch_size, seq_len, blend_start, weights, last.consumed_at(sample))
        # A phase that gave no sample is replaced: two in a row with the same first sample would be ambiguous.
        unused = sample == last.first_sample
        return SampleOrder((*(self.phases[:-1] if unused else self.phases), phase))

    def consumed_at(self, sample: int) -> dict[str, int]:
        """Tokens read from each source before sample number `sample`, which must not be before the last phase."""
        return self.phases[-1].consumed_at(sample)

    def seq_len_at(self, sample: int) -> int:
        """Tokens of sample number `sample`."""
        return next(phase.seq_len for phase in reversed(self.phases) if phase.first_sample <= sample)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For sample numbers [n]: index into `sources` [n], and the token of that source's stream it begins at [n]."""
        samples = np.asarray(samples, np.int64)
        sources = np.empty_like(samples)
        positions = np.empty_like(samples)
        phase_of = np.searchsorted([p.first_sample for p in self.phases], samples, side="right") - 1
        for number in np.unique(phase_of):
            phase, chosen = self.phases[number], phase_of == number
            local, given = phase.blend.locate(samples[chosen] - phase.blend_first_sample)
            index = np.array([self.sources.index(source) for source in phase.weights])
            before = np.array([phase.consumed.get(source, 0) for source in phase.weights])
            sources[chosen] = index[local]
            positions[chosen] = before[local] + (given - phase.given_before[local]) * phase.seq_len
        return sources, positions

    def to_state(self) -> list[dict[str, Any]]:
        """The phases as plain data (JSON)."""
        return [asdict(phase) for phase in self.phases]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> SampleOrder:
        """The inverse of `to_state`. Raises DataError for a state of another version."""
        names = {field.name for field in fields(Phase)}
        if any(phase.keys() != names for phase in state):
            raise DataError(
                f"the checkpoint's data position was saved by another version of megamor: its phases have "
                f"{sorted(state[0])}, this version's have {sorted(names)}; resume with the version that wrote it"
            )
        return cls(tuple(Phase(**phase) for phase in state))


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {source: weight / total for source, weight in weights.items()} if total > 0 else dict(weights)
