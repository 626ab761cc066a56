"""The moving average of the weights under every backend: its values, evaluation, resume, and interchange."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.config import Config
from megamor.parallel import zero_config
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    LOSS_FREE,
    assert_resumes_bitwise,
    digest,
    evaluate,
    preload_deepspeed,
    run_step,
    save,
    start,
    stored_tensors,
    tiny,
)

DECAY = 0.3
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "single": ({"backend": "single"}, 1),
    "ddp": ({"backend": "ddp"}, 2),
    "fsdp2": ({"backend": "fsdp2"}, 2),
    "fsdp2 in bf16": ({"backend": "fsdp2", "precision": "bf16", "reshard_after_forward": False}, 2),
    "hsdp": ({"backend": "fsdp2", "shard_degree": 2}, 4),
    "zero 0": ({"backend": "deepspeed", "zero_stage": 0}, 2),
    "zero 1 in bf16": ({"backend": "deepspeed", "zero_stage": 1, "precision": "bf16"}, 2),
    "zero 2": ({"backend": "deepspeed", "zero_stage": 2}, 2),
    "zero 3": ({"backend": "deepspeed", "zero_stage": 3}, 2),
    "zero 3 in bf16": ({"backend": "deepspeed", "zero_stage": 3, "precision": "bf16"}, 2),
}
FAST = ("single", "zero 3")
CASES_OR_SLOW = [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]


def averaged(decay: float | None = DECAY, **options: Any) -> Config:
    config = tiny(**{"router": LOSS_FREE, **options})
    return replace(config, optim=replace(config.optim, average_decay=decay))


@pytest.fixture(autouse=True)
def small_parameters_are_sharded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_config, "PERSIST_BELOW", 100)


def three_steps(config: Config, directory: Path) -> list[float]:
    """Save after each of three steps, of which the second is skipped; losses before, with, and after the average."""
    backend = start(config)
    for step, spoil in enumerate((1.0, float("nan") if backend.rank == 0 else 1.0, 1.0)):
        run_step(backend, step + 4, config, spoil)
        save(backend, directory / str(step))
    losses = [evaluate(backend, config)]
    with backend.averaged():
        losses.append(evaluate(backend, config))
        save(backend, directory / "swapped")
    losses.append(evaluate(backend, config))
    save(backend, directory / "swapped back")
    return losses


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", CASES_OR_SLOW)
def test_average_of_each_real_step(case: str, tmp_path: Path) -> None:
    """d is min(.3, (1 + n) / (10 + n)): .1 in the first update, 2/11 in the second; the skipped step is none."""
    options, world_size = CASES[case]
    if options["backend"] == "deepspeed":
        preload_deepspeed()
    config = averaged(**options)
    run_ranks(initial, config, tmp_path / "initial", world_size=world_size)
    losses = run_ranks(three_steps, config, tmp_path, world_size=world_size)[0]
    stored = [stored_tensors(tmp_path / name) for name in ("initial", "0", "1", "2")]
    weights = [part(tensors, "model.") for tensors in stored]
    assert digest(stored[1]) == digest(stored[2])
    found = part(stored[3], "average.")
    assert found.pop("updates") == 2
    assert found.keys() == weights[0].keys() - {"stage.router.bias"}
    for name, average in found.items():
        expected = weights[0][name].double()
        for decay, tensors in ((0.1, weights[1]), (2 / 11, weights[3])):
            expected = decay * expected + (1 - decay) * tensors[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=0.0, atol=1e-7)
    assert losses[0] == losses[2] != losses[1]
    swapped, back = stored_tensors(tmp_path / "swapped"), stored_tensors(tmp_path / "swapped back")
    assert digest(back) == digest(stored[3])
    for name, average in found.items():
        assert torch.equal(swapped[f"model.{name}"], average)
    assert losses[1] == pytest.approx(run_ranks(loss_of, config, tmp_path / "swapped", world_size=world_size)[0])


def initial(config: Config, directory: Path) -> None:
    save(start(config), directory)


def loss_of(config: Config, directory: Path) -> float:
    backend = start(config)
    backend.load(directory)
    return evaluate(backend, config)


@pytest.mark.parametrize(
    "case", ["hsdp", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "hsdp")]
)
def test_resume_is_bitwise(case: str, tmp_path: Path) -> None:
    options, world_size = CASES[case]
    if options["backend"] == "deepspeed":
        preload_deepspeed()
    assert_resumes_bitwise(averaged(**options), tmp_path, world_size)


def copied(config: Config, source: Path, target: Path) -> None:
    backend = start(config)
    backend.load(source)
    save(backend, target)


@pytest.mark.slow
def test_the_average_passes_through_backends_and_may_begin_or_end_at_a_resume(tmp_path: Path) -> None:
    run_ranks(three_steps, averaged(backend="fsdp2"), tmp_path, world_size=2)
    written, source = stored_tensors(tmp_path / "2"), tmp_path / "2"
    preload_deepspeed()
    for name in ("ddp", "hsdp", "zero 1 in bf16", "zero 3", "single"):
        options, world_size = CASES[name]
        run_ranks(copied, averaged(**options), source, tmp_path / name, world_size=world_size)
        assert digest(stored_tensors(tmp_path / name)) == digest(written), name
        source = tmp_path / name
    run_ranks(copied, averaged(None, backend="ddp"), source, tmp_path / "without", world_size=2)
    without = stored_tensors(tmp_path / "without")
    assert without.keys() == {name for name in written if not name.startswith("average.")}
    run_ranks(copied, averaged(backend="fsdp2"), tmp_path / "without", tmp_path / "again", world_size=2)
    again = stored_tensors(tmp_path / "again")
    assert again["average.updates"] == 0
    for name, value in part(again, "average.").items():
        assert name == "updates" or torch.equal(value, without[f"model.{name}"])
