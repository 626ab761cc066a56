"""What a process sets on its GPU before it trains: the precision of sums, and the newest flash attention."""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType

import torch
import torch.nn.attention as kernels

FLASH = {9: "FA3", 10: "FA4"}
"""Flash attention beyond torch's own (2), by the GPU's major compute capability."""


def prepare_device(device: torch.device) -> None:
    """Set up `device`, the current one; nothing on a CPU."""
    if device.type == "cuda":
        # A weight's gradient is a sum over all tokens. cuBLAS splits it where the matrix is small, and would add the
        # parts in bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        activate_newest_flash(torch.cuda.get_device_capability(device)[0], kernels)


def activate_newest_flash(major: int, module: ModuleType) -> None:
    """Activate the newest flash attention for a GPU of compute capability `major`.x, if `module` can load it."""
    # Not every supported release of torch has the function.
    if major in FLASH and hasattr(module, "activate_flash_attention_impl"):
        # Not installed, built for another GPU, or unknown to this torch: the kernels that stay are named at the start.
        with suppress(ImportError, RuntimeError, ValueError):
            module.activate_flash_attention_impl(FLASH[major])
