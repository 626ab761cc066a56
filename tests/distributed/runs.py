"""A tiny Mixture-of-Recursions run on any backend, small enough for a test and real in every part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megamor.config import Config, DataConfig, ExpertChoiceConfig, ModelConfig, OptimConfig, ParallelConfig
from megamor.config import RecursionConfig, TrainConfig
from megamor.model import build_model
from megamor.optim import build_adamw, lr_multiplier
from megamor.parallel import Backend, build_backend, init_world

GLOBAL_BATCH = 4
TINY = Config(
    model=ModelConfig(vocab_size=128, dim=32, num_layers=8, num_heads=4, num_kv_heads=2, ffn_dim=64, max_seq_len=32),
    recursion=RecursionConfig(num_recursions=3, sharing="middle_cycle"),
    router=ExpertChoiceConfig(aux_coeff=0.01),
    data=DataConfig(seq_len=32),
    optim=OptimConfig(lr=3e-3, warmup_steps=4),
    train=TrainConfig(global_batch_size=GLOBAL_BATCH, micro_batch_size=1, max_steps=20, precision="fp32"),
)

Touch = Callable[[int, Backend], None]


def tiny(backend: str, *, precision: str = "fp32", micro_batch_size: int = 1, **parallel: object) -> Config:
    """`TINY` on `backend`."""
    return replace(
        TINY,
        parallel=ParallelConfig(backend=backend, **parallel),  # type: ignore[arg-type]
        train=replace(TINY.train, precision=precision, micro_batch_size=micro_batch_size),
    )


def start(config: Config) -> Backend:
    """Join the world and wrap a fresh model."""
    world = init_world(config.parallel)
    return build_backend(build_model(config), config, world, lambda model: build_adamw(model, config.optim))


def global_batch(step: int, config: Config) -> Tensor:
    """Token ids [global batch, seq_len + 1] of a step: the same on every rank. A noisy ramp, so there is much to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.train.global_batch_size, config.data.seq_len + 1)
    start = torch.randint(0, config.model.vocab_size, (shape[0], 1), generator=generator)
    noise = torch.randint(0, 3, shape, generator=generator)
    return (start + torch.arange(shape[1]) + noise) % config.model.vocab_size


def micro_batches(backend: Backend, step: int, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (inputs, labels), each [micro batch, seq_len]."""
    mine = global_batch(step, config).chunk(backend.world_size)[backend.rank]
    for sequences in mine.split(config.train.micro_batch_size):
        yield sequences[:, :-1], sequences[:, 1:]


def run_step(backend: Backend, step: int, config: Config, spoil: float = 1.0) -> tuple[float, float]:
    """One optimizer step. Returns the mean loss over the global batch and the gradient norm; `spoil` scales the loss."""
    batches = list(micro_batches(backend, step, config))
    total = torch.zeros(())
    for index, (inputs, labels) in enumerate(batches):
        last = index == len(batches) - 1
        with backend.forward_context(last_micro_batch=last):
            out = backend.model(inputs, labels, step=step)
            scale = backend.world_size / (config.train.global_batch_size * config.data.seq_len)
            loss = out.loss_sum * scale + sum(out.router_losses.values()) / len(batches)
        backend.backward(loss * spoil, last_micro_batch=last)
        total += out.loss_sum.detach()
    if backend.world_size > 1:
        torch.distributed.all_reduce(total)
    backend.set_lr(config.optim.lr * lr_multiplier(step, config.optim, config.train.max_steps or 0))
    grad_norm = backend.step(config.optim.grad_clip)
    return total.item() / (config.train.global_batch_size * config.data.seq_len), float(grad_norm)


def losses(config: Config, steps: int = 20) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first steps of a fresh run."""
    backend = start(config)
    return [run_step(backend, step, config) for step in range(steps)]
