"""Training one case on one device for a few seconds, through the backend that training uses."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megamor.bench.gpu_cases import Case
from megamor.config import Config
from megamor.metrics import peak_flops, peak_memory, reset_peak_memory
from megamor.model import build_model
from megamor.model.flops import Flops, executed_flops, nominal_flops
from megamor.optim import build_adamw
from megamor.parallel import World, build_backend

WARMUP_STEPS = 6
WINDOWS = 3
NUM_BATCHES = 8


@dataclass
class Window:
    """Steps in a row, timed as one. `work` has [Nr, 2] of each step where there are recursions (`StageOutput`)."""

    seconds: float
    num_steps: int
    work: Tensor | None
    mean_depth: float | None


class Training:
    """A case, ready to run: forward, backward, clipping, AdamW, as a training step with one micro-batch does it.

    The learning rate is 0, which costs the same as any other and keeps the routing as initialised.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.model = build_model(config, device="meta")
        self.model.to_empty(device=world.device)
        self.model.init_weights()
        self.backend = build_backend(self.model, config, world, lambda module: build_adamw(module, config.optim))
        self.backend.set_lr(0.0)
        vocab, shape = config.model.vocab_size, (config.train.micro_batch_size, config.data.seq_len + 1)
        self.batches = [torch.randint(vocab, shape, device=world.device) for _ in range(NUM_BATCHES)]
        self.num_steps = 0

    def step(self) -> tuple[Tensor | None, Tensor | None]:
        """One step; returns the work [Nr, 2] and mean depth (scalar) of its recursions."""
        tokens = self.batches[self.num_steps % NUM_BATCHES]
        self.num_steps += 1
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with self.backend.forward_context(last_micro_batch=True):
            out = self.backend.model(inputs, labels, mode="train", step=self.num_steps)
            loss = out.loss_sum / labels.numel() + sum(out.router_losses.values())
        self.backend.backward(loss, last_micro_batch=True)
        self.backend.step(self.config.optim.grad_clip)
        return out.work, None if out.depth is None else out.depth.double().mean()

    def window(self, seconds: float) -> Window:
        """Steps for about `seconds`, at least two."""
        synchronize(self.world.device)
        results: list[tuple[Tensor | None, Tensor | None]] = []
        started = time.perf_counter()
        # A step ends by reading the norm of its gradients, so the host can't run far ahead of the device.
        while len(results) < 2 or time.perf_counter() - started < seconds:
            results.append(self.step())
        synchronize(self.world.device)
        elapsed = time.perf_counter() - started
        work = [work for work, _ in results if work is not None]
        depths = [float(depth) for _, depth in results if depth is not None]
        mean_depth = statistics.mean(depths) if depths else None
        return Window(elapsed, len(results), torch.stack(work).cpu() if work else None, mean_depth)

    def flops(self, window: Window) -> list[Flops]:
        """Executed by each step of `window`."""
        sequences = self.config.train.micro_batch_size
        if window.work is None:
            return [nominal_flops(self.config, sequences)] * window.num_steps
        return [
            executed_flops(self.config, sequences, [(tokens, pairs) for tokens, pairs in work])
            for work in window.work.tolist()
        ]


def measure(case: Case, world: World, micro_batch: int, seconds: float, profile: bool) -> dict[str, Any]:
    """The fields of one result; those of the case itself are added by the caller."""
    counters.clear()
    config = case.config(micro_batch)
    training = Training(config, world)
    started = time.perf_counter()
    for _ in range(WARMUP_STEPS):
        training.step()
    synchronize(world.device)
    warmup_seconds = time.perf_counter() - started
    graphs = counters["stats"]["unique_graphs"]
    reset_peak_memory(world.device)
    windows = [training.window(seconds / WINDOWS) for _ in range(WINDOWS)]
    memory = peak_memory(world.device)
    found = {
        "micro_batch": micro_batch,
        "parameters": training.model.num_parameters(),
        "warmup_seconds": warmup_seconds,
        "graphs": graphs,
        "recompilations_after_warmup": counters["stats"]["unique_graphs"] - graphs,
        "recompile_limit_hit": recompile_limit_hit(),
        "peak_memory_gib": memory["memory/peak_gib"],
        "peak_reserved_gib": memory["memory/peak_reserved_gib"],
        **rates(training, windows),
    }
    if profile:
        found["profile"] = profile_steps(training)
    return found


def rates(training: Training, windows: list[Window]) -> dict[str, Any]:
    """Speed of a case: medians over the windows, and every window's figure."""
    config, device = training.config, training.world.device
    tokens = config.train.micro_batch_size * config.data.seq_len
    flops = [step for window in windows for step in training.flops(window)]
    model_flops = statistics.mean(step.training for step in flops)
    recomputed = statistics.mean(step.recomputed(config.train) for step in flops)
    step_seconds = [window.seconds / window.num_steps for window in windows]
    seconds = statistics.median(step_seconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = peak_flops(name, config.train.precision)
    depths = [window.mean_depth for window in windows if window.mean_depth is not None]
    return {
        "steps": sum(window.num_steps for window in windows),
        "step_seconds": seconds,
        "window_step_seconds": step_seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_token": model_flops / tokens,
        "mfu": model_flops / seconds / peak if peak else None,
        "hfu": (model_flops + recomputed) / seconds / peak if peak else None,
        "mean_depth": statistics.mean(depths) if depths else None,
    }


def measure_within_memory(
    case: Case, world: World, micro_batch: int, run: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    """`run` with `micro_batch` sequences, or half of that as often as memory runs out; `out_of_memory_at` lists those.

    Raises:
        torch.OutOfMemoryError: not even one sequence fits.
    """
    too_large: list[int] = []
    while True:
        try:
            return {**run(micro_batch), "out_of_memory_at": too_large}
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
        # Outside of the handler, whose traceback keeps the tensors of the failed step alive.
        too_large.append(micro_batch)
        micro_batch //= 2
        release(world.device)


def profile_steps(training: Training, num_steps: int = 3, top: int = 30) -> list[dict[str, Any]]:
    """The operations and kernels that take most of the device's time: milliseconds and calls of one step."""
    on_device = training.world.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_device:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(num_steps):
            training.step()
        synchronize(training.world.device)
    events = profiler.key_averages()
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    events = sorted(events, key=lambda event: getattr(event, key), reverse=True)
    return [
        {"name": event.key, "ms": getattr(event, key) / 1e3 / num_steps, "calls": event.count / num_steps}
        for event in events[:top]
    ]


def recompile_limit_hit() -> bool:
    """Whether torch.compile has given up on a function since the counters were cleared: it then runs uncompiled."""
    reasons = [*counters["unimplemented"], *counters["graph_break"]]
    return any("limit exceeded" in reason for reason in reasons)


def release(device: torch.device) -> None:
    """Forget compiled code and give cached memory back, so that cases don't see each other."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
