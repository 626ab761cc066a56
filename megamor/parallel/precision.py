"""Where bf16 is used. Weights and optimizer state are fp32 with every backend; fp16 isn't offered.

`single` and `ddp` cast at each operation (autocast), FSDP2 casts the gathered weights, DeepSpeed keeps a bf16 copy.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Context of a forward pass with fp32 weights: bf16 matrix products, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def fsdp_policy(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's policy: bf16 gathers and compute, fp32 gradient reduction; or fp32 throughout.

    Inputs of the units are left as they are: the stream is bf16 from the embedding on, and rotary angles must stay
    fp32.
    """
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
