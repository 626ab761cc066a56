"""An exponential moving average of the weights, divided over the ranks as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megamor.checkpoint.state import AVERAGE_PREFIX, MODEL_PREFIX
from megamor.parallel.slices import Slices


class WeightAverage:
    """average <- d * average + (1 - d) * weight after each update, in fp32.

    After n updates d is at most (1 + n) / (10 + n), so that the initial weights are soon forgotten. `weights` are those
    of a backend's `tensors` that are averaged, under their stored names; their memory must stay where it is.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        averages = {AVERAGE_PREFIX + name.removeprefix(MODEL_PREFIX): _copy(weight) for name, weight in weights.items()}
        self._weights, self._averages = _held(weights.values()), _held(averages.values())
        self.updates = torch.zeros((), dtype=torch.int64, device=self._weights[0].device if self._weights else None)
        self.tensors: dict[str, Tensor] = {**averages, AVERAGE_PREFIX + "updates": self.updates}
        """What a checkpoint contains, sharing memory with this object."""

    def update(self, skipped: Tensor | None = None) -> None:
        """Take in the weights after an optimizer step, unless it was `skipped` (a scalar: 1 if so). Doesn't wait."""
        taken = torch.ones_like(self.updates) if skipped is None else 1 - skipped.to(self.updates)
        count = self.updates.double()
        share = (1 - ((1 + count) / (10 + count)).clamp_max(self.decay)) * taken
        if share.device.type == "cpu":
            torch._foreach_lerp_(self._averages, self._weights, float(share))
        else:
            torch._foreach_lerp_(self._averages, self._weights, [share.float()] * len(self._averages))
        self.updates += taken

    def restart(self) -> None:
        """Begin with the present weights."""
        torch._foreach_copy_(self._averages, self._weights)
        self.updates.zero_()

    def swap(self) -> None:
        """Exchange weights and averages."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)


def _held(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of `tensors`, sharing memory with them."""
    found: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, Slices):
            found += [values for _, values in tensor.boxes]
        else:
            found.append(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    return [tensor.detach() for tensor in found]


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Slices):
        return Slices(tensor.shape, tensor.dtype, [(offsets, values.clone()) for offsets, values in tensor.boxes])
    return tensor.detach().clone()
