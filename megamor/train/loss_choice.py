"""Which code computes the loss of a run: measured when the run starts on a GPU, and kept when it is resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megamor.config import Config
from megamor.metrics import reset_peak_memory
from megamor.model.loss import describe_loss, linear_cross_entropy, logits_at_once
from megamor.ranks import from_first_rank, gather

# torch's function rounds the loss of a micro-batch (not its gradient) to bf16, so it must be clearly faster.
TORCH_RATIO = 0.95


@dataclass
class LossChoice:
    """The choice among the kernels that are `possible` on this rank (`loss_kernels`), which checkpoints contain."""

    config: Config
    device: torch.device
    possible: Sequence[str]
    kernel: str = ""

    def state_dict(self) -> dict[str, Any]:
        return {"kernel": self.kernel}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kernel = self.kernel or state["kernel"]  # after the start, in a rollback, nothing is chosen anew

    def settle(self) -> list[str]:
        """Set `kernel` to that of the checkpoint if all ranks have it, else to the fastest. Collective.

        Returns:
            What the user should be told.
        """
        everywhere = gather(list(self.possible))
        common = [name for name in self.possible if all(name in names for names in everywhere)] or ["reference"]
        before, why = self.kernel, "as in the checkpoint"
        if before not in common:
            self.kernel, why = from_first_rank(lambda: fastest_loss(self.config, self.device, common))
            why += f"; the checkpoint was trained with {before}" if before else ""
        return describe_loss(self.config, self.device.type, self.kernel, why)


def fastest_loss(config: Config, device: torch.device, kernels: Sequence[str]) -> tuple[str, str]:
    """The first of `kernels`, or a second one if it is clearly faster; and a phrase that says why."""
    first, second = kernels[0], kernels[-1]
    if first == second:
        return first, "the only one here"
    seconds = chunk_seconds(config, device, kernels)
    if math.isinf(seconds[second]):
        return first, f"{second} ran out of memory"
    ratio = seconds[second] / seconds[first]
    phrase = f"{second} takes {ratio:.2f} of the {1000 * seconds[first]:.3g} ms of {first} for a chunk"
    return second if ratio < TORCH_RATIO else first, phrase


def chunk_seconds(config: Config, device: torch.device, kernels: Sequence[str], repeats: int = 5) -> dict[str, float]:
    """Shortest time of the loss and its gradients for one chunk of a run's logits; infinite if memory runs out."""
    # A generator of its own: resumed runs have restored that of the device.
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    rows, vocab, dim = logits_at_once(config), config.model.vocab_size, config.model.dim
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
    hidden, weight = (torch.randn(size, dim, **options).requires_grad_() for size in (rows, vocab))
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    seconds = dict.fromkeys(kernels, math.inf)
    # In turns and the shortest of each, as another process may slow down any of them. The first turn compiles.
    for turn in range(repeats + 1):
        for kernel in kernels:
            try:
                begin = time.perf_counter()
                torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, kernel=kernel)[0], (hidden, weight))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except torch.OutOfMemoryError:
                continue
            seconds[kernel] = min(seconds[kernel], time.perf_counter() - begin) if turn else math.inf
    del hidden, weight, labels
    if device.type == "cuda":  # the run starts as if nothing had been measured
        torch.cuda.empty_cache()
        reset_peak_memory(device)
    return seconds
