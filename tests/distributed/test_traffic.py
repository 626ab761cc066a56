"""The predicted traffic of a step compared with the collectives of two processes, byte by byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megamor.config import Config
from megamor.plan.traffic import Traffic, step_traffic
from tests.distributed.harness import run_ranks
from tests.distributed.runs import FIXED_DEPTH, preload_deepspeed, run_step, start, tiny

KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
SMALL = 256
"""Bytes of small messages that aren't predicted: norms, flags, and which parameters were used."""

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2, kept": ("fsdp2", {"reshard_after_forward": False}),
    **{f"zero {stage}": ("deepspeed", {"zero_stage": stage}) for stage in range(4)},
}


class CountBytes(TorchDispatchMode):
    """Sums the bytes of full tensors in the process group's operations by kind, and records their types."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [value for value in tree_iter(args[:2]) if isinstance(value, torch.Tensor)]
            if tensors:
                whole = max(tensors, key=torch.Tensor.numel)
                kind = KINDS[func.overloadpacket.__name__]
                self.bytes[kind] += whole.nbytes
                if whole.nbytes > SMALL:
                    self.dtypes.setdefault(kind, set()).add(whole.dtype)
        return func(*args, **(kwargs or {}))


def count(config: Config) -> tuple[Counter[str], dict[str, set[torch.dtype]]]:
    """Bytes and types by kind, of a step after the first."""
    backend = start(config)
    for step in range(2):
        run_step(backend, step, config)
    with CountBytes() as counted:
        run_step(backend, 2, config)
    return counted.bytes, counted.dtypes


@pytest.fixture(scope="module", autouse=True)
def deepspeed_before_forking() -> None:
    preload_deepspeed()


@pytest.mark.parametrize(("precision", "micro_batches"), [("fp32", 1), ("bf16", 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_of_a_step(backend: str, precision: str, micro_batches: int) -> None:
    name, options = BACKENDS[backend]
    micro_batch_size = 2 // micro_batches
    config = tiny(name, router=FIXED_DEPTH, precision=precision, micro_batch_size=micro_batch_size, **options)
    expected: Traffic = step_traffic(config, 2)
    counted, dtypes = run_ranks(count, config)[0]
    for kind in KINDS.values():
        assert 0 <= counted[kind] - getattr(expected, kind) < SMALL, kind
    reductions = dtypes.get("reduce_scatter", set()) | dtypes.get("all_reduce", set())
    assert reductions == {torch.float32}, "gradients are reduced in fp32"


@pytest.mark.parametrize("policy", ["recursion", "block", "selective"])
@pytest.mark.parametrize("backend", ["fsdp2", "zero 3"])
def test_recomputation_sends_nothing_more(backend: str, policy: str) -> None:
    name, options = BACKENDS[backend]
    config = tiny(name, router=FIXED_DEPTH, micro_batch_size=2, **options)
    again = replace(config, train=replace(config.train, activation_checkpointing=policy))  # type: ignore[arg-type]
    assert run_ranks(count, again)[0] == run_ranks(count, config)[0]


def test_hybrid_sharding_reduces_slices_over_groups() -> None:
    config = tiny("fsdp2", router=FIXED_DEPTH, micro_batch_size=1, shard_degree=2)
    traffic = step_traffic(config, 4)
    counted, _ = run_ranks(count, config, world_size=4)[0]
    assert traffic.replicas == traffic.shards == 2
    for kind in KINDS.values():
        assert 0 <= counted[kind] - getattr(traffic, kind) < SMALL, kind
