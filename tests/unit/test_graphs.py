"""How many graphs a model compiles to, and that later steps compile none, with the layouts of a GPU on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from megamor.config import Config, ParallelConfig, RampConfig, TrainConfig
from megamor.model import attention, build_model, layouts
from megamor.model.attention import Segments, one_per_head
from megamor.optim import build_adamw
from megamor.parallel import Backend, World, build_backend, compiles
from megamor.parallel.device import activate_newest_flash
from tests.combinations import ROUTERS, VOCAB, tiny_config, vanilla_config

CPU, SEQ_LEN = torch.device("cpu"), 24


@torch.library.custom_op("megamor_tests::packed", mutates_args=())
def packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Stands for the variable-length kernel, which one operation of a graph calls."""
    k, v = (one_per_head(x, q.shape[1], dim=1) for x in (k, v))
    segment = torch.searchsorted(bounds, torch.arange(len(q)), right=True)
    mask = (segment.unsqueeze(1) == segment).tril()
    return (
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1).clone()
    )


@packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    return torch.empty_like(q)


def keep_shapes(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.shapes = [x.shape for x in inputs[1:3]]


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of the right shapes: no value is looked at."""
    return grad, *(grad.new_zeros(shape) for shape in ctx.shapes), None


packed.register_autograd(gradients, setup_context=keep_shapes)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def call(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        return packed(q, k, v, segments.bounds)

    monkeypatch.setattr(layouts, "has_packed_kernel", lambda *_: True)
    monkeypatch.setattr(layouts, "reads_freely", lambda _: False)
    monkeypatch.setattr(attention, "packed_attention", call)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def backend_of(config: Config, **train: Any) -> Backend:
    config = replace(
        config,
        train=TrainConfig(max_steps=10, compile=True, precision="fp32", **train),
        parallel=ParallelConfig(backend="single"),
    )
    return build_backend(
        build_model(config, seed=0), config, World(0, 1, 0, CPU), lambda module: build_adamw(module, config.optim)
    )


def graphs(backend: Backend, step: int, documents: bool, shape: tuple[int, int] = (3, SEQ_LEN)) -> int:
    """Graphs after one more training step, on new tokens with new documents."""
    generator = torch.Generator().manual_seed(step)
    inputs, labels = (torch.randint(VOCAB, shape, generator=generator) for _ in range(2))
    ids = (torch.rand(shape, generator=generator) < 0.2).cumsum(1) if documents else None
    count = None if ids is None else shape[0] * (1 + int(ids[:, -1].max()))
    out = backend.model(inputs, labels, step=step, documents=ids, num_documents=count)
    backend.backward(out.loss_sum, last_micro_batch=True)
    backend.step(1.0)
    return int(counters["stats"]["unique_graphs"])


GRAPHS = {
    # Without documents, and with those with documents too. In half of the blocks' the number of tokens is a symbol,
    # which serves all later recursions. Three are of the combination: for all tokens, for one number of them, for any.
    "vanilla": (vanilla_config(), 1, 2),
    "expert": (tiny_config(ROUTERS["expert_choice"]), 2 + 3, 4 + 3),
    "token": (tiny_config(ROUTERS["token_choice"]), 2 + 3, 4 + 3),
    "share-first": (tiny_config(ROUTERS["expert_choice"], "share_first"), 3 + 3, 4 + 3),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "token" else ()) for name in GRAPHS]
)
def test_a_model_has_few_graphs(name: str) -> None:
    config, whole, both = GRAPHS[name]
    backend = backend_of(config)
    assert [graphs(backend, step, documents=False) for step in range(3)] == [whole] * 3
    assert [graphs(backend, step, documents=True) for step in range(3)] == [both] * 3
    with torch.no_grad():  # evaluation has graphs of its own
        for mode in ("topk", "causal"):
            backend.model(torch.zeros(3, SEQ_LEN, dtype=torch.int64), mode=mode)
    after = counters["stats"]["unique_graphs"]
    for step in range(3, 7):
        backend.module.limit_recursions(1 + step % 3)  # type: ignore[operator]
        assert graphs(backend, step, documents=step % 2 == 0) == after
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["vanilla", pytest.param("expert", marks=pytest.mark.slow)])
def test_a_ramp_compiles_nothing_later(name: str) -> None:
    ramp = (RampConfig(until_step=2, global_batch_size=1, seq_len=8),)
    backend = backend_of(GRAPHS[name][0], ramp=ramp)
    first = graphs(backend, 0, documents=True, shape=(2, 8))
    assert [graphs(backend, step, True, shape) for step, shape in enumerate([(2, 16), (4, 16), (4, 24)])] == [first] * 3


def test_auto_compiles_on_gpus() -> None:
    train = TrainConfig(max_steps=1, compile="auto")
    assert [compiles(train, torch.device(name)) for name in ("cpu", "cuda")] == [False, True]
    assert compiles(replace(train, compile=True), CPU)
    assert not compiles(replace(train, compile=False), torch.device("cuda"))


@pytest.mark.parametrize(
    ("major", "broken", "expected"),
    [
        (9, None, "FA3"),
        *((9, kind, "FA3") for kind in (ImportError, RuntimeError, ValueError)),
        (10, None, "FA4"),
        (8, None, ""),
        (12, None, ""),
    ],
)
def test_the_newest_flash_attention_is_activated(major: int, broken: type[Exception] | None, expected: str) -> None:
    module, tried = ModuleType("attention"), list[str]()

    def activate(name: str) -> None:
        tried.append(name)
        if broken is not None:
            raise broken(name)

    activate_newest_flash(major, module)  # a torch that has none
    module.activate_flash_attention_impl = activate  # type: ignore[attr-defined]
    activate_newest_flash(major, module)
    assert tried == expected.split()
