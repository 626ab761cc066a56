"""The GPUs that megamor knows: peak matrix throughput for MFU, and memory and links for `megamor plan`.

Peaks are dense bf16 with fp32 accumulation, per device as CUDA or ROCm enumerates it. Vendors like to print the figure
with 2:4 sparsity, which is twice the dense one. A device that isn't in the table has no MFU rather than a guessed one:
to add one, cite where its figures are from. V100, T4 and the 20 series have no bf16 matrix units and are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TERA, GB = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU, as sold in nodes of eight. FLOP/s, bytes, and bytes per second.

    `device` is the name that CUDA or ROCm reports. `memory_bandwidth` is that of its own memory, `link` that to the
    other GPUs of its node in each direction, `network` its part of the node's network.
    """

    device: str
    bf16_peak: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    source: str


A100_NODE = "data sheet NVIDIA A100 (312 TFLOP/s, NVLink 600 GB/s both ways); DGX A100: 8 x 200 Gb/s InfiniBand"
# Whitepaper "NVIDIA H100 Tensor Core GPU Architecture", table 2. The H200's compute is the same.
H100_PEAK = 989.4 * TERA

GPUS: dict[str, Gpu] = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 312 * TERA, 40 * GB, 1555 * GB, 300 * GB, 25 * GB, A100_NODE),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 312 * TERA, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, A100_NODE),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", H100_PEAK, 80 * GB, 3350 * GB, 450 * GB, 50 * GB,
        "data sheet NVIDIA H100 SXM (NVLink 900 GB/s both ways); DGX H100: 8 x 400 Gb/s InfiniBand",
    ),
    "h200": Gpu(
        "NVIDIA H200", H100_PEAK, 141 * GB, 4800 * GB, 450 * GB, 50 * GB,
        "data sheet NVIDIA H200 SXM (1,979 with sparsity, NVLink 900 GB/s both ways); DGX H200: as DGX H100",
    ),
    "b200": Gpu(
        "NVIDIA B200", 2250 * TERA, 180 * GB, 8000 * GB, 900 * GB, 50 * GB,
        "data sheets NVIDIA HGX B200 (36 PFLOP/s with sparsity for 8) and DGX B200 (1,440 GB, 64 TB/s, 14.4 TB/s "
        "NVLink for 8; 8 x 400 Gb/s InfiniBand)",
    ),
    "l40s": Gpu(
        "NVIDIA L40S", 362.05 * TERA, 48 * GB, 864 * GB, 32 * GB, 12.5 * GB,
        "data sheet NVIDIA L40S (PCIe 4.0 x16, 64 GB/s both ways); network of 100 Gb/s a GPU: an assumption",
    ),
    "mi300x": Gpu(
        "AMD Instinct MI300X OAM", 1307.4 * TERA, 192 * GB, 5300 * GB, 448 * GB, 50 * GB,
        "data sheet AMD Instinct MI300X (Infinity Fabric 896 GB/s both ways); network of 400 Gb/s a GPU: an assumption",
    ),
}  # fmt: skip
"""Those that `megamor plan` knows, by the name that `--gpu` takes."""

# The other names under which the same chips report themselves, and chips that are only measured on: pattern of the name
# (vendor words removed, lower case, matched in full) -> peak.
_PEAKS: dict[str, float] = {
    # A800 differs from A100 in NVLink alone. One supercomputer's 64 GB board has more units and is left out.
    r"a[18]00-(sxm4?|pcie)-[48]0gb|a[18]00 80gb pcie": GPUS["a100-80"].bf16_peak,
    # Data sheets "NVIDIA A30", "NVIDIA A40", "NVIDIA A10"; whitepaper GA102 for the RTX A6000.
    r"a30": 165 * TERA,
    r"a40": 149.7 * TERA,
    r"a10": 125 * TERA,
    r"rtx a6000": 154.8 * TERA,
    # CUDA names the SXM5 board by its memory. H800 and H200 SXM have the compute of the H100. PCIe: same whitepaper.
    r"h[18]00 80gb hbm3|h200|gh200 (480gb|120gb|144g hbm3e)": H100_PEAK,
    r"h[18]00 pcie": 756 * TERA,
    # Data sheets "NVIDIA H100" (column H100 NVL) and "NVIDIA H200" (column H200 NVL): 1,671 with sparsity.
    r"h[12]00 nvl": 835.5 * TERA,
    r"l40s": GPUS["l40s"].bf16_peak,
    # Data sheets "NVIDIA L40" and "NVIDIA L4" (242 with sparsity).
    r"l40": 181.05 * TERA,
    r"l4": 121 * TERA,
    # Whitepapers "NVIDIA Ada GPU Architecture" (4090) and "GA102" (3090), appendix A, fp32 accumulation. Consumer
    # boards run that at half the rate of fp16 accumulation, which is the figure often quoted.
    r"geforce rtx 4090": 165.2 * TERA,
    r"geforce rtx 3090": 71 * TERA,
    r"b200": GPUS["b200"].bf16_peak,
    # The MI325X has the compute of the MI300X. MI250X: 383 for two dies, each its own device in ROCm.
    r"instinct mi3(00|25)x( oam)?": GPUS["mi300x"].bf16_peak,
    r"instinct mi250x( oam)?": 191.5 * TERA,
}


def peak_flops(device_name: str | None, precision: str = "bf16") -> float | None:
    """Peak FLOP/s of one device, or None where no figure is known.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it; None for a CPU.
        precision: of the matrix products. Only bf16 is known: what fp32 reaches depends on TF32 settings.
    """
    if device_name is None or precision != "bf16":
        return None
    name = re.sub(r"^(nvidia|amd|tesla)\s+", "", device_name.strip().lower())
    # "MIG" names a slice of a device, whose peak isn't the whole one's; no pattern matches it.
    return next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)
