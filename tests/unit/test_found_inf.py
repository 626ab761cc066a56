"""A step whose gradients aren't finite changes no bit, though the host never asks whether they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamor.config import ParallelConfig
from megamor.model import build_model
from megamor.optim import build_optimizer
from megamor.parallel import World, build_backend
from megamor.parallel.average import WeightAverage
from tests.combinations import ROUTERS, tiny_config, tokens


def backend_of(kind: str) -> Any:
    config = tiny_config(ROUTERS["expert_choice"])
    config = replace(
        config,
        parallel=ParallelConfig(backend="single"),
        optim=replace(config.optim, kind=kind, average_decay=0.9, weight_decay=0.1),
    )
    model = build_model(config, seed=0)
    return build_backend(model, config, World(0, 1, 0, torch.device("cpu")), lambda m: build_optimizer(m, config))


def run(backend: Any, factor: float) -> torch.Tensor:
    out = backend.model(tokens(), tokens(1))
    backend.backward(out.loss_sum * factor, last_micro_batch=True)
    backend.set_lr(1e-3)
    norm: torch.Tensor = backend.step(1.0)
    return norm


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_step_changes_no_bit(kind: str) -> None:
    skips, plain = backend_of(kind), backend_of(kind)
    for backend in (skips, plain):
        run(backend, 1.0)
    before = {name: value.clone() for name, value in skips.stored().items()}
    assert not run(skips, float("nan")).isfinite()
    after = skips.stored()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    run(skips, 1.0)
    run(plain, 1.0)
    want = plain.stored()
    assert all(torch.equal(value, want[name]) for name, value in skips.stored().items())
    assert want["average.updates"] == 2


def test_the_average_follows_its_formula() -> None:
    weight = torch.randn(5)
    average, expected = WeightAverage({"model.w": weight}, 0.99), weight.clone()
    for count in range(4):
        weight += 1
        average.update(torch.tensor(float(count == 2)))
        if count != 2:
            taken = count - (count > 2)
            expected.lerp_(weight, 1 - min(0.99, (1 + taken) / (10 + taken)))
    assert torch.equal(average.tensors["average.w"], expected)
