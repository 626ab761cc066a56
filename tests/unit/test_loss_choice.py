"""The code of a run's loss on a GPU: measured at the start, agreed on by the ranks, kept when the run is resumed."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megamor.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megamor.config.schema import DistillConfig
from megamor.model import loss
from megamor.parallel import init_world
from megamor.train import loss_choice
from megamor.train.loss_choice import LossChoice, chunk_seconds, fastest_loss
from tests.distributed.harness import run_ranks

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CONFIG = Config(train=TrainConfig(max_steps=10))
BOTH = ["triton", "torch"]
NEEDS_TORCH = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")


def timed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[tuple[str, ...]]:
    """Replace the measurement; returns what was measured."""
    calls = list[tuple[str, ...]]()

    def stand_in(config: Config, device: torch.device, kernels: Any) -> dict[str, float]:
        calls.append(tuple(kernels))
        return {name: seconds[name] for name in kernels}

    monkeypatch.setattr(loss_choice, "chunk_seconds", stand_in)
    return calls


@pytest.mark.parametrize(
    ("torchs", "chosen", "why"),
    [
        (0.006, "triton", "torch takes 1.50 of the 4 ms of triton for a chunk"),
        (0.0039, "triton", "torch takes 0.97 of the 4 ms of triton for a chunk"),  # it rounds the loss
        (0.002, "torch", "torch takes 0.50 of the 4 ms of triton for a chunk"),
        (math.inf, "triton", "torch ran out of memory"),
    ],
)
def test_the_faster_one_is_chosen(torchs: float, chosen: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, triton=0.004, torch=torchs)
    choice = LossChoice(CONFIG, CUDA, BOTH)
    assert choice.settle() == [f"loss: {chosen} ({why}), 11,008 of 32,768 rows of logits at once"]
    assert choice.kernel == chosen


def test_what_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)

    def possible(device: str, teacher: str | None = None, **train: Any) -> list[str]:
        settings = TrainConfig(max_steps=10, **train)
        return loss.loss_kernels(Config(train=settings, distill=DistillConfig(from_=teacher)), device)

    assert possible("cuda") == BOTH
    assert possible("cpu") == possible("cuda", "runs/x") == ["reference"]
    assert possible("cuda", z_loss_coeff=1e-4) == ["triton"], "torch's function has no z-loss"
    assert [possible("cuda", loss_kernel=name) for name in BOTH] == [["triton"], ["torch"]]
    monkeypatch.setattr(loss, "HAS_TRITON", False)
    assert possible("cuda") == ["reference", "torch"]
    monkeypatch.delattr(F, "linear_cross_entropy")
    assert possible("cuda") == ["reference"]


def test_a_resumed_run_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = timed(monkeypatch, triton=0.004, torch=0.002)
    first = LossChoice(CONFIG, CUDA, BOTH)
    first.settle()
    timed(monkeypatch, triton=0.002, torch=0.004)  # a busy machine measures something else
    second = LossChoice(CONFIG, CUDA, BOTH)
    second.load_state_dict(first.state_dict())
    assert "torch (as in the checkpoint)" in second.settle()[0]
    assert second.kernel == "torch"
    assert measured == [("triton", "torch")]
    moved = LossChoice(CONFIG, CUDA, ["triton"])  # to an older torch
    moved.load_state_dict(first.state_dict())
    assert "triton (the only one here; the checkpoint was trained with torch)" in moved.settle()[0]
    moved.load_state_dict(first.state_dict())  # a rollback: the steps that follow are computed as those before
    assert moved.state_dict() == {"kernel": "triton"}


@pytest.mark.parametrize("without_triton", [False, True])
def test_the_ranks_agree(without_triton: bool) -> None:
    """With the first one, whatever the others would have measured; on what all of them have."""
    found = run_ranks(chosen_here, without_triton)
    assert found == (["reference"] if without_triton else ["torch"]) * 2


def chosen_here(without_triton: bool) -> str:
    init_world(ParallelConfig(backend="ddp"))
    rank = int(os.environ["RANK"])
    seconds = {"triton": 0.004, "torch": 0.002 if rank == 0 else 0.008}
    loss_choice.chunk_seconds = lambda *_: seconds  # type: ignore[assignment]
    choice = LossChoice(CONFIG, CUDA, ["reference"] if without_triton and rank else BOTH)
    choice.settle()
    return choice.kernel


@NEEDS_TORCH
def test_a_chunk_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that measures, on a CPU: of the run's chunk and types, and when there is too little memory for one."""
    model = ModelConfig(vocab_size=300, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=16, max_seq_len=64)
    train = TrainConfig(max_steps=1, micro_batch_size=6, precision="fp32")
    config, seen = Config(model=model, data=DataConfig(seq_len=64), train=train), list[tuple[Any, ...]]()
    real = loss_choice.linear_cross_entropy

    def watched(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, kernel: str) -> Any:
        seen.append((kernel, *hidden.shape, *weight.shape, hidden.dtype))
        if kernel == "triton":
            raise torch.OutOfMemoryError
        return real(hidden, weight, labels, kernel=kernel)

    monkeypatch.setattr(loss_choice, "linear_cross_entropy", watched)
    monkeypatch.setattr(loss, "gpu_chunk", lambda *_: 128)
    state = torch.get_rng_state()
    found = chunk_seconds(config, CPU, ["torch", "triton"], repeats=1)
    assert torch.equal(torch.get_rng_state(), state), "a resumed run has restored it"
    assert 0 < found["torch"] < 10
    assert found["triton"] == math.inf
    assert seen == [(name, 128, 8, 300, 8, torch.float32) for name in ["torch", "triton"] * 2]
    assert fastest_loss(config, CPU, ["torch", "triton"]) == ("torch", "triton ran out of memory")
    assert chunk_seconds(config, CPU, ["triton"], repeats=1) == {"triton": math.inf}
    in_bf16 = replace(config, train=replace(train, precision="bf16"))
    chunk_seconds(in_bf16, CPU, ["torch"], repeats=1)
    assert seen[-1][-1] == torch.bfloat16
