"""The host waits for the device once in a training step, for its figures; shapes stay few (on fake CUDA tensors)."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamor.config import Config, ParallelConfig
from megamor.data.loader import MicroBatch
from megamor.model import Transformer
from megamor.model.layouts import LENGTH_MULTIPLE
from megamor.optim import build_optimizer
from megamor.parallel import World, build_backend
from megamor.train.diagnosis import Diagnosis
from megamor.train.trainer import StepBatch, Trainer
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, tiny_config, vanilla_config
from tests.fake_cuda import CUDA, Device, fake_cuda

TOKENS = BATCH * SEQ_LEN
SIZES: dict[tuple[int, ...], list[Any]] = {
    (2,): [30, 15],
    (1, 2): [[30, 15]],
    (2, 2): [[30, 15], [20, 10]],
    (3, 2): [[TOKENS, SEQ_LEN], [40, 20], [10, 5]],
}
"""What the host is told: tokens in total and at most in one sequence, of one recursion or of each."""
READS = {"vanilla": 0, "fixed": 0, "expert": 0, "act_soft": 0, "token": 1, "monotone": 3, "skip": 3}
"""Numbers of tokens that a micro-batch reads from the device, by the beginning of the router's name; by default one for
each recursion but the first. All but token-choice, which knows its depths at the start, decide between recursions."""
ACCUMULATED = 3


def config_of(router: str, kv_policy: str, kind: str = "adamw") -> Config:
    config = vanilla_config() if router == "vanilla" else tiny_config(ROUTERS[router], kv_policy)
    return replace(
        config,
        parallel=ParallelConfig(backend="single"),
        train=replace(config.train, precision="bf16"),
        optim=replace(config.optim, kind=kind, average_decay=0.9),
    )


def batch_of(documents: bool) -> MicroBatch:
    shape = (BATCH, SEQ_LEN)
    ids = torch.arange(SEQ_LEN).div(10, rounding_mode="floor").expand(shape) if documents else None
    ones = torch.ones(shape, dtype=torch.int64)
    return MicroBatch(ones, ones, ids, torch.full((BATCH,), SEQ_LEN))


def step(config: Config, documents: bool) -> Device:
    """One optimizer step of `ACCUMULATED` micro-batches as the trainer does it, and what the device saw of it.

    In a process of its own: autograd starts its threads for the devices there are once, and they forbid to fork.
    """
    waits, masks = elsewhere().submit(step_here, config, documents, SIZES).result(300)
    return Device(waits=waits, masks=masks)


@cache
def elsewhere() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def step_here(
    config: Config, documents: bool, sizes: dict[tuple[int, ...], list[Any]]
) -> tuple[Counter[str], set[tuple[int, ...]]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        batch = batch_of(documents)
        given = batch.arguments(torch.device("cpu"))
        monkeypatch.setattr(
            MicroBatch,
            "arguments",
            lambda *_: {k: torch.empty_like(v, device=CUDA) if torch.is_tensor(v) else v for k, v in given.items()},
        )
        monkeypatch.setattr(MicroBatch, "num_tokens", TOKENS)
        monkeypatch.setattr(Transformer, "to", lambda model, *_: model)  # it is there, and fake tensors can't be moved
        with fake_cuda(sizes) as device:
            with CUDA:
                model = Transformer(config)
            backend = build_backend(model, config, World(0, 1, 0, CUDA), lambda module: build_optimizer(module, config))
            trainer: Any = object.__new__(Trainer)
            diagnosis = Diagnosis(config, {prefix: stage.router for prefix, stage in model.stages.items()}, CUDA)
            parts = {"config": config, "backend": backend, "distillation": None, "diagnosis": diagnosis}
            trainer.__dict__.update(parts, progress=SimpleNamespace(step=50))
            device.operations.clear()
            figures = trainer.run_micro_batches(StepBatch([batch] * ACCUMULATED, TOKENS, TOKENS), 1e-3)
            model.update_routers(figures.totals)
            assert not device.waits["events"]
            figures._arrived.synchronize()
    return device.waits, device.masks


def check_waits(router: str, kv_policy: str, documents: bool) -> None:
    device = step(config_of(router, kv_policy), documents)
    assert device.waits["events"] == 1
    reads = next((count for name, count in READS.items() if router.startswith(name)), 2)
    assert device.waits["sizes"] == ACCUMULATED * reads, "sizes that only the device knows are read, and nothing else"


@pytest.mark.parametrize("router", ["vanilla", "expert_choice", "token_choice", "ema_threshold"])
def test_a_step_waits_for_its_figures_alone(router: str) -> None:
    check_waits(router, "share_first", True)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_no_combination_waits(router: str, kv_policy: str, documents: bool) -> None:
    check_waits(router, kv_policy, documents)


def test_muon_does_not_wait() -> None:
    assert step(config_of("fixed", "recursion_wise", "muon"), False).waits == {"events": 1}


@pytest.mark.parametrize("kv_policy", ["share_first", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_masked_shapes_are_few(kv_policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged sets have a new length in almost every step; lengths that are rounded up repeat."""
    config, masks = config_of("ema_threshold", kv_policy), set[tuple[int, ...]]()
    for longest in (1, 12, 23):
        monkeypatch.setitem(SIZES, (2,), [BATCH * longest - 1, longest])
        masks |= step(config, False).masks
    assert len(masks) == 1, masks
    assert {queries for queries, *_ in masks} <= {SEQ_LEN, LENGTH_MULTIPLE}, masks
