"""Numbers from the host to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: Sequence[Any], device: torch.device, dtype: type[np.generic] = np.int64) -> Tensor:
    """`numbers`, or equally long lists of them, as a tensor on `device`.

    Through NumPy, which reads lists several times faster than torch, and through pinned memory, from which a copy
    doesn't wait for what a GPU is doing.
    """
    tensor = torch.from_numpy(np.array(numbers, dtype))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
