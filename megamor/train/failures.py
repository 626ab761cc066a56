"""Errors in a run of several processes: what stops one rank stops them all, and it is said once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megamor.errors import MegamorError, print_error
from megamor.parallel import World

T = TypeVar("T")

REPORT_SECONDS = 10.0
"""How long a rank that failed waits to hear whether the others failed too."""


def together(action: Callable[[], T], device: torch.device) -> T:
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
def reported_once(world: World) -> Iterator[None]:
    """Inside, an error that every rank raises alike is printed by one of them; others carry the number of their rank.

    Entering is collective. The ranks compare their errors in a group of its own, so that one that fails while the
    others are in the middle of a step waits for a few seconds only.

    Raises:
        SystemExit: status 2, for every MegamorError.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=REPORT_SECONDS)) if world.size > 1 else None
    try:
        yield
    except MegamorError as error:
        said = _exchange(str(error), group, world.size)
        if said is None:
            print_error(error, rank=world.rank)
        elif said.index(str(error)) == world.rank:
            print_error(error, rank=world.rank if len(set(said)) > 1 else None)
        _exchange("", group, world.size)  # a launcher ends everybody with the first that leaves
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
