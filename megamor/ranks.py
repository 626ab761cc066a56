"""What the processes of a run tell each other: small Python objects over gloo, and failures of any one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megamor.errors import CheckpointError, MegamorError, print_error

T = TypeVar("T")

REPORT_SECONDS = 10.0
"""How long a rank that failed waits to hear whether the others failed too."""

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

    def run_on_all(self, what: str, action: Callable[[], Any] | None) -> list[Any]:
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


def run_on_all_ranks(action: Callable[[], T], device: torch.device) -> T:
    """Result of `action` on this rank; if it fails on any rank, every rank raises. Collective.

    While all is well this costs one reduction of a number. Only errors that a user can cause are shared; a bug raises
    where it is.

    Raises:
        MegamorError: of the kind of the first failure, with the message of every rank that failed.
    """
    if not dist.is_initialized():
        return action()
    failure: MegamorError | None = None
    try:
        result = action()
    except MegamorError as error:
        failure = error
    failed = torch.tensor(failure is not None, dtype=torch.int32, device=device)
    dist.all_reduce(failed)
    if not failed.item():
        return result
    found: list[tuple[type[MegamorError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (type(failure), str(failure)) if failure else None)
    raise _joined(found) from failure


def from_first_rank(action: Callable[[], T]) -> T:
    """Result of `action` on rank 0, on every rank; plain data. Collective."""
    if not dist.is_initialized():
        return action()
    result: list = [action() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result, src=0)
    return result[0]


@contextmanager
def report_errors_once() -> Iterator[None]:
    """Inside, an error that every rank raises alike is printed by one of them; others carry the number of their rank.

    Entering is collective. The ranks compare their errors in a group of its own, so that one that fails while the
    others are in the middle of a step waits for a few seconds only.

    Raises:
        SystemExit: status 2, for every MegamorError.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=REPORT_SECONDS)) if size > 1 else None
    try:
        yield
    except MegamorError as error:
        said = _exchange(str(error), group, size)
        if said is None:
            print_error(error, rank=rank)
        elif said.index(str(error)) == rank:
            print_error(error, rank=rank if len(set(said)) > 1 else None)
        _exchange("", group, size)  # a launcher ends everybody with the first that leaves
        raise SystemExit(2) from error


def _joined(found: list[tuple[type[MegamorError], str] | None]) -> MegamorError:
    """One error for what the ranks found, by rank."""
    failures = {rank: failure for rank, failure in enumerate(found) if failure is not None}
    kind, message = next(iter(failures.values()))
    if len(failures) == len(found) and len(set(failures.values())) == 1:
        return kind(message)
    return kind("; ".join(f"rank {rank}: {text}" for rank, (_, text) in failures.items()))


def _exchange(message: str, group: dist.ProcessGroup | None, world_size: int) -> list[str] | None:
    """Every rank's message, or None if one of them doesn't come."""
    if group is None:
        return [message]
    messages = [""] * world_size
    try:
        dist.all_gather_object(messages, message, group=group)
    except RuntimeError:
        return None
    return messages
