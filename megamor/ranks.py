"""How the ranks of a run agree: small numbers and Python objects over gloo, and failures of any one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megamor.errors import EXIT_USER_ERROR, CheckpointError, MegamorError, print_error

T = TypeVar("T")

REPORT_SECONDS = 10.0
"""Other ranks wait this long before exiting: the launcher kills all ranks when one exits, so the rank that prints must
exit first."""

# What a failing disk or a refused request looks like; any other exception is a bug and keeps its traceback.
_EXPECTED = (OSError, RuntimeError, MegamorError, CheckpointException)


@dataclass(frozen=True)
class Ranks:
    """This process among all that write one checkpoint."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls) -> Ranks:
        """All processes of the run, or this one alone without `torch.distributed`. Collective.

        A gloo group of its own: saving in the background must not interleave with the gradients' collectives.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Also a barrier."""
        return [value] if self.group is None else gather(value, self.group)

    def run_on_all(self, what: str, action: Callable[[], Any] | None) -> list[Any]:
        """Run `action` here (None: nothing) and return every rank's result; if it fails on one rank, fail on all.

        Raises:
            CheckpointError: on every rank; names `what`, the ranks that failed and why. A rank with a bug raises its
                own exception instead.
        """
        result, failure = None, None
        try:
            result = action() if action else None
        except (Exception, CheckpointException) as error:  # CheckpointException derives from BaseException
            failure = error
        answers = self.gather((result, describe(failure) if failure else None))
        failures = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(answers) if reason]
        if failure is not None and not isinstance(failure, _EXPECTED):
            raise failure
        if failures:
            raise CheckpointError(f"{what} failed on {'; '.join(failures)}") from failure
        return [answer for answer, _ in answers]


def describe(error: BaseException) -> str:
    """`error` in one line. For a collective failure in torch.distributed.checkpoint, the first rank's cause."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"{describe(cause)} (in rank {rank}'s part)"
    text = " ".join(str(error).split())
    if "inline_container" in text or "PytorchStreamWriter" in text:  # torch doesn't say what the system said
        text += " (a file couldn't be written: is the disk full?)"
    return text if isinstance(error, MegamorError) else f"{type(error).__name__}: {text}"


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """`value` of every rank, in rank order, on every rank. Collective over `group` (default: all ranks)."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def sum_over_ranks(values: Sequence[int]) -> list[int]:
    """Sum each of `values` over all ranks. Collective.

    The sums travel between hosts, over gloo: a rank waits for the other ranks, but never for its GPU.
    """
    sums = torch.tensor(values, dtype=torch.int64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return [int(value) for value in sums.tolist()]


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return this rank's result; if it fails on any rank, every rank raises. Collective.

    Only errors that a user can cause are shared between the ranks; a bug raises on the rank that has it.

    Raises:
        MegamorError: as `raise_on_all_ranks`.
    """
    failure: MegamorError | None = None
    try:
        result = action()
    except MegamorError as error:
        failure = error  # not raised yet: the other ranks would wait for this one forever
    raise_on_all_ranks(failure)
    return result


def raise_on_all_ranks(failure: MegamorError | None) -> None:
    """Raise one error on every rank if any has a `failure`. Collective.

    Raises:
        MegamorError: of the kind of the first failure. It has the plain message if every rank failed with the same,
            else each message with its rank.
    """
    if failure is not None and not dist.is_initialized():
        raise failure
    found = gather((type(failure), str(failure)) if failure else None)
    failures = {rank: mine for rank, mine in enumerate(found) if mine is not None}
    if not failures:
        return
    kind, message = next(iter(failures.values()))
    if len(set(found)) > 1:
        message = "; ".join(f"rank {rank}: {text}" for rank, (_, text) in failures.items())
    raise kind(message) from failure


def from_first_rank(action: Callable[[], T]) -> T:
    """Result of `action` on rank 0, on every rank; plain data. A failure there is one everywhere. Collective."""
    if not dist.is_initialized():
        return action()
    result: list[Any] = [run_on_all_ranks(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0)
    return cast(T, result[0])


@contextmanager
def report_errors_once() -> Iterator[None]:
    """Print an error that all ranks raise once; errors that differ are printed by each rank with its number.

    Entering is collective. The ranks compare their errors in a group of its own with a short timeout: a rank that fails
    alone, while the others are in the middle of a step, prints after a few seconds.

    Raises:
        SystemExit: status 2, for every MegamorError.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=REPORT_SECONDS)) if size > 1 else None
    try:
        yield
    except MegamorError as error:
        said = _exchange(str(error), group)
        if said is None:
            print_error(error, rank=rank)
        elif said.index(str(error)) == rank:
            print_error(error, rank=rank if len(set(said)) > 1 else None)
        # The launcher kills all ranks when one exits, so nobody exits before the ranks that print have printed.
        _exchange("", group)
        raise SystemExit(EXIT_USER_ERROR) from error


def _exchange(message: str, group: dist.ProcessGroup | None) -> list[str] | None:
    """Every rank's message; None if a rank doesn't answer within the group's timeout."""
    try:
        return gather(message, group)
    except RuntimeError:
        return None
