"""Everything that changes during training is in the checkpoint, or is known not to matter after a restart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megamor.config import CheckpointConfig, Config, EmaThresholdConfig
from megamor.parallel import init_world
from megamor.train import Trainer, build_trainer
from tests.distributed.harness import run_ranks
from tests.resume.runs import LOSS_FREE, tiny_run, until

# Class and attribute (or all attributes) of state that changes and isn't saved, with the reason.
NOT_SAVED = {
    ("Trainer", "data_wait"): "a measurement of the latest step",
    ("Backend", "router_square"): "a measurement of the latest step",
    ("Evaluations", "done"): "read from the metrics at a restart",
    ("Trainer", "saved_step"): "the restored step, at a restart",
    ("LaunchSummary", "*"): "sums over this launch",
    ("Throughput", "*"): "speed of this launch",
    ("TrainingDisplay", "*"): "display",
    ("Watchdog", "*"): "last heartbeat of this launch",
    ("StopRequest", "*"): "signals to this launch",
    ("WriteLock", "*"): "what keeps other launches away from this one",
    ("JsonlSink", "*"): "where the metrics file ends",
}


def reachable(root: object) -> Iterator[object]:
    """The project's own objects that `root` holds, directly or through containers and modules."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list | tuple | deque | set | frozenset):
            waiting += item
        elif type(item).__module__.split(".")[0] in ("megamor", "tests") and hasattr(item, "__dict__"):
            yield item
            waiting += vars(item).values()
            if isinstance(item, nn.Module):
                waiting += item.children()


def frozen(value: object) -> object:
    """A copy that can be compared later: plain data and arrays by value, everything else by its type."""
    if isinstance(value, bool | int | float | str | bytes | type(None)):
        return value
    if isinstance(value, Tensor):
        return value.numpy(force=True).tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, Mapping):
        return {str(key): frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return [frozen(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return type(value).__name__


def attributes(item: object) -> dict[str, object]:
    """An object's attributes by value; for a module, also the buffers that aren't in its state dict."""
    found = {name: frozen(value) for name, value in vars(item).items() if not name.startswith("_modules")}
    if isinstance(item, nn.Module):
        for name in ("_parameters", "_buffers"):
            found.pop(name, None)
        found |= {name: frozen(item._buffers[name]) for name in item._non_persistent_buffers_set}
    return found


def changed_and_not_saved(trainer: Trainer) -> set[tuple[str, str]]:
    """(class, attribute) of all state that training changes and `RunCheckpoints` doesn't save."""
    checkpoints = trainer.checkpoints
    saved = [trainer.progress, checkpoints.loader, *checkpoints.components.values()]
    covered = {id(item) for root in saved for item in reachable(root)}
    before = [(item, attributes(item)) for item in reachable(trainer) if id(item) not in covered]
    assert trainer.fit()
    return {
        (type(item).__name__, name)
        for item, values in before
        for name, value in attributes(item).items()
        if name not in values or values[name] != value
    }


class Stray:
    """A stateful object that isn't registered with the checkpoints."""

    def __init__(self) -> None:
        self.losses: list[float] = []


def unsaved(config: Config, stray: str) -> set[tuple[str, str]]:
    trainer = build_trainer(config, init_world(config.parallel))
    if stray == "object":
        memory = Stray()
        log_step = trainer.log_step

        def log_and_remember(step: Any, summary: Any) -> None:
            memory.losses.append(summary.loss)
            log_step(step, summary)

        trainer.log_step = log_and_remember  # type: ignore[method-assign]
        trainer.memory = memory  # type: ignore[attr-defined]
    elif stray == "buffer":
        router = trainer.model.stage.router
        router.register_buffer("counted", torch.zeros(1), persistent=False)
        update = router.update

        def update_and_count(totals: Any) -> None:
            update(totals)
            router.counted.add_(1)

        router.update = update_and_count
    return changed_and_not_saved(trainer)


def is_forgotten_on_purpose(found: tuple[str, str]) -> bool:
    return found in NOT_SAVED or (found[0], "*") in NOT_SAVED


@pytest.mark.promise("R9")
@pytest.mark.parametrize("router", [LOSS_FREE, EmaThresholdConfig()], ids=["loss free", "ema threshold"])
def test_everything_that_changes_is_saved(router: Any, tmp_path: Path) -> None:
    config = replace(tiny_run(tmp_path, eval_every=2), router=router, checkpoint=CheckpointConfig(every_steps=2))
    (found,) = run_ranks(unsaved, until(config, 3), "", world_size=1)
    unexpected = {item for item in found if not is_forgotten_on_purpose(item)}
    assert not unexpected, "register it with RunCheckpoints.components, or say in NOT_SAVED why it needn't be"


@pytest.mark.promise("R9")
@pytest.mark.parametrize(
    ("stray", "named"), [("object", ("Stray", "losses")), ("buffer", ("TokenChoiceRouter", "counted"))]
)
def test_what_is_not_registered_is_found(stray: str, named: tuple[str, str], tmp_path: Path) -> None:
    config = replace(tiny_run(tmp_path), router=LOSS_FREE)
    (found,) = run_ranks(unsaved, until(config, 2), stray, world_size=1)
    assert named in found
    assert not is_forgotten_on_purpose(named)
