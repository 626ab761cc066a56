"""A tiny Mixture-of-Recursions run on any backend, with the real model, optimizer and backend."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megamor.config import (
    Config,
    DataConfig,
    ExpertChoiceConfig,
    FixedDepthConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RecursionConfig,
    RouterConfig,
    TokenChoiceConfig,
    TrainConfig,
)
from megamor.model import build_model
from megamor.optim import build_optimizer, lr_multiplier
from megamor.parallel import Backend, build_backend, init_world
from megamor.parallel.zero import import_deepspeed
from tests.distributed.harness import run_ranks

TINY = Config(
    model=ModelConfig(vocab_size=128, dim=32, num_layers=8, num_heads=4, num_kv_heads=2, ffn_dim=64, max_seq_len=32),
    recursion=RecursionConfig(num_recursions=3, sharing="middle_cycle"),
    router=ExpertChoiceConfig(aux_coeff=0.01),
    data=DataConfig(seq_len=32),
    optim=OptimConfig(lr=3e-3, warmup_steps=4),
    train=TrainConfig(global_batch_size=4, micro_batch_size=1, max_steps=20, precision="fp32"),
)
EXPERT_CHOICE = TINY.router
FIXED_DEPTH = FixedDepthConfig()
LOSS_FREE = TokenChoiceConfig(balancing="loss_free")  # a router with a buffer

StepResult = tuple[float, float]  # mean loss over the global batch, gradient norm


def tiny(
    backend: str,
    *,
    router: RouterConfig = EXPERT_CHOICE,
    precision: Literal["bf16", "fp32"] = "fp32",
    micro_batch_size: int = 1,
    **parallel: Any,
) -> Config:
    """`TINY` on `backend`."""
    return replace(
        TINY,
        router=router,
        parallel=ParallelConfig(backend=backend, **parallel),  # type: ignore[arg-type]
        train=replace(TINY.train, precision=precision, micro_batch_size=micro_batch_size),
    )


def preload_deepspeed() -> None:
    """Import what DeepSpeed needs before forking: five seconds, mostly inductor, that every fork would spend again."""
    import_deepspeed(torch.device("cpu"))
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def start(config: Config) -> Backend:
    """Join the process group and wrap a new model."""
    world = init_world(config.parallel)
    return build_backend(build_model(config), config, world, lambda model: build_optimizer(model, config))


def global_batch(step: int, config: Config) -> Tensor:
    """Token ids [global batch, seq_len + 1] of a step, the same on every rank: noisy ramps, which can be learned.

    No token occurs twice in a sequence: equal tokens get nearly equal scores, and rounding could then decide a top-k.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.train.global_batch_size, config.data.seq_len + 1)
    start = torch.randint(0, config.model.vocab_size, (shape[0], 1), generator=generator)
    noise = torch.randint(0, 2, shape, generator=generator)
    return (start + 2 * torch.arange(shape[1]) + noise) % config.model.vocab_size


def micro_batches(backend: Backend, step: int, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (inputs, labels), each [micro batch, seq_len]."""
    mine = global_batch(step, config).chunk(backend.world_size)[backend.rank]
    for sequences in torch.split(mine, config.train.micro_batch_size):
        yield sequences[:, :-1], sequences[:, 1:]


def run_step(backend: Backend, step: int, config: Config, spoil: float = 1.0) -> StepResult:
    """One optimizer step; `spoil` scales this rank's loss."""
    batches = list(micro_batches(backend, step, config))
    tokens = config.train.global_batch_size * config.data.seq_len
    total = torch.zeros(())
    for index, (inputs, labels) in enumerate(batches):
        last = index == len(batches) - 1
        with backend.forward_context(last_micro_batch=last):
            out = backend.model(inputs, labels, step=step)
            loss = out.loss_sum * backend.world_size / tokens + sum(out.router_losses.values()) / len(batches)
        backend.backward(loss * spoil, last_micro_batch=last)
        total += out.loss_sum.detach()
    if backend.world_size > 1:
        torch.distributed.all_reduce(total)
    backend.set_lr(config.optim.lr * lr_multiplier(step, config.optim, config.train.max_steps or 0))
    grad_norm = backend.step(config.optim.grad_clip)
    return total.item() / tokens, float(grad_norm)


def evaluate(backend: Backend, config: Config) -> float:
    """Loss without gradients."""
    inputs, labels = next(micro_batches(backend, 0, config))
    with torch.no_grad(), backend.forward_context():
        return float(backend.model(inputs, labels, mode="topk").loss_sum)


def fresh_run(config: Config, steps: int = 20) -> list[StepResult]:
    """The first steps of a run."""
    backend = start(config)
    return [run_step(backend, step, config) for step in range(steps)]


def run_and_save(config: Config, first: Path, final: Path) -> list[StepResult]:
    """Six steps: evaluate and save into `first` after three, save into `final` after all. Returns the last three."""
    backend = start(config)
    for step in range(3):
        run_step(backend, step, config)
    mark_buffers(backend)
    evaluate(backend, config)
    save(backend, first)
    results = [run_step(backend, step, config) for step in range(3, 6)]
    save(backend, final)
    return results


def load_and_run(config: Config, first: Path, final: Path) -> list[StepResult]:
    """Resume from the first save of `run_and_save` and repeat what it did afterwards."""
    backend = start(config)
    backend.load(first)
    results = [run_step(backend, step, config) for step in range(3, 6)]
    save(backend, final)
    return results


def assert_resumes_bitwise(config: Config, directory: Path, world_size: int = 2) -> None:
    """A run that resumes from its third step gives the same results and the same state as one that went on."""
    saved, straight, resumed = (directory / name for name in ("saved", "straight", "resumed"))
    expected = run_ranks(run_and_save, config, saved, straight, world_size=world_size)
    assert run_ranks(load_and_run, config, saved, resumed, world_size=world_size) == expected
    tensors = stored_tensors(straight)
    assert digest(tensors) == digest(stored_tensors(resumed))
    assert digest(tensors) != digest(stored_tensors(saved))
    whole = (tensor for name, tensor in tensors.items() if name != "average.updates")
    assert all(tensor.dtype == torch.float32 for tensor in whole)


def save(backend: Backend, directory: Path) -> None:
    """Save into a directory that may not exist yet."""
    directory.mkdir(exist_ok=True, parents=True)
    backend.save(directory)


def mark_buffers(backend: Backend) -> None:
    """Set every buffer to a value that bf16 would round, as training does."""
    for buffer in backend.module.buffers():
        buffer.fill_(1.0 + 2.0**-20)


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of `directory/state`, read by one process without a process group."""
    reader = FileSystemReader(directory / "state")
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def digest(tensors: dict[str, Tensor]) -> str:
    """Hash of the names and the exact bits of tensors."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].numpy().tobytes())
    return content.hexdigest()


def relative_differences(reference: list[StepResult], results: list[StepResult]) -> tuple[float, float]:
    """Largest relative difference in loss and in gradient norm."""
    pairs = list(zip(reference, results, strict=True))
    return max(abs(a[0] - b[0]) / a[0] for a, b in pairs), max(abs(a[1] - b[1]) / a[1] for a, b in pairs)
