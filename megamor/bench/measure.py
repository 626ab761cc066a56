"""The training step that benchmarks measure: forward, backward, clipping and AdamW on micro-batches of random tokens.

It goes through the backend that training uses. The learning rate is 0, which costs the same as any other and keeps the
routing as initialised: training on random tokens would only collapse it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megamor.bench.baselines import HuggingFaceLlama
from megamor.bench.cases import Case
from megamor.bench.loader import document_lengths
from megamor.config import Config
from megamor.errors import ConfigError, TrainingError
from megamor.metrics import peak_memory, reset_peak_memory
from megamor.model import build_model
from megamor.model.flops import Flops, executed_flops, nominal_flops
from megamor.optim import build_optimizer
from megamor.parallel import World, build_backend, init_world

NUM_BATCHES = 8
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Settings of glibc under which freed tensors leave the resident set at once, so that its peak is that of live ones."""


@dataclass
class Window:
    """Steps in a row, timed as one. `flops` are executed by each; `depth` is in recursions per token, None without."""

    seconds: float
    flops: list[Flops]
    depth: float | None

    @property
    def step_seconds(self) -> float:
        """Mean time of a step."""
        return self.seconds / len(self.flops)


class Routed(NamedTuple):
    """Of a micro-batch: tokens and attention pairs [Nr, 2] of its recursions, their mean depth (scalar), and with
    documents the pairs of an unshared block (scalar)."""

    work: Tensor | None
    depth: Tensor | None
    pairs: Tensor | None


class Training:
    """A model with its optimizer, ready to step. `config` sets the micro-batch."""

    def __init__(self, config: Config, world: World, model: nn.Module, fill: float | None = None) -> None:
        self.config, self.device = config, world.device
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        # Memory is counted from here: what training adds to a model that is built.
        self._can_reset_peak = reset_peak_memory(world.device)
        self._built = peak_memory(world.device)["memory/peak_gib"]
        self.backend = build_backend(model, config, world, lambda module: build_optimizer(module, config))
        self.backend.set_lr(0.0)
        # Made beforehand, because drawing ids and copying them to a GPU would be timed as well.
        self.batches = [make_batch(config, number, world.device) for number in range(NUM_BATCHES)]
        self.lengths = [fill_of_batch(config, number, fill) for number in range(NUM_BATCHES)]
        self.documents = make_documents(config).to(world.device) if config.data.document_mask else None
        self.accumulation = config.train.global_batch_size // config.train.micro_batch_size
        self.number = 0

    @classmethod
    def of(cls, case: Case, world: World, micro_batch: int | None = None) -> Training:
        """The model of a case, with weights drawn from `run.seed`."""
        config = case.config(micro_batch)
        return cls(config, world, build_case(case, config, world.device), case.fill_left_out)

    def step(self) -> list[Routed]:
        """One step over as many micro-batches as the configuration accumulates."""
        count, found = self.accumulation, []
        for micro_batch in range(count):
            inputs, labels = self.batches[self.number % NUM_BATCHES]
            given = {"lengths": self.lengths[self.number % NUM_BATCHES], "documents": self.documents}
            self.number += 1
            last = micro_batch == count - 1
            with self.backend.forward_context(last_micro_batch=last):
                given = {name: value for name, value in given.items() if value is not None}
                out = self.backend.model(inputs, labels, mode="train", step=self.number, **given)
                loss = (out.loss_sum / labels.numel() + sum(out.router_losses.values())) / count
            self.backend.backward(loss, last_micro_batch=last)
            depth = None if out.depth is None else out.depth[out.depth >= 0].double().mean()
            found.append(Routed(out.work, depth, out.pairs if self.documents is not None else None))
        self.backend.step(self.config.optim.grad_clip)
        if out.totals:
            self.backend.module.update_routers(out.totals)  # type: ignore[operator]
        return found

    def window(self, seconds: float = 0, at_least: int = 1) -> Window:
        """Steps for about `seconds`, and `at_least` as many."""
        results: list[list[Routed]] = []
        synchronize(self.device)
        started, first = time.perf_counter(), self.number
        while len(results) < at_least or time.perf_counter() - started < seconds:
            results.append(self.step())
        synchronize(self.device)
        elapsed = time.perf_counter() - started
        # Reading results from a GPU waits for it, so this comes after the time was taken.
        routed = [micro_batch for step in results for micro_batch in step]
        depths = [float(one.depth) for one in routed if one.depth is not None]
        flops = [self.flops(one, self.lengths[(first + n) % NUM_BATCHES]) for n, one in enumerate(routed)]
        count = self.accumulation
        steps = [sum_flops(flops[n : n + count]) for n in range(0, len(flops), count)]
        return Window(elapsed, steps, statistics.mean(depths) if depths else None)

    def flops(self, routed: Routed, lengths: tuple[int, ...] | None = None) -> Flops:
        """What a micro-batch executed, from the routing that was realised and the tokens of each sequence."""
        sequences, work = self.config.train.micro_batch_size, routed.work
        if work is None and lengths is None and routed.pairs is None:
            return nominal_flops(self.config, sequences)
        done = [] if work is None else [(tokens, pairs) for tokens, pairs in work.tolist()]
        if lengths is None:
            seen = None if routed.pairs is None else float(routed.pairs)
            return executed_flops(self.config, sequences, done, pairs=seen)
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        return executed_flops(self.config, sequences, done, pairs=pairs, tokens=sum(lengths))

    def peak_bytes(self) -> int | None:
        """Highest memory since the model was built (or since a later reset), less that of the model.

        Allocated memory on a GPU, resident memory on a CPU; None where the system can't reset a process's peak.
        """
        peak = peak_memory(self.device)["memory/peak_gib"]
        if not self._can_reset_peak or peak is None or self._built is None:
            return None
        return round((peak - self._built) * 2**30)


