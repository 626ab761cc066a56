"""Errors the user can fix. Each message says what is wrong, the value found, and the fix.

Commands print such an error without a traceback and exit with status 2. Any other exception is a bug and keeps its
traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
"""Exit status after an error that the user can fix."""
EXIT_INTERRUPTED = 75
"""Exit status of a run that saved and stopped on request (EX_TEMPFAIL of sysexits.h): rerun it to resume."""
EXIT_LOST_RANK = 76
"""Exit status of a rank that ends because another one has: the other's status says why."""


def telling_status(codes: Iterable[int]) -> int:
    """The exit status of a run whose processes ended with `codes`, where a negative number names a signal.

    An error that is a rank's own says more than 75, which others may end with because of it; both say more than a
    signal, with which launchers kill ranks that are left over. 76 says least.
    """
    found = {128 - code if code < 0 else code for code in codes}
    causes = (
        [EXIT_USER_ERROR],
        [code for code in sorted(found) if code < 128 and code not in (0, EXIT_INTERRUPTED, EXIT_LOST_RANK)],
        [EXIT_INTERRUPTED],
        [code for code in sorted(found) if code >= 128],
        [EXIT_LOST_RANK],
    )
    return next((code for group in causes for code in group if code in found), 0)


class MegamorError(Exception):
    """Base class of all errors that a user can cause and fix."""


class ConfigError(MegamorError):
    """A configuration that can't be run: an unknown key, a wrong type, or settings that contradict each other."""


class DataError(MegamorError):
    """A data set, raw text or tokenizer that is damaged or doesn't fit the run."""


class TextError(DataError):
    """A text that the tokenizer can't represent."""


class CheckpointError(MegamorError):
    """A checkpoint that is damaged, incomplete or belongs to another model."""


class TrainingError(MegamorError):
    """A run that can't continue, for example after a non-finite gradient."""


class InUseError(MegamorError):
    """Something that another process is writing, or that was taken over from this one."""


def print_error(error: MegamorError, rank: int | None = None) -> None:
    """Print `error` on stderr, naming the rank that it concerns if one is given."""
    origin = "" if rank is None else f"rank {rank}: "
    print(f"{origin}{type(error).__name__}: {error}", file=sys.stderr, flush=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Decorates a command's `main`: a `MegamorError` ends it with a message instead of a traceback."""
    try:
        yield
    except MegamorError as error:
        print_error(error)
        raise SystemExit(EXIT_USER_ERROR) from None
