"""How the ranks of a run agree: small numbers and Python objects over gloo, and failures of any one of them."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megamor.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_USER_ERROR, CheckpointError, MegamorError, print_error

T = TypeVar("T")

REPORT_SECONDS = 10.0
"""Other ranks wait this long before exiting: the launcher kills all ranks when one exits, so the rank that prints must
exit first."""

# What a failing disk or a refused request looks like; any other exception is a bug and keeps its traceback.
_EXPECTED = (OSError, RuntimeError, MegamorError, CheckpointException)
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))
# What gloo, NCCL and the store say on a rank when another one has exited.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection was likely closed|Broken pipe|Socket Timeout|remote process exited"
    r"|Timed out waiting \d+ms for (recv|send)|Application timeout|communicator was aborted"
    r"|collective operation timeout"
)


@dataclass(frozen=True)
class Ranks:
    """This process among all that write one checkpoint."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, *, in_background: bool = False) -> Ranks:
        """All processes of the run, or this one alone without `torch.distributed`. Collective.

        They talk through gloo in the default group, as votes do: every further group holds a connection to each rank.
        Only a thread needs a group of its own: on one group, ranks must start collectives in the same order, and a
        thread `in_background` starts them in between the votes of training, at other moments on each rank.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        group = dist.new_group(backend="gloo") if in_background else dist.group.WORLD
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Also a barrier."""
        return [value] if self.group is None else gather(value, self.group)

    def run_on_all(self, what: str, action: Callable[[], Any] | None) -> list[Any]:
        """Run `action` here (None: nothing) and return every rank's result; if it fails on one rank, fail on all.

        Raises:
            CheckpointError: on every rank; names `what`, the ranks that failed and why. A rank with a bug raises its
                own exception instead; so does one without memory, at once, and the others lose it.
        """
        result, failure = None, None
        try:
            result = action() if action else None
        except OUT_OF_MEMORY:
            raise  # the others may be in a collective of `action`, and would take this rank's message for its
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

    The ranks compare their errors through the store in which they met, and wait for each other a few seconds only: a
    rank that fails alone, while the others are in the middle of a step, prints then. What isn't a MegamorError is a bug
    or a lack of memory, and printed at once with its traceback, unless it only says that another rank is gone.

    Raises:
        SystemExit: status 2, for every MegamorError; with several ranks `exit_status` for every other error.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        yield
    except MegamorError as error:
        said = _exchange("error", str(error), rank, size)
        if said is None:
            print_error(error, rank=rank)
        elif said.index(str(error)) == rank:
            print_error(error, rank=rank if len(set(said)) > 1 else None)
        # The launcher kills all ranks when one exits, so nobody exits before the ranks that print have printed.
        _exchange("printed", "", rank, size)
        raise SystemExit(EXIT_USER_ERROR) from error
    except BaseException as error:  # SystemExit too, which would say nothing
        if size == 1 or exit_status(error) == EXIT_INTERRUPTED:
            raise
        print_failure(error, rank)
        raise SystemExit(exit_status(error)) from error


def print_failure(error: BaseException, rank: int) -> None:
    """Print why this rank ends: a traceback, but one line for the loss of another rank, which has printed its own."""
    if exit_status(error) == EXIT_LOST_RANK:
        why = " ".join(str(error).split())[:200]
        text = f"another rank has exited, and its output says why ({type(error).__name__}: {why})\n"
    else:
        text = "".join(traceback.format_exception(error))
    print(f"rank {rank}: {text}", end="", file=sys.stderr, flush=True)


def exit_status(error: BaseException) -> int:
    """The status with which a rank ends after `error`: 2 for a MegamorError, 76 if another rank's loss is the first
    cause, else 1."""
    if isinstance(error, SystemExit):
        return error.code & 255 if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, MegamorError):
        return EXIT_USER_ERROR
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lost = isinstance(error, dist.DistNetworkError) or (isinstance(error, RuntimeError) and _LOST.search(str(error)))
    return EXIT_LOST_RANK if lost else 1


def _exchange(what: str, message: str, rank: int, size: int) -> list[str] | None:
    """Every rank's message; None if a rank doesn't answer in time."""
    if size == 1:
        return [message]
    # Not a gloo group with a short timeout: that holds a connection to every rank, and is too slow to join.
    store = dist.distributed_c10d._get_default_store()
    names = [f"megamor/{what}/{number}" for number in range(size)]
    try:
        store.set(names[rank], message.encode("utf-8", "replace").decode())
        store.wait(names, timedelta(seconds=REPORT_SECONDS))
        return [store.get(name).decode() for name in names]
    except RuntimeError:  # no answer, or the process that holds the store is gone
        return None
