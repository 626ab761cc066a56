"""What all backends have in common: learning rates, clipping, optimizer state."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from megamor.config import Config, OptimConfig, ParallelConfig, TrainConfig
from megamor.errors import ConfigError
from megamor.model import ParallelPlan
from megamor.optim import build_adamw
from megamor.parallel import World, close_world, init_world
from megamor.parallel.backend import Backend, allocate_optimizer_state, clip_gradients, set_group_lr

OPTIM = OptimConfig(lr=0.1, weight_decay=0.2, aux_router_lr_multiplier=5.0)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(3, 2), "aux_router": nn.Linear(3, 1, bias=False)})


def give_gradients(model: nn.Module) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, index + 1.0)


def test_each_group_has_its_own_learning_rate_multiple() -> None:
    optimizer = build_adamw(small_model(), OPTIM)
    set_group_lr(optimizer, 0.01)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"model_decay": 0.01, "model_no_decay": 0.01, "aux_router_decay": 0.05}
    )


def test_segments_of_memory_may_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    for own in ({}, {names[0]: "max_split_size_mb:64"}, {names[1]: "backend:native"}):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "environ", {**os.environ, **own})
        init_world(ParallelConfig("single"))
        expected = own or {names[0]: "expandable_segments:True"}
        assert {name: value for name, value in os.environ.items() if name in names} == expected


def test_allocated_state_leaves_no_trace() -> None:
    """The weights equal those of an optimizer that creates its state in the first step."""
    plain, allocated = small_model(), small_model()
    optimizers = [build_adamw(plain, OPTIM), build_adamw(allocated, OPTIM)]
    allocate_optimizer_state(optimizers[1])
    for group in optimizers[1].param_groups:
        assert group["lr"] == OPTIM.lr
        assert {float(optimizers[1].state[parameter]["step"]) for parameter in group["params"]} == {0.0}
    for _ in range(3):
        for model, optimizer in zip((plain, allocated), optimizers, strict=True):
            give_gradients(model)
            optimizer.step()
    for one, other in zip(plain.parameters(), allocated.parameters(), strict=True):
        assert torch.equal(one, other)


def test_clipping_returns_the_norm_before_and_fills_in_zeros() -> None:
    model = small_model()
    optimizer = build_adamw(model, OPTIM)
    model["body"].weight.grad = torch.full((2, 3), 2.0)
    norm = clip_gradients(optimizer, 1.0)
    assert float(norm) == pytest.approx(24**0.5)
    assert float(model["body"].weight.grad.norm()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(model["aux_router"].weight.grad, torch.zeros(1, 3))
    assert float(clip_gradients(optimizer, 10.0)) == pytest.approx(1.0, rel=1e-5)
    assert float(model["body"].weight.grad.norm()) == pytest.approx(1.0, rel=1e-5)  # already short enough


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_gradient_that_is_not_finite_leaves_weights_and_moments(value: float) -> None:
    """Clipping turns an infinite norm into gradients of 0 and NaN: there must be no update, whichever it was."""
    model, config = small_model(), Config(train=TrainConfig(precision="fp32"))
    backend = Backend(
        model, ParallelPlan([]), config, World(0, 1, 0, torch.device("cpu")), lambda module: build_adamw(module, OPTIM)
    )
    give_gradients(model)
    backend.step(1.0)
    before = {name: tensor.clone() for name, tensor in backend.tensors().items()}
    give_gradients(model)
    model["body"].weight.grad[1, 2] = value
    assert not backend.step(1.0).isfinite()
    for name, tensor in backend.tensors().items():
        assert torch.equal(tensor, before[name]), name
    give_gradients(model)
    assert float(backend.step(1.0)) == pytest.approx((6 * 1 + 2 * 4 + 3 * 9) ** 0.5)  # the bad gradient is gone
    assert not torch.equal(model["body"].weight, before["model.body.weight"])


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is None"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is None"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_an_incomplete_launch_is_refused(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        init_world(ParallelConfig())


@pytest.mark.parametrize("backend", ["single", "fsdp2"])
def test_one_process_needs_no_launcher(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    try:
        world = init_world(ParallelConfig(backend=backend))
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert torch.distributed.is_initialized() == (backend != "single")
    finally:
        close_world()
    assert not torch.distributed.is_initialized()
