"""Batch size and sequence length of every step: constant, or changing at the start of the run by `train.ramp`."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megamor.config.schema import Config
from megamor.errors import ConfigError


@dataclass(frozen=True)
class BatchShape:
    """Sequences per step over all ranks, sequences per micro-batch of a rank, and tokens per sequence."""

    global_batch_size: int
    micro_batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Training positions per step."""
        return self.global_batch_size * self.seq_len


@dataclass(frozen=True)
class BatchSchedule:
    """`shapes[i]` is used until `ends[i]` steps are done; the last shape has no end."""

    shapes: tuple[BatchShape, ...]
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Config) -> BatchSchedule:
        """The stages of `train.ramp`, where what a stage leaves out has its final value, and then the final shape."""
        final = BatchShape(config.train.global_batch_size, config.train.micro_batch_size, config.data.seq_len)
        stages = [
            BatchShape(
                stage.global_batch_size or final.global_batch_size,
                stage.micro_batch_size or final.micro_batch_size,
                stage.seq_len or final.seq_len,
            )
            for stage in config.train.ramp
        ]
        return cls((*stages, final), tuple(stage.until_step for stage in config.train.ramp))

    def at(self, step: int) -> BatchShape:
        """The shape of the next step when `step` steps are done."""
        return self.shapes[bisect_right(self.ends, step)]

    def stages(self, start: int, end: int) -> Iterator[tuple[int, int, BatchShape]]:
        """Yield (start, end, shape) of each stage between `start` and `end` steps done."""
        for stage_end, shape in zip((*self.ends, end), self.shapes, strict=True):
            if start < min(stage_end, end):
                yield start, min(stage_end, end), shape
                start = min(stage_end, end)

    def tokens(self, steps: int) -> int:
        """Training positions of the first `steps` steps."""
        return sum((end - start) * shape.tokens for start, end, shape in self.stages(0, steps))

    def steps_for(
        self, amount: float, start: int = 0, cost: Callable[[BatchShape], float] = lambda shape: shape.tokens
    ) -> int:
        """The first step, counted from 1, at which all steps after `start` have cost at least `amount` (in tokens).

        Raises:
            ConfigError: no integer of 64 bits can count the steps.
        """
        for first, end, shape in self.stages(start, sys.maxsize):
            needed = -(-amount // cost(shape))
            if needed <= end - first:
                return first + max(0, int(needed))
            amount -= (end - first) * cost(shape)
        raise ConfigError(f"train.max_flops asks for more than {sys.maxsize:,} steps, which can't be counted: lower it")
