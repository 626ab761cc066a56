"""Collectives of FSDP2: the shared core is gathered once, however many recursions run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamor.config import Config, RecursionConfig
from megamor.model import build_model
from megamor.parallel import init_world
from megamor.parallel.fsdp2 import shard
from tests.distributed.harness import run_ranks
from tests.distributed.runs import FIXED_DEPTH, run_step, start, tiny


class CountCollectives(TorchDispatchMode):
    """Counts the operations of the process group by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def with_recursions(num_recursions: int, **settings: bool) -> Config:
    """Two shared blocks in a loop; one micro-batch a step."""
    config = tiny("fsdp2", router=FIXED_DEPTH, micro_batch_size=2, **settings)
    return replace(
        config,
        model=replace(config.model, num_layers=2 + 2 * num_recursions),
        recursion=RecursionConfig(num_recursions, "middle_cycle"),
    )


def count(config: Config) -> tuple[int, int]:
    """All-gathers and reduce-scatters of one step."""
    backend = start(config)
    run_step(backend, 0, config)
    with CountCollectives() as sent:
        run_step(backend, 1, config)
    return sent.counts["_allgather_base_"], sent.counts["_reduce_scatter_base_"]


def test_collectives_do_not_depend_on_the_number_of_recursions() -> None:
    """Prelude, core and coda are gathered in forward and backward, the root once; each gradient is reduced once."""
    assert [run_ranks(count, with_recursions(depth))[0] for depth in (2, 4)] == [(4 + 3, 4)] * 2
    assert run_ranks(count, with_recursions(4, reshard_after_forward=False))[0] == (4, 4)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_weights_that_are_kept_are_gathered_once_a_step(micro_batches: int) -> None:
    """Gradients are reduced in the last micro-batch only. Freed weights are gathered in each pass of every micro-batch,
    except the root's, which are in use between the passes anyway."""
    for kept, gathers in ((True, 4), (False, 1 + 2 * 3 * micro_batches)):
        config = with_recursions(2, reshard_after_forward=not kept)
        train = replace(config.train, micro_batch_size=1, global_batch_size=2 * micro_batches)
        assert run_ranks(count, replace(config, train=train))[0] == (gathers, 4)


@pytest.mark.parametrize("policy", ["recursion", "block", "selective"])
def test_recomputation_gathers_nothing_again(policy: str) -> None:
    """Recomputation runs in a unit's backward pass, while its weights are gathered, and so adds no collectives."""
    config = with_recursions(4)
    config = replace(config, train=replace(config.train, activation_checkpointing=policy))  # type: ignore[arg-type]
    assert run_ranks(count, config)[0] == (4 + 3, 4)
    accumulated = replace(config, train=replace(config.train, micro_batch_size=1))
    assert run_ranks(count, accumulated)[0] == (1 + 2 * 6, 4)


def test_adding_shared_gradients_in_fp32_sends_nothing_more() -> None:
    """All recursions use the same gathered weight, and its gradient is reduced once."""
    config = with_recursions(4)
    config = replace(config, train=replace(config.train, precision="bf16", add_shared_gradients_in_fp32=True))
    assert run_ranks(count, config)[0] == (4 + 3, 4)


def test_a_model_on_the_meta_device_can_be_sharded() -> None:
    assert run_ranks(shard_meta) == [True, True]


def shard_meta() -> bool:
    config = tiny("fsdp2")
    world = init_world(config.parallel)
    model = build_model(config, device="meta")
    shard(model, model.parallel_plan(), init_device_mesh("cpu", (world.size,)), "fp32", reshard=True)
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) and parameter.is_meta for parameter in parameters)
    model.to_empty(device="cpu")
    model.init_weights()
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    return (
        local < 0.6 * sum(parameter.numel() for parameter in parameters)
        and torch.isfinite(model(torch.zeros(1, 8, dtype=torch.int64)).logits).all().item()
    )
