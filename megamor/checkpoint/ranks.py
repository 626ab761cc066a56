"""What the processes of a run say to each other about a checkpoint: small Python objects over gloo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megamor.errors import CheckpointError, MegamorError

# What a failing disk or a refused request looks like; any other exception is a bug and keeps its traceback.
_EXPECTED = (OSError, RuntimeError, MegamorError, CheckpointException)


@dataclass(frozen=True)
class Ranks:
    """The processes that write one checkpoint together, seen from one of them."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls) -> Ranks:
        """All processes of the run, or this one alone without `torch.distributed`. Collective.

        A gloo group of its own keeps this talk apart from the gradients' collectives, and off the GPUs.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Also a barrier."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, what: str, action: Callable[[], Any] | None) -> list[Any]:
        """Run `action` here (None: nothing) and return every rank's result; if it failed anywhere, fail everywhere.

        Raises:
            CheckpointError: on every rank, naming `what`, the ranks that failed and why. A rank that failed by a bug
                raises its own exception instead.
        """
        result, failure = None, None
        try:
            result = action() if action else None
        except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
            failure = error
        answers = self.gather((result, describe(failure) if failure else None))
        failures = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(answers) if reason]
        if failure is not None and not isinstance(failure, _EXPECTED):
            raise failure
        if failures:
            raise CheckpointError(f"{what} failed on {'; '.join(failures)}") from failure
        return [answer for answer, _ in answers]


def describe(error: BaseException) -> str:
    """One line on `error`; of a collective failure in torch.distributed.checkpoint, the first rank's cause."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"{describe(cause)} (in rank {rank}'s part)"
    text = " ".join(str(error).split())
    if "inline_container" in text or "PytorchStreamWriter" in text:  # torch doesn't say what the system said
        text += " (a file couldn't be written: is the disk full?)"
    return text if isinstance(error, MegamorError) else f"{type(error).__name__}: {text}"
