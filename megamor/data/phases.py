"""Which stretch of which source is sample number n of a run, however often batch, blend or sequence length changed.

Samples of a run are numbered from 0 through all its steps: with B the global batch size, step s of a run that was never
changed takes samples s * B to (s + 1) * B - 1. Rank, world size and micro-batch size have no part in it. A change of
global batch, of the blend or of the sequence length opens a new *phase* at the next sample. Positions within a source
are counted in tokens of its shuffled stream, which has no idea of samples, so each phase goes on, in every source,
exactly where the one before it stopped. The phases and the number of samples used are the whole state of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamor.data.blend import Blend
from megamor.errors import DataError


@dataclass(frozen=True)
class Phase:
    """A stretch of samples with one global batch size, one sequence length and one blend.

    `weights` are the shares by source key, adding up to 1. `consumed` are the tokens that each source ever used had
    given before `first_sample`. The schedule of a blend goes on through phases in which only something else changed,
    so it may have begun before, at `blend_first_sample`.
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
        """Tokens that each source has given before sample number `sample` of this phase."""
        given = self.blend.counts(sample - self.blend_first_sample) - self.given_before
        totals = dict(self.consumed)
        for source, count in zip(self.weights, given.tolist(), strict=True):
            totals[source] = totals.get(source, 0) + count * self.seq_len
        return totals


@lru_cache(maxsize=16)
def _blend(weights: tuple[float, ...]) -> Blend:
    return Blend(weights)


class SampleOrder:
    """The phases of a run, in order. Immutable: `changed_at` gives a longer one."""

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
        """The same run going on from `sample` with these settings: itself if they are those it has."""
        last, weights = self.phases[-1], _normalised(weights)
        same_blend = weights == last.weights
        if same_blend and (global_batch_size, seq_len) == (last.global_batch_size, last.seq_len):
            return self
        if same_blend:  # named in another order perhaps, which the schedule depends on
            weights = dict(last.weights)
        blend_start = last.blend_first_sample if same_blend else sample
        phase = Phase(sample, global_batch_size, seq_len, blend_start, weights, last.consumed_at(sample))
        unused = sample == last.first_sample
        return SampleOrder((*(self.phases[:-1] if unused else self.phases), phase))

    def consumed_at(self, sample: int) -> dict[str, int]:
        """Tokens that each source has given before sample number `sample`, which isn't before the last phase."""
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
                f"the checkpoint's position in the data is of another version of megamor: its phases have "
                f"{sorted(state[0])}, this version's {sorted(names)}; go on with the version that wrote it"
            )
        return cls(tuple(Phase(**phase) for phase in state))


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {source: weight / total for source, weight in weights.items()} if total > 0 else dict(weights)
