"""What a process sets on its GPU before it trains: the precision of sums, and the newest flash attention."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.attention as kernels

FLASH = {9: ("FA3", "FA4"), 10: ("FA4",)}
"""Flash attention beyond torch's own (2), by the GPU's major compute capability, best first."""


def prepare_device(device: torch.device) -> None:
    """Set up `device`, the current one; nothing on a CPU."""
    if device.type == "cuda":
        # A weight's gradient is a sum over all tokens. cuBLAS splits it where the matrix is small, and would add the
        # parts in bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        activate_newest_flash(torch.cuda.get_device_capability(device)[0], kernels)


def activate_newest_flash(major: int, module: ModuleType) -> None:
    """Activate the best flash attention that `module` can load for a GPU of compute capability `major`.x."""
    if not hasattr(module, "activate_flash_attention_impl"):
        return  # not every supported release of torch has it
    for name in FLASH.get(major, ()):
        try:
            module.activate_flash_attention_impl(name)
        except (ImportError, RuntimeError, ValueError):  # not installed, built for another GPU, unknown to torch
            continue
        return
