"""Which window of which source is sample number n of a run, however often its batch size or blend was changed.

Samples of a run are numbered from 0 through all its steps: with B the global batch size, step s of a run that was never
changed takes samples s * B to (s + 1) * B - 1. Rank, world size and micro-batch size have no part in it. A change of
global batch or of the blend opens a new *phase* at the next sample; a new blend goes on, in each source, with the first
sample that wasn't used yet. So the phases and the number of samples used are the whole state of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamor.data.blend import Blend


@dataclass(frozen=True)
class Phase:
    """A stretch of samples with one global batch size and one blend.

    `weights` are the shares by source key, adding up to 1. `consumed` counts, for every source used before
    `blend_first_sample`, the samples that it had given by then. A phase in which only the batch changed keeps the
    schedule of its blend going, so `blend_first_sample` may be before `first_sample`.
    """

    first_sample: int
    global_batch_size: int
    blend_first_sample: int
    weights: Mapping[str, float]
    consumed: Mapping[str, int]

    @cached_property
    def blend(self) -> Blend:
        """The schedule of this phase."""
        return Blend(list(self.weights.values()))

    def consumed_at(self, sample: int) -> dict[str, int]:
        """How many samples each source has given before sample number `sample` of this phase."""
        given = self.blend.counts(sample - self.blend_first_sample).tolist()
        totals = dict(self.consumed)
        for source, count in zip(self.weights, given, strict=True):
            totals[source] = totals.get(source, 0) + count
        return totals


class SampleOrder:
    """The phases of a run, in order. Immutable: `changed_at` gives a longer one."""

    def __init__(self, phases: tuple[Phase, ...]) -> None:
        assert phases[0].first_sample == 0, "a run starts at sample 0"
        self.phases = phases
        self.sources = tuple(dict.fromkeys(source for phase in phases for source in phase.weights))

    @classmethod
    def start(cls, global_batch_size: int, weights: Mapping[str, float]) -> SampleOrder:
        """The order of a run from its beginning, with any positive `weights` by source key."""
        return cls((Phase(0, global_batch_size, 0, _normalised(weights), {}),))

    def changed_at(self, sample: int, global_batch_size: int, weights: Mapping[str, float]) -> SampleOrder:
        """The same run going on from `sample` with this batch and these weights: itself if they are those it has."""
        last = self.phases[-1]
        weights = _normalised(weights)
        same_blend = weights == last.weights
        if same_blend and global_batch_size == last.global_batch_size:
            return self
        if same_blend:
            phase = Phase(sample, global_batch_size, last.blend_first_sample, last.weights, last.consumed)
        else:
            phase = Phase(sample, global_batch_size, sample, weights, last.consumed_at(sample))
        unused = sample == last.first_sample
        return SampleOrder((*(self.phases[:-1] if unused else self.phases), phase))

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For sample numbers [n]: index into `sources` [n], and how many samples that source gave before [n]."""
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
            positions[chosen] = before[local] + given
        return sources, positions

    def to_state(self) -> list[dict[str, Any]]:
        """The phases as plain data (JSON)."""
        return [asdict(phase) for phase in self.phases]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> SampleOrder:
        """The inverse of `to_state`."""
        return cls(tuple(Phase(**phase) for phase in state))


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {source: weight / total for source, weight in weights.items()} if total > 0 else dict(weights)
