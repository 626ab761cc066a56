"""Peak matrix throughput of GPUs in bf16: dense, with fp32 accumulation, per device as CUDA or ROCm enumerates it.

Vendors like to print the figure with 2:4 sparsity, which is twice the dense one; the table holds dense figures only. A
device that is not in the table has no MFU rather than a guessed one: to add one, cite where its figure is from.
"""

from __future__ import annotations

import re

# Pattern of the device's name (vendor words removed, lower case, matched in full) → TFLOP/s.
_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    # Data sheet "NVIDIA A100 Tensor Core GPU": 312, all memory sizes and form factors; A800 differs in NVLink alone.
    # One supercomputer's 64 GB board has more units and is left out.
    (r"a[18]00-(sxm4?|pcie)-[48]0gb", 312.0),
    (r"a[18]00 80gb pcie", 312.0),
    # Data sheet "NVIDIA A30": 165. "NVIDIA A40": 149.7. "NVIDIA A10": 125. "NVIDIA RTX A6000" whitepaper GA102: 154.8.
    (r"a30", 165.0),
    (r"a40", 149.7),
    (r"a10", 125.0),
    (r"rtx a6000", 154.8),
    # Whitepaper "NVIDIA H100 Tensor Core GPU Architecture", table 2: 989.4 (SXM5), 756 (PCIe). CUDA names the SXM5
    # board by its memory. H800 and H200 SXM have the same compute; data sheet "NVIDIA H200": 1,979 with sparsity.
    (r"h[18]00 80gb hbm3", 989.4),
    (r"h[18]00 pcie", 756.0),
    (r"h200", 989.4),
    (r"gh200 (480gb|120gb|144g hbm3e)", 989.4),
    # Data sheets "NVIDIA H100" (column H100 NVL) and "NVIDIA H200" (column H200 NVL): 1,671 with sparsity.
    (r"h[12]00 nvl", 835.5),
    # Data sheet "NVIDIA L40S": 362.05. "NVIDIA L40": 181.05. "NVIDIA L4": 242 with sparsity.
    (r"l40s", 362.05),
    (r"l40", 181.05),
    (r"l4", 121.0),
    # Whitepapers "NVIDIA Ada GPU Architecture" (4090: 165.2) and "GA102" (3090: 71), appendix A, fp32 accumulation.
    # Consumer boards run that at half the rate of fp16 accumulation, which is the figure often quoted.
    (r"geforce rtx 4090", 165.2),
    (r"geforce rtx 3090", 71.0),
    # Data sheet "NVIDIA HGX B200": 36 PFLOP/s with sparsity for eight.
    (r"b200", 2250.0),
    # Data sheets "AMD Instinct MI300X", "MI325X": 1,307.4. "MI250X": 383 for two dies, each its own device in ROCm.
    (r"instinct mi3(00|25)x( oam)?", 1307.4),
    (r"instinct mi250x( oam)?", 191.5),
    # V100, T4 and the 20 series have no bf16 matrix units: left out on purpose.
)


def peak_flops(device_name: str | None, precision: str = "bf16") -> float | None:
    """Peak FLOP/s of one device, or None where no figure is known.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it; None for a CPU.
        precision: of the matrix products. Only bf16 has a table: what fp32 reaches depends on TF32 settings.
    """
    if device_name is None or precision != "bf16":
        return None
    name = re.sub(r"^(nvidia|amd|tesla)\s+", "", device_name.strip().lower())
    if "mig " in name:  # a slice of a device
        return None
    for pattern, tflops in _BF16_TFLOPS:
        if re.fullmatch(pattern, name):
            return tflops * 1e12
    return None
