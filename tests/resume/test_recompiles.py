"""A run told to fail on recompilation ends on every rank when one recompiles, and saves no half-done step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.train import Trainer
from tests.distributed.harness import RankFailed
from tests.resume.runs import directory_of, fit, named, tiny_run

FORGETS_AT = 4
"""Steps after which a rank compiles again."""


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured but run uncompiled, because compilation takes minutes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))


@pytest.fixture(autouse=True)
def fresh_counters() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def forget_graphs(trainer: Trainer) -> None:
    """Recompile in one step, as for a new shape."""
    train_step = trainer.train_step

    def step(batch: Any) -> Any:
        if trainer.progress.step == FORGETS_AT:
            torch._dynamo.reset()
        return train_step(batch)

    trainer.train_step = step  # type: ignore[method-assign]


@pytest.mark.usefixtures("quick_compiler")
def test_a_recompilation_on_one_rank_ends_the_run_when_asked(tmp_path: Path) -> None:
    base = tiny_run(tmp_path, compile=True)
    late = named(base, "late", fail_on_recompile_after=FORGETS_AT + 1)
    assert fit(late, spoil=forget_graphs, on_rank=1) == [True, True]
    strict = named(base, "strict", fail_on_recompile_after=2)
    with pytest.raises(RankFailed, match=rf"TrainingError: step {FORGETS_AT + 1} needs a recompilation"):
        fit(strict, spoil=forget_graphs, on_rank=1)
    assert not list((directory_of(strict) / "checkpoints").glob("step_*"))


@pytest.mark.usefixtures("quick_compiler")
def test_evaluation_may_compile(tmp_path: Path) -> None:
    base = tiny_run(tmp_path, compile=True, fail_on_recompile_after=2, eval_every=4)
    assert fit(base, world_size=1) == [True]


def test_watching_recompilation_without_compiling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fail_on_recompile_after"):
        validate(tiny_run(tmp_path, fail_on_recompile_after=2))
