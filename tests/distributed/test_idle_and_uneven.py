"""Steps that skip a module, and ranks that loop through it a different number of times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megamor.config import Config, OptimConfig
from megamor.model import ParallelPlan
from megamor.optim import build_adamw
from megamor.parallel import build_backend, init_world
from tests.distributed.harness import run_ranks
from tests.distributed.runs import preload_deepspeed, save, stored_tensors, tiny

DIM = 8
# Recursions of the two samples of each step. With zero recursions the core isn't called and its gradient is zero.
DEPTHS = [(1, 3), (2, 2), (0, 0), (3, 1), (0, 0), (0, 0), (1, 2)]
BACKENDS = [tiny("ddp"), tiny("fsdp2"), *(tiny("deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3))]


class Core(nn.Module):
    """Two blocks in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def forward(self, x: Tensor, depth: int) -> Tensor:
        for _ in range(depth):
            for block in self.blocks:
                x = x + torch.tanh(block(x))
        return x


class Looped(nn.Module):
    """A projection around a core of given depth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.core, self.after = nn.Linear(DIM, DIM), Core(), nn.Linear(DIM, 1)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        x = self.before(x)
        return self.after(self.core(x, depth) if depth else x).square().mean()

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan([self.core], [self.core])

    def set_activation_checkpointing(self, policy: str, selective_ops: Sequence[str]) -> None:
        assert policy == "none"


def train(config: Config, directory: Path) -> None:
    """A step for each of `DEPTHS`, then a save. One process takes both samples as micro-batches, two take one each."""
    config = replace(config, optim=OptimConfig(weight_decay=0.5))
    backend = build_backend(
        Looped(), config, init_world(config.parallel), lambda model: build_adamw(model, config.optim)
    )
    for step, depths in enumerate(DEPTHS):
        samples = torch.randn(2, 4, DIM, generator=torch.Generator().manual_seed(step))
        mine = range(2) if backend.world_size == 1 else [backend.rank]
        for index in mine:
            last = index == mine[-1]
            with backend.forward_context(last_micro_batch=last):
                loss = backend.model(samples[index], depths[index])
            backend.backward(loss / len(mine), last_micro_batch=last)
        backend.set_lr(1e-2)
        backend.step(1.0)
    save(backend, directory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    preload_deepspeed()
    directory = tmp_path_factory.mktemp("reference")
    run_ranks(train, tiny("single"), directory, world_size=1)
    return stored_tensors(directory)


@pytest.mark.promise("R11")
@pytest.mark.parametrize("config", BACKENDS, ids=["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"])
def test_weights_equal_those_of_one_process(config: Config, reference: dict[str, Tensor], tmp_path: Path) -> None:
    run_ranks(train, config, tmp_path, timeout=60.0)
    weights = {name: tensor for name, tensor in stored_tensors(tmp_path).items() if name.startswith("model.")}
    torch.testing.assert_close(weights, {name: reference[name] for name in weights}, rtol=1e-5, atol=1e-6)
