"""Where a measurement comes from: date, machine, versions, revision of the code."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megamor.checkpoint import code_revision, library_versions


def describe_origin(device: torch.device) -> dict[str, Any]:
    """The fields `date`, `commit`, `machine` and `versions` of a report."""
    revision = code_revision()
    found = library_versions()
    with suppress(metadata.PackageNotFoundError):  # a baseline of the training bench, which may be missing
        found["transformers"] = metadata.version("transformers")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": {"revision": revision.removesuffix("-dirty"), "dirty": revision.endswith("-dirty")},
        "machine": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "platform": platform.platform(),
            "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "load_average": os.getloadavg()[0],
        },
        "versions": found,
    }


def cpu_model() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.exists() else None
    )
    return found.group(1) if found else platform.processor() or platform.machine()
