"""The losses of GPUs under each backend on two processes: the same losses and gradients as with plain operations.

`test_fused_losses.py` starts it with Triton's interpreter, which runs the kernel on a CPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.interpreter import InterpretedFunction

from megamor.config import Config
from megamor.model import loss, loss_kernel
from tests.distributed.harness import run_ranks
from tests.distributed.runs import StepResult, preload_deepspeed, run_step, save, start, stored_tensors, tiny
from tests.unit import interpreted_loss  # noqa: F401  # registers the product that only CUDA has

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "zero 2": ("deepspeed", {"zero_stage": 2}),
}
STEPS = 3


def train(config: Config, directory: Path) -> list[StepResult]:
    """Some steps, of which the first one's state is saved."""
    assert isinstance(loss_kernel.softmax_row, InterpretedFunction)
    loss.gpu_chunk = lambda *_: 24  # several chunks, the last one shorter
    backend, results = start(config), []
    for step in range(STEPS):
        results.append(run_step(backend, step, config))
        if step == 0:
            save(backend, directory)
    return results


def trained(name: str, kernel: str, precision: Any, directory: Path) -> tuple[list[StepResult], dict[str, Tensor]]:
    """Results of all steps, and the gradients of the first: its first moments over 1 - beta1."""
    backend, parallel = BACKENDS[name]
    config = tiny(backend, precision=precision, micro_batch_size=1, **parallel)
    settings = replace(config.train, loss_kernel=kernel)  # type: ignore[arg-type]
    config = replace(config, train=settings, optim=replace(config.optim, grad_clip=1e9))
    results = run_ranks(train, config, directory)
    assert results[0] == results[1]
    moments = {key: value for key, value in stored_tensors(directory).items() if key.endswith("exp_avg")}
    return results[0], {key: value / (1 - config.optim.beta1) for key, value in moments.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_trains_as_with_plain_operations(name: str, precision: str, tmp_path: Path) -> None:
    """Two micro-batches on each rank.

    In bf16, gradients at the logits are rounded to 8 bits (truncated by the interpreter), and so is torch's loss.
    Errors of single logits average out in norms.
    """
    if name == "zero 2":
        preload_deepspeed()
    expected, wanted = trained(name, "reference", precision, tmp_path / "reference")
    assert len(wanted) > 20
    exact = precision == "fp32"
    for kernel in ("triton", "torch") if hasattr(F, "linear_cross_entropy") else ("triton",):
        results, found = trained(name, kernel, precision, tmp_path / kernel)
        for ours, theirs in zip(results, expected, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-6 if exact else 2**-8 if kernel == "torch" else 1e-3)
            assert ours[1] == pytest.approx(theirs[1], rel=1e-5 if exact else 2**-7)
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            error = torch.linalg.vector_norm(found[key] - gradient) / torch.linalg.vector_norm(gradient)
            assert error < (1e-5 if exact else 2**-5), (kernel, key)
