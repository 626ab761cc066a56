"""GPUs that megamor plan knows, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from megamor.errors import ConfigError
from megamor.metrics import peak_flops


@dataclass(frozen=True)
class Gpu:
    """One GPU, as sold in nodes of eight. Bytes, and bytes a second.

    `device` is what CUDA or ROCm calls it. `memory_bandwidth` is its own memory's, `link` that to the other GPUs of its
    node in each direction, `network` its share of the node's network.
    """

    device: str
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    source: str

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s, from the table that MFU is computed with."""
        peak = peak_flops(self.device)
        assert peak is not None, self.device
        return peak


GB = 1e9
GPUS = {
    "a100-40": Gpu(
        "NVIDIA A100-SXM4-40GB", 40 * GB, 1555 * GB, 300 * GB, 25 * GB,
        "data sheet NVIDIA A100 (NVLink 600 GB/s both ways); DGX A100: 8 x 200 Gb/s InfiniBand",
    ),
    "a100-80": Gpu(
        "NVIDIA A100-SXM4-80GB", 80 * GB, 2039 * GB, 300 * GB, 25 * GB,
        "data sheet NVIDIA A100 (NVLink 600 GB/s both ways); DGX A100: 8 x 200 Gb/s InfiniBand",
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 80 * GB, 3350 * GB, 450 * GB, 50 * GB,
        "data sheet NVIDIA H100 SXM (NVLink 900 GB/s both ways); DGX H100: 8 x 400 Gb/s InfiniBand",
    ),
    "h200": Gpu(
        "NVIDIA H200", 141 * GB, 4800 * GB, 450 * GB, 50 * GB,
        "data sheet NVIDIA H200 SXM (NVLink 900 GB/s both ways); DGX H200: 8 x 400 Gb/s InfiniBand",
    ),
    "b200": Gpu(
        "NVIDIA B200", 180 * GB, 8000 * GB, 900 * GB, 50 * GB,
        "data sheet NVIDIA DGX B200: 1,440 GB, 64 TB/s, 14.4 TB/s NVLink for 8 GPUs; 8 x 400 Gb/s InfiniBand",
    ),
    "l40s": Gpu(
        "NVIDIA L40S", 48 * GB, 864 * GB, 32 * GB, 12.5 * GB,
        "data sheet NVIDIA L40S (PCIe 4.0 x16, 64 GB/s both ways); network of 100 Gb/s a GPU: an assumption",
    ),
    "mi300x": Gpu(
        "AMD Instinct MI300X OAM", 192 * GB, 5300 * GB, 448 * GB, 50 * GB,
        "data sheet AMD Instinct MI300X (Infinity Fabric 896 GB/s both ways); network of 400 Gb/s a GPU: an assumption",
    ),
}  # fmt: skip
"""By the name that `--gpu` takes."""


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        ConfigError: there is none.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name}: not in the catalogue; there are {', '.join(GPUS)} (megamor/plan/gpus.py)")
    return GPUS[name.lower()]