def build_case(case: Case, config: Config, device: torch.device) -> nn.Module:
    """The model of a case on `device`."""
    return build_model(config, device=device) if case.baseline is None else HuggingFaceLlama(config, device)


def make_batch(config: Config, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S] of random ids; batch `number` is the same for every case."""
    generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + number)
    shape = (config.train.micro_batch_size, config.data.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make_documents(config: Config) -> Tensor:
    """Numbers [B, S] of documents with lengths like those of web pages; in windows other than 2,048, in proportion."""
    sequences, seq_len = config.train.micro_batch_size, config.data.seq_len
    lengths = document_lengths(sequences * seq_len, np.random.default_rng(config.run.seed)) * seq_len // 2048 + 1
    numbers = np.repeat(np.arange(len(lengths)), lengths)[: sequences * seq_len]
    return torch.from_numpy(numbers).view(sequences, seq_len)


def sum_flops(parts: Sequence[Flops]) -> Flops:
    """The FLOPs of several passes."""
    return Flops(*map(sum, zip(*map(astuple, parts), strict=True)))


def fill_of_batch(config: Config, number: int, fill: float | None) -> tuple[int, ...] | None:
    """Real tokens of each sequence of batch `number`: between half and one and a half times `fill` · S, at most S."""
    if fill is None:
        return None
    draws = random.Random(config.run.seed * 1_000_003 + number)
    seq_len = config.data.seq_len
    return tuple(
        max(1, min(seq_len, round(fill * seq_len * draws.uniform(0.5, 1.5))))
        for _ in range(config.train.micro_batch_size)
    )


def world_for(config: Config, device: torch.device) -> World:
    """This process alone on `device`; other backends than `single` get a process group of one rank.

    Raises:
        ConfigError: another backend than `single` would use this machine's GPU instead of `device`.
    """
    if config.parallel.backend == "single":
        return World(0, 1, 0, device)
    world = init_world(config.parallel, device.type)
    if world.device.type != device.type:
        raise ConfigError(f"parallel.backend {config.parallel.backend} runs on {world.device}; give --device cuda")
    return world


def peak_in_fresh_process(case: Case, device: torch.device, threads: int, micro_batch: int) -> int | None:
    """`Training.peak_bytes` of a few steps in a process of their own, where no allocator remembers another case.

    Raises:
        TrainingError: the process died, most likely because memory ran out.
    """
    saved = dict(os.environ)
    os.environ.update(_RETURN_FREED_MEMORY)  # glibc reads them when the child starts
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_of, case, device, threads, micro_batch).result()
    except BrokenProcessPool:
        message = f"the process that measures the memory of {case.name} died; lower train.micro_batch_size"
        raise TrainingError(message) from None
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _peak_of(case: Case, device: torch.device, threads: int, micro_batch: int) -> int | None:
    torch.set_num_threads(threads)
    config = case.config(micro_batch)
    model = build_case(case, config, device)
    # One pass over a few tokens, so that code and workspaces of the kernels are not counted as the step's.
    inputs, labels = make_batch(config, 0, device)
    model(inputs[:1, :8], labels[:1, :8], mode="train", step=0).loss_sum.backward()
    model.zero_grad(set_to_none=True)
    training = Training(config, world_for(config, device), model, case.fill_left_out)
    for _ in range(3):
        training.step()
    return training.peak_bytes()


def within_memory(
    run: Callable[[int], list[dict[str, Any]]], micro_batch: int, device: torch.device
) -> list[dict[str, Any]]:
    """`run(micro_batch)`, with half as many sequences whenever memory runs out; `out_of_memory_at` lists what failed.

    Raises:
        torch.OutOfMemoryError: not even one sequence fits.
    """
    too_large: list[int] = []
    while True:
        try:
            return [result | {"out_of_memory_at": too_large} for result in run(micro_batch)]
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
        # Outside the handler: the exception's traceback keeps the tensors of the failed step alive.
        too_large.append(micro_batch)
        micro_batch //= 2
        release(device)


def release(device: torch.device) -> None:
    """Forget compiled code and give cached memory back, so that cases don't affect each other."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
