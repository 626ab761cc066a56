"""Ctrl-C, SIGTERM and SIGUSR1: all ranks save the same step, and the resumed run equals an uninterrupted one."""

from __future__ import annotations

import signal
from dataclasses import replace
from itertools import count
from operator import attrgetter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megamor.config import Config
from megamor.train import Trainer
from tests.resume.runs import Spoil, Trace, assert_same_run, checkpoint_names, fit, named, signal_after, tiny_run, trace


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run on two ranks that evaluates after four steps and after eight."""
    return tiny_run(tmp_path_factory.mktemp("signals"), eval_every=4)


@pytest.fixture(scope="module")
def straight(base: Config) -> Trace:
    """The run without interruption."""
    assert fit(base) == [True, True]
    return trace(base)


@pytest.mark.promise("R4")
@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGINT, 0), (signal.SIGTERM, 1), (signal.SIGUSR1, 1)], ids=lambda value: str(value)
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    base: Config, straight: Trace, number: signal.Signals, rank: int
) -> None:
    config = named(base, f"interrupted by {number.name}")
    assert fit(config, spoil=signal_after(3, number), on_rank=rank) == [False, False]
    assert checkpoint_names(config) == ["latest", "step_00000004"]
    assert trace(config).validation == []  # an evaluation was due, but the run must stop now
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))


@pytest.mark.promise("R4")
def test_a_signal_stops_an_evaluation_at_once(base: Config, straight: Trace) -> None:
    def spoil(trainer: Trainer) -> None:
        evaluate = trainer.evaluate

        def interrupted() -> None:
            signal.raise_signal(signal.SIGTERM)
            evaluate()

        trainer.evaluate = interrupted  # type: ignore[method-assign]

    config = named(base, "interrupted evaluation")
    assert fit(config, spoil=spoil, on_rank=1) == [False, False]
    assert checkpoint_names(config) == ["latest", "step_00000004"]
    assert trace(config).validation == []  # the next launch does it
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))


@pytest.mark.promise("R4")
def test_a_signal_in_the_last_step_loses_nothing(base: Config, straight: Trace) -> None:
    config = named(base, "interrupted at the end")
    assert fit(config, spoil=signal_after(7, signal.SIGTERM), on_rank=1) == [False, False]
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))


@pytest.mark.promise("R4")
def test_a_repeated_signal_does_not_disturb_the_save(base: Config, straight: Trace) -> None:
    def spoil(trainer: Trainer) -> None:
        signal_after(3, signal.SIGTERM)(trainer)
        save = trainer.checkpoints.backend.save

        def disturbed(directory: Path) -> Any:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            return save(directory)

        trainer.checkpoints.backend.save = disturbed  # type: ignore[method-assign]

    config = named(base, "disturbed")
    assert fit(config, spoil=spoil, on_rank=1) == [False, False]
    assert checkpoint_names(config) == ["latest", "step_00000004"]
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))


def raised_within(owner: str, method: str, call: int) -> Spoil:
    """Send the rank a signal in the given call (from 1) of a method of the trainer or one of its components."""

    def spoil(trainer: Trainer) -> None:
        target = attrgetter(owner)(trainer) if owner else trainer
        original, calls = getattr(target, method), count(1)

        def interrupted(*arguments: Any, **settings: Any) -> Any:
            if next(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return original(*arguments, **settings)

        object.__setattr__(target, method, interrupted)

    return spoil


# During which call, on which rank the signal arrives, and the step that must be saved.
MOMENTS: dict[str, tuple[Spoil, int, int]] = {
    **{
        f"step {step + 1} on rank {rank}": (signal_after(step, signal.SIGUSR1), rank, step + 1)
        for step, rank in ((Random(7).randrange(0, 7), 0), (Random(8).randrange(0, 7), 1))
    },
    "data loading": (raised_within("loader", "next_step", 3), 1, 2),
    "a periodic save": (raised_within("checkpoints.backend", "save", 1), 1, 3),
    "a periodic save's publishing": (raised_within("checkpoints.manager", "_expire", 1), 0, 3),
    "the evaluation after step 4": (raised_within("", "stop_between_batches", 3), 1, 4),
    "the backward pass": (raised_within("backend", "backward", 5), 1, 3),
    "the metrics": (raised_within("", "write_metrics", 2), 0, 3),
}


@pytest.mark.promise("R4", backend="fsdp2")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment(base: Config, straight: Trace, moment: str) -> None:
    spoil, rank, saved = MOMENTS[moment]
    config = replace(named(base, moment), checkpoint=replace(base.checkpoint, every_steps=3))
    assert fit(config, spoil=spoil, on_rank=rank) == [False, False]
    assert checkpoint_names(config)[-1] == f"step_{saved:08d}"
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))


@pytest.mark.promise("R4", backend="fsdp2")
def test_a_signal_while_a_checkpoint_is_written_in_the_background(base: Config, straight: Trace) -> None:
    asynchronous = replace(base.checkpoint, every_steps=3, asynchronous=True)
    config = replace(named(base, "in the background"), checkpoint=asynchronous)
    assert fit(config, spoil=raised_within("checkpoints.background", "start", 1), on_rank=1) == [False, False]
    assert checkpoint_names(config) == ["latest", "step_00000003"]
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))
