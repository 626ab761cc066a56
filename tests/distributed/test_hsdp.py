"""HSDP (FSDP2 within groups of processes, replicas across them): agreement with one process, resume, collectives."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megamor.config import Config, ParallelConfig
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.parallel import shard_degree
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    EXPERT_CHOICE,
    FIXED_DEPTH,
    LOSS_FREE,
    StepResult,
    assert_resumes_bitwise,
    digest,
    fresh_run,
    load_and_run,
    relative_differences,
    run_and_save,
    start,
    stored_tensors,
    tiny,
)

# Replicas x shards.
SHAPES = [pytest.param(2, 1, id="2 x 1"), pytest.param(2, 2, id="2 x 2")]


@pytest.fixture(scope="module")
def whole_batch() -> list[StepResult]:
    """One process, one micro-batch."""
    return run_ranks(fresh_run, tiny("single", router=FIXED_DEPTH, micro_batch_size=4), world_size=1)[0]


@pytest.mark.promise("R7", backend="hsdp")
@pytest.mark.parametrize(("replicas", "shards"), SHAPES)
def test_twenty_steps_agree_with_one_process(replicas: int, shards: int, whole_batch: list[StepResult]) -> None:
    """Two micro-batches a step on two processes, one on four."""
    results = run_ranks(fresh_run, tiny("fsdp2", router=FIXED_DEPTH, shard_degree=shards), world_size=replicas * shards)
    assert all(result == results[0] for result in results)
    assert max(relative_differences(whole_batch, results[0])) < 1e-6


@pytest.mark.promise("R1", backend="hsdp")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("replicas", "shards"), SHAPES)
def test_resume_is_bitwise(replicas: int, shards: int, precision: str, tmp_path: Path) -> None:
    router = EXPERT_CHOICE if precision == "fp32" else LOSS_FREE
    config = tiny("fsdp2", shard_degree=shards, precision=precision, router=router)
    assert_resumes_bitwise(config, tmp_path, replicas * shards)


def held(config: Config) -> tuple[tuple[int, ...], float]:
    """The ranks that together hold all weights, and the fraction that this rank holds."""
    backend = start(config)
    parameters = [parameter for parameter in backend.module.parameters() if isinstance(parameter, DTensor)]
    local = sum(parameter.to_local().numel() for parameter in parameters)
    group = parameters[0].device_mesh.get_group("shard")
    return tuple(dist.get_process_group_ranks(group)), local / sum(parameter.numel() for parameter in parameters)


def test_neighbours_share_the_weights_and_groups_repeat_them() -> None:
    shares = run_ranks(held, tiny("fsdp2", shard_degree=2), world_size=4)
    assert [group for group, _ in shares] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert all(0.45 < share < 0.55 for _, share in shares)
    assert [share for _, share in run_ranks(held, tiny("fsdp2", shard_degree=1))] == [1.0, 1.0]


def on_two_nodes(function: Callable[..., Any], config: Config, *args: Any) -> Any:
    """`function` on this rank, as a launcher of two processes on each node would start it."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return function(config, *args)


def test_the_ranks_of_a_node_are_a_group_unless_told_otherwise(tmp_path: Path) -> None:
    def shards(config: Config) -> list[Any]:
        return run_ranks(on_two_nodes, held, config, world_size=4)

    assert [group for group, _ in shards(tiny("fsdp2"))] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [group for group, _ in shards(tiny("fsdp2", shard_degree=4))] == [(0, 1, 2, 3)] * 4
    saved, straight, resumed = (tmp_path / name for name in ("saved", "straight", "resumed"))
    expected = run_ranks(on_two_nodes, run_and_save, tiny("fsdp2"), saved, straight, world_size=4)[0]
    again = run_ranks(on_two_nodes, load_and_run, tiny("fsdp2"), saved, resumed, world_size=4)[0]
    assert again == expected
    assert digest(stored_tensors(straight)) == digest(stored_tensors(resumed))
    elsewhere = run_ranks(load_and_run, tiny("fsdp2", reshard_after_forward=False), saved, resumed, world_size=2)[0]
    assert max(relative_differences(expected, elsewhere)) < 1e-6


def test_a_model_that_a_node_cannot_hold_is_sharded_over_all() -> None:
    """16 bytes a parameter over 8 GPUs of 80 GB, of which half may be taken: 20G parameters."""
    parallel = ParallelConfig("fsdp2")
    assert [shard_degree(parallel, 64, 8, n, 80e9) for n in (1_700_000_000, 20_000_000_000, 20_000_000_001)] == [
        8,
        8,
        64,
    ]
    assert shard_degree(parallel, 20, 8, 1000, 80e9) == 20, "nodes with different numbers of processes"
    assert shard_degree(parallel, 8, 8, 1000, 80e9) == 8
    assert shard_degree(replace(parallel, shard_degree=2), 64, 8, 10**12, 80e9) == 2


def test_groups_that_do_not_fit_are_refused() -> None:
    def checked(backend: str, world_size: int) -> None:
        config = tiny(backend, shard_degree=3)
        validate(replace(config, train=replace(config.train, global_batch_size=12)), world_size)

    checked("fsdp2", 3)
    checked("auto", 1)
    for backend, world_size in (("fsdp2", 4), ("fsdp2", 1), ("auto", 2)):
        with pytest.raises(ConfigError, match=r"shard_degree = 3 doesn't divide"):
            checked(backend, world_size)
    with pytest.raises(ConfigError, match=r"shard_degree = 3 needs fsdp2, but parallel.backend = ddp"):
        checked("ddp", 3)
