"""Parameter groups, AdamW and the guard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamor.config import Config, ExpertChoiceConfig, ModelConfig, OptimConfig, RecursionConfig
from megamor.model import Transformer, build_model
from megamor.optim import build_adamw, build_param_groups

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.3, aux_router_lr_multiplier=7.0)


@pytest.fixture
def model() -> Transformer:
    return build_model(
        Config(
            model=ModelConfig(
                vocab_size=32, dim=16, num_layers=8, num_heads=2, num_kv_heads=1, ffn_dim=24, max_seq_len=16
            ),
            recursion=RecursionConfig(num_recursions=3, sharing="middle_cycle"),
            router=ExpertChoiceConfig(sampling="aux_router"),
            optim=OPTIM,
        )
    )


def test_every_unique_parameter_is_in_the_group_of_its_kind(model: Transformer) -> None:
    groups = build_param_groups(model, OPTIM)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}
    assert sorted(name for group in members.values() for name in group) == sorted(names.values())
    for kind, group in members.items():
        assert all(("norm" in name) == (kind == "model_no_decay") for name in group)
        assert all(("aux_router" in name) == (kind == "aux_router_decay") for name in group)
    assert members.keys() == {"model_decay", "model_no_decay", "aux_router_decay"}
    settings = {group["name"]: (group["weight_decay"], group["lr_multiplier"]) for group in groups}
    assert settings == {"model_decay": (0.3, 1.0), "model_no_decay": (0.0, 1.0), "aux_router_decay": (0.3, 7.0)}


def test_routers_may_learn_at_a_rate_of_their_own(model: Transformer) -> None:
    groups = build_param_groups(model, replace(OPTIM, router_lr_multiplier=0.5))
    rates = {group["name"]: group["lr_multiplier"] for group in groups}
    assert rates == {"aux_router_decay": 7.0, "router_decay": 0.5, "model_decay": 1.0, "model_no_decay": 1.0}
    (routers,) = (group["params"] for group in groups if group["name"] == "router_decay")
    assert {id(parameter) for parameter in routers} == {id(head.weight) for head in model.stage.router.heads}


def test_a_tied_weight_is_one_parameter() -> None:
    tied = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
    tied["head"].weight = tied["embed"].weight
    (group,) = build_param_groups(tied, OPTIM)
    assert len(group["params"]) == 1


def test_frozen_parameters_are_left_out(model: Transformer) -> None:
    model.embed.requires_grad_(False)
    members = [parameter for group in build_param_groups(model, OPTIM) for parameter in group["params"]]
    assert len(members) == len(list(model.parameters())) - 1
    assert all(parameter is not model.embed.weight for parameter in members)


def test_adamw_takes_its_settings_and_is_fused(model: Transformer) -> None:
    config = replace(OPTIM, beta1=0.8, beta2=0.7, eps=1e-5)
    for group in build_adamw(model, config).param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (1e-2, (0.8, 0.7), 1e-5, True)


def test_decay_acts_on_matrices_only(model: Transformer) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_adamw(model, OPTIM)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1.0 if parameter.ndim == 1 else 1.0 - 1e-2 * 0.3
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0.0)
