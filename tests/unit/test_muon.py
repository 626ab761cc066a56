"""Muon's update against singular value decompositions and torch's own; which parameters it takes; who owns a matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megamor.config import Config, OptimConfig, ParallelConfig, TrainConfig
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.model import build_model
from megamor.optim import Muon, build_optimizer, moments_of, orthogonalise
from megamor.optim.muon import owned_matrices
from tests.distributed.runs import TINY, tiny

OPTIM = OptimConfig(kind="muon", lr=0.02, weight_decay=0.1, muon_lr_multiplier=0.5)


def reference(matrix: Tensor, steps: int) -> Tensor:
    """The same polynomial applied to the singular values, in fp64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def test_orthogonalise_moves_singular_values_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in ((8, 8), (8, 24), (24, 8), (8, 24), (5, 3))]
    for matrix, result in zip(matrices, orthogonalise(matrices, 5), strict=True):
        torch.testing.assert_close(result.double(), reference(matrix, 5), rtol=0.0, atol=2e-4)
        assert torch.linalg.svdvals(result)[0] < 1.3
    assert not orthogonalise([torch.zeros(3, 4)], 5)[0].any()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(6, 4, bias=False)


def test_three_updates_by_hand() -> None:
    """Momentum, Nesterov, the scale of the update, weight decay; the head is left to AdamW."""
    torch.manual_seed(0)
    module = Linear()
    optimizer = build_optimizer(module, Config(optim=OPTIM, train=TrainConfig(precision="fp32")))
    for group in optimizer.param_groups:
        group["lr"] = OPTIM.lr * group["lr_multiplier"]
    twin = torch.optim.AdamW([module.head.weight.detach().clone()], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    weight, momentum = module.up_proj.weight.detach().double(), torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(3):
        gradient = torch.randn(6, 4)
        module.up_proj.weight.grad, module.head.weight.grad = gradient, torch.randn(4, 6)
        twin.param_groups[0]["params"][0].grad = module.head.weight.grad.clone()
        momentum = 0.95 * momentum + gradient.double()
        update = reference(gradient.double() + 0.95 * momentum, 5)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 6**0.5 * update
        optimizer.step()
        twin.step()
    torch.testing.assert_close(module.up_proj.weight.detach().double(), weight, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(module.head.weight.detach(), twin.param_groups[0]["params"][0].detach())


@pytest.mark.parametrize("nesterov", [True, False])
def test_bf16_agrees_with_torchs_muon(nesterov: bool) -> None:
    torch.manual_seed(0)
    module = Linear()
    config = Config(optim=replace(OPTIM, muon_lr_multiplier=1.0, muon_nesterov=nesterov))
    optimizer = build_optimizer(module, config)
    twin = nn.Parameter(module.up_proj.weight.detach().clone())
    theirs = torch.optim.Muon([twin], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        module.up_proj.weight.grad, module.head.weight.grad = torch.randn(6, 4), torch.zeros(4, 6)
        twin.grad = module.up_proj.weight.grad.clone()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(module.up_proj.weight, twin, rtol=0.0, atol=1e-3)


def test_projections_are_muons_and_everything_else_is_adamws() -> None:
    recursion = replace(TINY.recursion, lora_rank=2, recursion_embedding=True, separate_norms=True)
    config = replace(TINY, optim=OPTIM, recursion=recursion)
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, Muon)
    names = {parameter: name for name, parameter in model.named_parameters()}
    (group,) = [group for group in optimizer.param_groups if group["muon"]]
    found = {names[parameter] for parameter in group["params"]}
    assert found == {name for name in names.values() if name.endswith("_proj.weight")}
    assert len(found) == 4 * 7  # prelude, two shared blocks, coda
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert moments_of("prelude.0.ffn.up_proj.weight", (4, 4), OPTIM) == ("momentum_buffer", "step")
    for name in ("embed.weight", "stage.router.heads.0.weight", "stage.blocks.0.ffn.up_proj.up.0.weight"):
        assert moments_of(name, (4, 4), OPTIM) == ("exp_avg", "exp_avg_sq", "step")


def test_owners_have_equal_work() -> None:
    """Cost min² (2 max + min), the costliest first: 2 of 576 x 1536 and 4 of 576 x 576 on two ranks."""
    shapes = [(576, 576), (1536, 576), (576, 576), (576, 1536), (576, 576), (576, 576)]
    assert owned_matrices(shapes, 2) == [[1, 0, 4], [3, 2, 5]]
    assert owned_matrices([(4, 4)], 3) == [[0], [], []]


def test_deepspeed_is_refused_by_name() -> None:
    config = tiny("deepspeed")
    validate(config, 2)
    refused = replace(config, optim=OPTIM, parallel=ParallelConfig(backend="deepspeed"))
    with pytest.raises(ConfigError, match=r"kind = muon with parallel\.backend = deepspeed: .* use ddp or fsdp2"):
        validate(refused, 2)
