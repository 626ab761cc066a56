"""Launches with other numbers of processes, backends and global batches: the same samples in the same order, and the
same losses within rounding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megamor.config import Config, ParallelConfig
from megamor.parallel import init_world
from megamor.train import build_trainer
from tests.distributed.harness import run_ranks
from tests.distributed.runs import preload_deepspeed
from tests.resume.runs import directory_of, named, tiny_run, trace, until

GLOBAL_BATCH = 12
COMPARED = ("train/loss", "train/aux_loss", "train/grad_norm")
FSDP2 = ParallelConfig("fsdp2")
ZERO_2, ZERO_3 = ParallelConfig("deepspeed", zero_stage=2), ParallelConfig("deepspeed", zero_stage=3)
ZERO_1 = ParallelConfig("deepspeed", zero_stage=1)
DDP, HSDP = ParallelConfig("ddp"), ParallelConfig("fsdp2", shard_degree=2)
# Processes and backend of each launch; the others are compared with the first.
ROUTES = {
    "fsdp2": [(1, FSDP2), (2, FSDP2), (4, FSDP2), (3, FSDP2)],
    "zero 2": [(1, ZERO_2), (2, ZERO_2), (4, ZERO_2), (3, ZERO_2)],
    "from backend to backend": [(1, FSDP2), (2, ZERO_3), (4, HSDP), (3, ZERO_2)],
    "ddp": [(n, DDP) for n in (1, 2, 4, 3)],
    "zero 1": [(n, ZERO_1) for n in (1, 2, 4, 3)],
    "zero 3": [(1, ZERO_3), (2, ZERO_3), (4, ZERO_3), (3, ZERO_3)],
}
ORDINARY = ("fsdp2", "from backend to backend")
BACKENDS_OF: dict[str, str | tuple[str, ...]] = {name: name.replace("zero ", "zero") for name in ROUTES}
BACKENDS_OF |= {"from backend to backend": ("fsdp2", "zero3", "hsdp", "zero2")}


def fit_and_record(config: Config) -> bool:
    """A launch that records what each of its steps reads."""
    trainer = build_trainer(config, init_world(config.parallel))
    next_step = trainer.loader.next_step

    def recorded() -> list:
        batches = next_step()
        place = f"{trainer.progress.step:03d}_{trainer.backend.rank}.pt"
        torch.save(torch.cat([batch.inputs for batch in batches]), directory_of(config) / place)
        return batches

    trainer.loader.next_step = recorded  # type: ignore[method-assign]
    return trainer.fit()


def launch(config: Config, world_size: int, stop: int) -> None:
    assert all(run_ranks(fit_and_record, until(config, stop), world_size=world_size))


def samples(config: Config) -> Tensor:
    """What a run has read [samples, seq_len]: step by step, rank by rank."""
    return torch.cat([torch.load(path) for path in sorted(directory_of(config).glob("*.pt"))])


@pytest.fixture(autouse=True)
def deepspeed_before_forking() -> None:
    preload_deepspeed()


@pytest.mark.parametrize(
    "route",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.promise("R5", backend=BACKENDS_OF[name]),
                *([] if name in ORDINARY else [pytest.mark.slow]),
            ],
        )
        for name in ROUTES
    ],
)
def test_the_world_size_may_change(route: str, tmp_path: Path) -> None:
    base = tiny_run(tmp_path, global_batch_size=GLOBAL_BATCH)
    straight = replace(named(base, "straight"), parallel=ROUTES[route][0][1])
    launch(straight, 1, 8)
    for number, (world_size, parallel) in enumerate(ROUTES[route], start=1):
        launch(replace(base, parallel=parallel), world_size, 2 * number)
    assert len(samples(straight)) == 8 * GLOBAL_BATCH
    assert torch.equal(samples(base), samples(straight))
    for expected, found in zip(trace(straight).steps, trace(base).steps, strict=True):
        for name in COMPARED:
            assert found[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.promise("R6")
@pytest.mark.parametrize(
    ("parallel", "world_sizes"),
    [
        pytest.param(FSDP2, (2, 2, 2), id="fsdp2, the same processes"),
        pytest.param(FSDP2, (1, 2, 4), id="fsdp2"),
        pytest.param(ZERO_2, (1, 2, 4), id="zero 2"),
        *(
            pytest.param(parallel, (2, 4, 2), id=name, marks=pytest.mark.slow)
            for name, parallel in {"ddp": DDP, "hsdp": HSDP, "zero 1": ZERO_1, "zero 3": ZERO_3}.items()
        ),
    ],
)
def test_the_global_batch_may_change(parallel: ParallelConfig, world_sizes: Sequence[int], tmp_path: Path) -> None:
    base = replace(tiny_run(tmp_path), parallel=parallel)
    straight = replace(named(base, "straight"), parallel=FSDP2)
    launch(straight, 1, 8)
    for world_size, batch, stop in zip(world_sizes, (4, 8, 4), (2, 4, 5), strict=True):
        launch(named(base, "changing", global_batch_size=batch), world_size, stop)
    read = samples(named(base, "changing"))
    assert len(read) == 2 * 4 + 2 * 8 + 4
    assert torch.equal(read, samples(straight)[: len(read)])
    assert len({tuple(window) for window in read.tolist()}) == len(read)  # so a wrong order can't pass


def test_ranks_read_different_samples(tmp_path: Path) -> None:
    """Ranks get different samples, so that the tests above do compare an order."""
    config = tiny_run(tmp_path)
    launch(config, 2, 1)
    first, second = (torch.load(directory_of(config) / f"000_{rank}.pt") for rank in range(2))
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def _drawn(config: Config) -> tuple[float, ...]:
    """What this rank draws first in a run, from each source of random numbers."""
    build_trainer(config, init_world(config.parallel))
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_ranks_draw_different_random_numbers(tmp_path: Path) -> None:
    """All begin with the weights of one seed, then draw noise of their own, the same in every launch."""
    config = tiny_run(tmp_path)
    first, second = run_ranks(_drawn, config, world_size=2)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert run_ranks(_drawn, config, world_size=2) == [first, second]
