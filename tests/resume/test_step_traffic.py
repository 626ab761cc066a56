"""The collectives of a training step besides the gradients, and when the loop waits for the device."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamor.config import Config, GuardConfig
from megamor.parallel import init_world
from megamor.train import build_trainer
from megamor.train import trainer as trainer_module
from megamor.train.step_statistics import PendingSummary
from tests.distributed.harness import run_ranks
from tests.resume.runs import STEPS, tiny_run

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "reduce", "barrier",
)  # fmt: skip


class Reads(TorchDispatchMode):
    """Refuses to read a number from a tensor, for which the host would wait if it were on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Whole numbers are the host's: tokens of a batch, and rows of documents, which only a CPU's layouts read.
        assert func is not torch.ops.aten._local_scalar_dense.default or args[0].dtype == torch.int64
        return func(*args, **(kwargs or {}))


def per_step(config: Config) -> tuple[Counter[str], list[tuple[str, int]]]:
    """megamor's own collectives in the middle steps of a run, and what was queued and read, in order, by step."""
    trainer = build_trainer(config, init_world(config.parallel))
    counts: dict[int, Counter[str]] = {}
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*arguments: object, _name: str = name, _original: object = original, **settings: object) -> object:
            counts.setdefault(trainer.progress.step, Counter())[_name] += 1
            return _original(*arguments, **settings)  # type: ignore[operator]

        setattr(dist, name, counted)
    order: list[tuple[str, int]] = []
    wait, queue = PendingSummary.wait, trainer.run_micro_batches

    def reading(pending: PendingSummary) -> object:
        order.append(("read", sum(what == "read" for what, _ in order) + 1))
        return wait(pending)

    def queueing(*arguments: object) -> PendingSummary:
        order.append(("queue", trainer.progress.step + 1))
        with Reads():
            return queue(*arguments)  # type: ignore[arg-type]

    PendingSummary.wait = reading  # type: ignore[method-assign, assignment]
    trainer.run_micro_batches = queueing  # type: ignore[method-assign]
    assert trainer.fit()
    middle = [counts[step] for step in range(2, STEPS - 2)]
    assert all(step == middle[0] for step in middle)
    return middle[0], order


@pytest.mark.parametrize("settings", [{}, {"backend": "ddp"}], ids=["fsdp2", "ddp"])
def test_a_step_has_one_vote_and_one_reduction_of_figures(tmp_path: Path, settings: dict[str, str]) -> None:
    """It used to be five and more: failures, labels, figures, metrics, stop, each but the second with a wait.

    Between the vote and the figures the host reads nothing.
    """
    config = tiny_run(tmp_path, **settings)  # type: ignore[arg-type]
    collectives, order = run_ranks(per_step, config)[0]
    assert collectives == {"all_reduce": 2}
    late = [("queue", 1), *(pair for step in range(2, STEPS + 1) for pair in (("queue", step), ("read", step - 1)))]
    assert order == [*late, ("read", STEPS)]


def test_figures_are_read_at_once_where_the_guard_decides(tmp_path: Path) -> None:
    config = replace(tiny_run(tmp_path), guard=GuardConfig(skip_non_finite=True))
    collectives, order = run_ranks(per_step, config)[0]
    assert collectives == {"all_reduce": 2}
    assert order == [pair for step in range(1, STEPS + 1) for pair in (("queue", step), ("read", step))]


def frozen_objects(config: Config) -> list[int]:
    """Objects that garbage collection leaves alone: in the forward pass of each step, and after the run."""
    fit_trainer = build_trainer(config, init_world(config.parallel))
    found, update = [], fit_trainer.backend.step

    def counted(max_grad_norm: float) -> Tensor:
        found.append(gc.get_freeze_count())
        return update(max_grad_norm)

    fit_trainer.backend.step = counted  # type: ignore[method-assign]
    assert fit_trainer.fit()
    return [*found, gc.get_freeze_count()]


def test_garbage_collection_leaves_out_what_exists_after_the_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "SETTLING_STEPS", 2)
    found = run_ranks(frozen_objects, tiny_run(tmp_path), world_size=1)[0]
    assert found[:2] == [0, 0]
    assert min(found[2:-1]) > 10_000
    assert found[-1] == 0
