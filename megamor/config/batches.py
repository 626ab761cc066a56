"""Shape of the batch of every step: constant, or growing at the start of the run by `train.ramp`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from megamor.config.schema import Config


@dataclass(frozen=True)
class BatchShape:
    """Sequences of all ranks in a step, of one rank in a micro-batch, and tokens in a sequence."""

    global_batch_size: int
    micro_batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Training positions of a step."""
        return self.global_batch_size * self.seq_len


@dataclass(frozen=True)
class BatchSchedule:
    """`shapes[i]` holds until `ends[i]` steps are done, the last one for ever."""

    shapes: tuple[BatchShape, ...]
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Config) -> BatchSchedule:
        """The stages of `train.ramp`, each with the final value of what it doesn't name, and the final shape."""
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

    @property
    def final(self) -> BatchShape:
        """The shape at the end of the run."""
        return self.shapes[-1]

    def at(self, step: int) -> BatchShape:
        """The shape of the step after `step` steps."""
        return self.shapes[bisect_right(self.ends, step)]

    def stages(self, start: int, end: int) -> Iterator[tuple[int, int, BatchShape]]:
        """(steps done before, steps done after, shape) of each stretch of equal shape between two numbers of steps."""
        for stage_end, shape in zip((*self.ends, end), self.shapes, strict=True):
            if start < min(stage_end, end):
                yield start, min(stage_end, end), shape
                start = min(stage_end, end)

    def tokens(self, steps: int) -> int:
        """Training positions of the first `steps` steps."""
        return sum((end - start) * shape.tokens for start, end, shape in self.stages(0, steps))

    def steps_for(self, tokens: int) -> int:
        """The least number of steps with at least `tokens` training positions."""
        done = 0
        for end, shape in zip(self.ends, self.shapes, strict=False):
            if tokens <= (end - done) * shape.tokens:
                return done - (-tokens // shape.tokens)
            tokens -= (end - done) * shape.tokens
            done = end
        return done - (-tokens // self.final.tokens)
