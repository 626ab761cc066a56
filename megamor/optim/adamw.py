"""AdamW, fused where the device has the kernel."""

from __future__ import annotations

import torch
from torch import nn

from megamor.config import OptimConfig
from megamor.optim.groups import build_param_groups

FUSED_DEVICES = frozenset({"cpu", "cuda"})


def build_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the parameter groups of `model`, which must be on its final device."""
    groups = build_param_groups(model, config)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups,  # type: ignore[arg-type]
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=devices <= FUSED_DEVICES,
    )
