"""Which device a process computes on. GPUs that are there but can't be used are an error: nobody gets a CPU instead."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from pathlib import Path

import torch

from megamor.errors import ConfigError

CUDA_INDEX = "cu126"
"""PyTorch's package index of the builds that run with the oldest drivers."""
# Oldest driver for each major version of CUDA, whose minor versions are compatible (CUDA's release notes).
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
_COUNTS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS")
_LISTS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
_HIDDEN = ("", "-1", "nodevfiles", "none")
_DEV, _DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")


def usable_device(name: str | None = None) -> torch.device:
    """The device called `name`; None or `auto`: the GPU if there is one, else the CPU.

    Raises:
        ConfigError: torch doesn't know the device or doesn't see it; or there are GPUs that it can't use, unless `name`
            is `cpu`.
    """
    if name in (None, "auto"):
        name = "cuda" if count_gpus() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", str(name)):
        raise ConfigError(f"device {name!r} is unknown: give cpu, cuda or cuda:1")
    device = torch.device(str(name))
    if device.type == "cuda" and (device.index or 0) >= (gpus := count_gpus()):
        raise ConfigError(f"device {name!r}: torch sees {gpus} CUDA devices; give another or cpu")
    return device


def count_gpus() -> int:
    """GPUs that torch can use; 0 where there are none.

    Raises:
        ConfigError: there are GPUs, or the job was given some, but torch can't use any; names driver and build.
    """
    with warnings.catch_warnings(record=True) as reasons:  # why CUDA doesn't start, if torch knows
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if not (found := signs_of_gpus()):
        return 0
    driver, build = driver_version(), torch.version.cuda
    said = "".join(f" torch says: {' '.join(str(reason.message).split())}." for reason in reasons[:1])
    if build is None:
        cause = f"torch {torch.__version__} is built without CUDA (driver: {driver or 'unknown'})."
    else:
        oldest = _OLDEST_DRIVER.get(build.partition(".")[0])
        needs = f", which needs driver {oldest} or newer" if oldest else ""
        cause = f"the driver is {driver or 'unknown'}, and torch {torch.__version__} is built for CUDA {build}{needs}."
    raise ConfigError(
        f"there are GPUs ({'; '.join(found)}), but torch can't use them: {cause}{said} Install torch from PyTorch's "
        f"index {CUDA_INDEX} (TORCH_INDEX=<that index> make install) or update the driver. To use the CPU, set "
        "run.device=cpu, give --device cpu where a command has it, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
    )


def signs_of_gpus() -> list[str]:
    """What says that this process has GPUs: variables, device files, the driver's own list. Empty: it has none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip().lower() in _HIDDEN:
        return []  # somebody wants the CPU
    # DeepSpeed's launcher, which sets CROSS_SIZE, numbers processes on CPUs with that variable too.
    signs = [f"CUDA_VISIBLE_DEVICES is {visible}"] if visible and "CROSS_SIZE" not in os.environ else []
    # A number may have a type: h100:8. A list holds indices, so that 0 is a GPU.
    counts = {name: os.environ.get(name, "") for name in _COUNTS}
    signs += [f"{name} is {value}" for name, value in counts.items() if value.split(":")[-1] not in ("", "0")]
    signs += [f"{name} is {os.environ[name]}" for name in _LISTS if os.environ.get(name)]
    files = sorted(path for path in _DEV.glob("nvidia*") if path.name[6:].isdecimal() and _may_open(path))
    signs += [f"{path} exists" for path in files[:1]]
    if not signs:  # under WSL there are no files
        listed = [line.partition(" (")[0] for line in _ask_driver("--list-gpus").splitlines() if line[:4] == "GPU "]
        signs += [f"nvidia-smi lists {gpu}" for gpu in listed[:1]]
    return signs


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None where nothing tells it."""
    try:
        text = _DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = _ask_driver("--query-gpu=driver_version", "--format=csv,noheader")
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def check_computes(device: torch.device) -> None:
    """Run one kernel on `device`: torch sees GPUs that are too old for it, or taken by another process, too.

    Raises:
        ConfigError: the kernel fails.
    """
    try:
        assert float(torch.ones(2, device=device).sum()) == 2.0
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{device} can't compute with torch {torch.__version__} (driver {driver_version()}): {reason}. Give "
            "another device, or install a build of torch for this GPU"
        ) from error


def make_deterministic() -> None:
    """Let torch use deterministic algorithms only, on all devices; one that has none raises RuntimeError when it runs.

    To be called before the first matrix product on a GPU: cuBLAS reads its variable when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, changes no result
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def _ask_driver(*options: str) -> str:
    try:
        return subprocess.run(
            ["nvidia-smi", *options], capture_output=True, encoding="utf-8", errors="replace", timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _may_open(path: Path) -> bool:
    """Whether this process was given the GPU of the device file: Slurm's cgroups refuse the others."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except PermissionError as error:
        return error.errno != 1  # EPERM is a cgroup's refusal; EACCES a mistake in the file's permissions
    except OSError:
        pass  # a broken driver; its GPU is there
    return True
