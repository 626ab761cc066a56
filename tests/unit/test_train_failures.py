"""Which rank raises and which prints after a failure on one rank, on all, or a different one on each."""

from __future__ import annotations

import contextlib
import io

import pytest

from megamor import ranks
from megamor.config import ParallelConfig
from megamor.errors import ConfigError, DataError, MegamorError
from megamor.parallel import init_world
from megamor.ranks import from_first_rank, report_errors_once, run_on_all_ranks
from tests.distributed.harness import run_ranks

Failures = tuple[BaseException | None, ...]


def raise_mine(by_rank: Failures) -> str:
    world = init_world(ParallelConfig())

    def action() -> str:
        mine = by_rank[world.rank]
        if mine is not None:
            raise mine
        return f"result {world.rank}"

    try:
        return run_on_all_ranks(action)
    except MegamorError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("by_rank", "said"),
    [
        ((None, None), ["result 0", "result 1"]),
        ((DataError("a"), DataError("a")), ["DataError: a"] * 2),
        ((None, DataError("a")), ["DataError: rank 1: a"] * 2),
        ((ConfigError("a"), DataError("b")), ["ConfigError: rank 0: a; rank 1: b"] * 2),
    ],
)
def test_a_failure_raises_on_every_rank(by_rank: Failures, said: list[str]) -> None:
    assert run_ranks(raise_mine, by_rank) == said


def test_one_process_raises_its_own_exception() -> None:
    error = DataError("a")
    with pytest.raises(DataError) as found:
        run_on_all_ranks(lambda: (_ for _ in ()).throw(error))
    assert found.value is error
    assert from_first_rank(lambda: 3) == 3


def number_of_first_rank() -> int:
    world = init_world(ParallelConfig())
    return from_first_rank(lambda: 10 + world.rank)


def test_the_first_ranks_value_is_sent_to_all() -> None:
    assert run_ranks(number_of_first_rank) == [10, 10]


def print_mine(by_rank: Failures) -> tuple[object, str]:
    ranks.REPORT_SECONDS = 0.5
    world = init_world(ParallelConfig())
    printed, status = io.StringIO(), None
    with contextlib.redirect_stderr(printed):
        try:
            with report_errors_once():
                mine = by_rank[world.rank]
                if mine is not None:
                    raise mine
        except SystemExit as leaving:
            status = leaving.code
    return status, printed.getvalue()


def test_what_is_no_exception_is_printed_too() -> None:
    """The process ends by `os._exit`, so nobody else would."""
    for error, status, last in (
        (SystemExit("the tracker says no"), 1, "SystemExit: the tracker says no\n"),
        (SystemExit(3), 3, "SystemExit: 3\n"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt\n"),
    ):
        (nothing, said) = run_ranks(print_mine, (None, error))
        assert nothing == (None, "")
        assert said[0] == status
        assert said[1].startswith("rank 1: Traceback")
        assert said[1].endswith(last)
    assert run_ranks(print_mine, (None, SystemExit(75)))[1] == (75, ""), "which is no failure"


@pytest.mark.parametrize(
    ("by_rank", "printed"),
    [
        ((None, None), [(None, ""), (None, "")]),
        ((DataError("a"), DataError("a")), [(2, "DataError: a\n"), (2, "")]),
        ((DataError("a"), DataError("b")), [(2, "rank 0: DataError: a\n"), (2, "rank 1: DataError: b\n")]),
        ((None, DataError("b")), [(None, ""), (2, "rank 1: DataError: b\n")]),
    ],
)
def test_an_error_is_printed_once_and_never_hidden(by_rank: Failures, printed: list[tuple[object, str]]) -> None:
    assert run_ranks(print_mine, by_rank) == printed
