"""Peak memory of this process in GiB: GPU memory, or resident memory on a CPU."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # This room is imported by commands that never use torch, which takes a second to import.
    import torch

_GIB = 2**30
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """Peak since the start or the last reset, as metrics.

    `memory/peak_gib` is the memory of tensors (GPU) or the resident set (CPU); `memory/peak_reserved_gib` includes what
    the allocator keeps for reuse (GPU only).
    """
    if device.type == "cuda":
        import torch

        return {
            "memory/peak_gib": torch.cuda.max_memory_allocated(device) / _GIB,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved(device) / _GIB,
        }
    return {"memory/peak_gib": _peak_resident_bytes() / _GIB, "memory/peak_reserved_gib": None}


def reset_peak_memory(device: torch.device) -> bool:
    """Restart the measurement; False where that is impossible (no `clear_refs`), so that peaks never fall."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text("5", encoding="utf-8")  # proc(5): resets the peak resident set
    except OSError:
        return False
    return True


def _peak_resident_bytes() -> int:
    # getrusage's peak is inherited from the parent process and can't be reset, so Linux's own figure is preferred.
    if _STATUS.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
