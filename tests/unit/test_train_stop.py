"""Stopping on request, in one process."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from megamor.train import stop
from megamor.train.stop import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Install test handlers, and restore the old ones afterwards."""

    def end(number: int, frame: object) -> None:
        raise AssertionError(f"{signal.Signals(number).name} would have ended the process")

    before = {number: signal.signal(number, end) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def request_to_stop() -> StopRequest:
    return StopRequest()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(request_to_stop: StopRequest, number: signal.Signals) -> None:
    with request_to_stop:
        assert not request_to_stop.agreed()
        signal.raise_signal(number)
        assert request_to_stop.agreed()
        assert request_to_stop.received is number


def test_repeated_signals_are_ignored(request_to_stop: StopRequest) -> None:
    with request_to_stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert request_to_stop.received is signal.SIGINT


def test_a_second_ctrl_c_seconds_later_ends_the_process(
    request_to_stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "PATIENCE_SECONDS", 0.0)
    with request_to_stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_may_repeat_its_signal(
    request_to_stop: StopRequest, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "PATIENCE_SECONDS", 0.0)
    with request_to_stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(number)
        assert request_to_stop.agreed()


def test_handlers_are_put_back(request_to_stop: StopRequest) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with request_to_stop:
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signals_can_be_ignored_for_good() -> None:
    stop.ignore_signals()
    for number in SIGNALS:
        signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_IGN
