"""AdamW and its parameter groups: which parameters have weight decay, and which a higher learning rate."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import nn

from megamor.config import OptimConfig


class ParamGroup(TypedDict):
    """One parameter group of a torch optimizer. The backends' `set_lr` reads `lr_multiplier`."""

    name: str
    params: list[torch.nn.Parameter]
    weight_decay: float
    lr_multiplier: float
    muon: bool


def is_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon updates a parameter: the projections of attention and SwiGLU.

    Not embedding and head, whose rows are looked up one by one, nor routers and the factors of low-rank updates, whose
    products matter.
    """
    return dimensions == 2 and name.endswith("_proj.weight") and "router" not in name


def build_param_groups(model: nn.Module, config: OptimConfig) -> list[ParamGroup]:
    """Split the trainable parameters of `model` into groups; each unique parameter is in exactly one.

    Matrices (embedding and routers included) have weight decay; vectors (norms, biases) don't. Auxiliary routers, which
    have `aux_router` in their name, learn `aux_router_lr_multiplier` times faster (arXiv 2507.10524, section 2.2.1),
    other routers `router_lr_multiplier` times. With Muon, its matrices are a group of their own. Empty groups are left
    out. Call it on the wrapped model, because FSDP2 replaces the parameters.
    """
    rates = {"model": 1.0, "router": config.router_lr_multiplier, "aux_router": config.aux_router_lr_multiplier}
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {}
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters(remove_duplicate=True):
        if parameter.requires_grad and config.kind == "muon" and is_matrix(name, parameter.ndim):
            matrices.append(parameter)
        elif parameter.requires_grad:
            part = "aux_router" if "aux_router" in name else "router" if "router." in name else "model"
            part = "model" if rates[part] == 1.0 else part
            groups.setdefault((parameter.ndim >= 2, part), []).append(parameter)
    rate = config.muon_lr_multiplier
    muon = ParamGroup(name="muon", params=matrices, weight_decay=config.weight_decay, lr_multiplier=rate, muon=True)
    return [
        ParamGroup(
            name=f"{part}_{'decay' if decays else 'no_decay'}",
            params=parameters,
            weight_decay=config.weight_decay if decays else 0.0,
            lr_multiplier=rates[part],
            muon=False,
        )
        for (decays, part), parameters in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1] == "model"))
    ] + [muon] * bool(matrices)


def build_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the parameter groups of `model`, which must be on its final device."""
    groups = build_param_groups(model, config)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups,  # type: ignore[arg-type]
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=devices <= {"cpu", "cuda"},
    )
