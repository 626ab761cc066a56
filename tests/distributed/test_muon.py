"""Muon on several processes: agreement with one process, collectives, resume, and state that any backend reads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.cli import verify_checkpoint
from megamor.config import Config
from tests.commands import status
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    FIXED_DEPTH,
    LOSS_FREE,
    StepResult,
    assert_resumes_bitwise,
    digest,
    relative_differences,
    run_and_save,
    run_step,
    save,
    start,
    stored_tensors,
    tiny,
)
from tests.distributed.test_collectives import CountCollectives
from tests.resume.runs import directory_of, fit, tiny_run

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "ddp": ({"backend": "ddp"}, 2),
    "fsdp2": ({"backend": "fsdp2"}, 2),
    "fsdp2, uneven": ({"backend": "fsdp2"}, 3),
    "hsdp": ({"backend": "fsdp2", "shard_degree": 2}, 4),
    "hsdp, replicas only": ({"backend": "fsdp2", "shard_degree": 1}, 2),
}


def muon(backend: str, **settings: Any) -> Config:
    """Twelve sequences a step, which three processes can divide."""
    config = tiny(backend, **{"router": FIXED_DEPTH, **settings})
    train = replace(config.train, global_batch_size=12)
    return replace(config, optim=replace(config.optim, kind="muon"), train=train)


def twenty_steps(config: Config, directory: Path) -> list[StepResult]:
    """Losses and gradient norms; weights and moments go to `directory`."""
    backend = start(config)
    results = [run_step(backend, step, config) for step in range(20)]
    save(backend, directory)
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[StepResult], dict[str, Tensor]]:
    """One process, one micro-batch."""
    directory = tmp_path_factory.mktemp("alone")
    results = run_ranks(twenty_steps, muon("single", micro_batch_size=12), directory, world_size=1)[0]
    return results, stored_tensors(directory)


@pytest.mark.promise("R7", backend=("ddp", "fsdp2", "hsdp"))
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in ("ddp", "fsdp2, uneven", "hsdp") else pytest.mark.slow) for case in CASES],
)
def test_twenty_steps_agree_with_one_process(
    case: str, alone: tuple[list[StepResult], dict[str, Tensor]], tmp_path: Path
) -> None:
    options, world_size = CASES[case]
    expected, weights = alone
    results = run_ranks(twenty_steps, muon(**options), tmp_path, world_size=world_size)
    assert all(result == results[0] for result in results)
    assert expected[-1][0] < 0.9 * expected[0][0]  # something was learned
    assert max(relative_differences(expected, results[0])) < 1e-6
    found = stored_tensors(tmp_path)
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert (value - weights[name]).abs().max() <= 1e-5 * max(1e-3, float(weights[name].abs().max())), name


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        ("ddp", "fp32"),
        ("fsdp2", "bf16"),
        *(
            pytest.param(case, precision, marks=pytest.mark.slow)
            for case, precision in itertools.product(CASES, ("fp32", "bf16"))
            if (case, precision) not in (("ddp", "fp32"), ("fsdp2", "bf16"))
        ),
    ],
)
def test_resume_is_bitwise(case: str, precision: str, tmp_path: Path) -> None:
    options, world_size = CASES[case]
    assert_resumes_bitwise(muon(**options, router=LOSS_FREE, precision=precision), tmp_path, world_size)


def sent_by_optimizer(config: Config) -> dict[str, int]:
    """Collectives of the optimizer's own step, by name."""
    backend = start(config)
    run_step(backend, 0, config)
    for parameter in backend.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with CountCollectives() as sent:
        backend.optimizer.step()
    return dict(sent.counts)


@pytest.mark.parametrize("case", CASES)
def test_all_matrices_travel_in_two_collectives(case: str) -> None:
    options, world_size = CASES[case]
    count = 1 if case in ("ddp", "hsdp, replicas only") else 2
    counts = run_ranks(sent_by_optimizer, muon(**options), world_size=world_size)
    assert counts == [{"alltoall_base_": count}] * world_size


CHAIN: list[tuple[str, dict[str, Any], int]] = [
    *((name, *case) for name, case in CASES.items()),
    ("single", {"backend": "single"}, 1),
]


def copied(config: Config, source: Path, target: Path) -> None:
    backend = start(config)
    backend.load(source)
    save(backend, target)


def test_state_passes_through_every_backend_unchanged(tmp_path: Path) -> None:
    run_ranks(run_and_save, muon("fsdp2"), tmp_path / "first", tmp_path / "unused")
    written = stored_tensors(tmp_path / "first")
    state = {name.rpartition(".")[2] for name in written if "state.prelude.0.ffn.up_proj" in name}
    assert state == {"momentum_buffer", "step"}
    assert written["optimizer.state.prelude.0.ffn.up_proj.weight.momentum_buffer"].any()
    assert "optimizer.state.embed.weight.exp_avg_sq" in written
    source = tmp_path / "first"
    for name, (options, world_size) in {**CASES, "single": ({"backend": "single"}, 1)}.items():
        run_ranks(copied, muon(**options), source, tmp_path / name, world_size=world_size)
        assert digest(stored_tensors(tmp_path / name)) == digest(written), name
        source = tmp_path / name


def after_a_skipped_step(config: Config, directory: Path) -> bool:
    """Whether a step whose gradient isn't finite on one rank leaves weights and moments as they were."""
    backend = start(config)
    run_step(backend, 0, config)
    save(backend, directory / "before")
    _, norm = run_step(backend, 1, config, spoil=float("nan") if backend.rank == 0 else 1.0)
    save(backend, directory / "after")
    return norm != norm


@pytest.mark.parametrize("case", ["ddp", "hsdp"])
def test_a_skipped_step_changes_no_bit(case: str, tmp_path: Path) -> None:
    options, world_size = CASES[case]
    assert all(run_ranks(after_a_skipped_step, muon(**options), tmp_path, world_size=world_size))
    before, after = (digest(stored_tensors(tmp_path / name)) for name in ("before", "after"))
    assert before == after


def test_a_run_writes_the_state_that_verification_expects(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    config = replace(config, optim=replace(config.optim, kind="muon", average_decay=0.9))
    assert all(fit(config))
    assert status(verify_checkpoint.main, str(directory_of(config))) == 0
