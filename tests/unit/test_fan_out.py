"""Gradients of shared bf16 weights are summed over the recursions in fp32 if so configured."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.model import Transformer, build_model
from megamor.model import recursion as recursion_module
from megamor.model.recursion import _call_with
from tests.combinations import ROUTERS, SEQ_LEN, tiny_config, tokens

RECURSIONS = 3
Gradients = dict[str, Tensor]


def core_gradients(model: Transformer, autocast: bool) -> Gradients:
    """Gradients of the shared blocks after one step."""
    ids = tokens(length=SEQ_LEN + 1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = model(ids[:, :-1], ids[:, 1:])
    (out.loss_sum / out.num_tokens).backward()
    assert model.stage is not None
    return {name: weight.grad.clone() for name, weight in model.stage.blocks.named_parameters()}


def built(dtype: torch.dtype, in_fp32: bool, policy: str = "none") -> Transformer:
    """Three recursions of two blocks."""
    config = tiny_config(ROUTERS["fixed"])
    config = replace(config, train=replace(config.train, add_shared_gradients_in_fp32=in_fp32))
    model = build_model(config).to(dtype)
    model.set_activation_checkpointing(policy, ("sdpa",))
    return model


def of_each_recursion(model: Transformer, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> list[Gradients]:
    """A reference without shared weights: each recursion has its own copies, which are leaf tensors."""
    copies: list[list[dict[str, Tensor]]] = []

    def separate(blocks: Any, count: int) -> Any:
        for _ in range(count):
            of_blocks = []
            for block in blocks:
                of_blocks.append({n: w.detach().clone().requires_grad_() for n, w in block.named_parameters()})
            copies.append(of_blocks)
        return [
            [
                lambda *args, b=block, w=weights: _call_with(b, w, *args)
                for block, weights in zip(blocks, own, strict=True)
            ]
            for own in copies
        ]

    with monkeypatch.context() as patch:
        patch.setattr(recursion_module, "fan_out", separate)
        ids = tokens(length=SEQ_LEN + 1)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            out = model(ids[:, :-1], ids[:, 1:])
        (out.loss_sum / out.num_tokens).backward()
    return [
        {f"{number}.{name}": weight.grad for number, own in enumerate(of_blocks) for name, weight in own.items()}
        for of_blocks in copies
    ]


@pytest.mark.parametrize("policy", ["none", "recursion", "block", "selective"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_recursions_are_added_in_fp32(autocast: bool, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal for bf16 weights, where the sum is rounded once, and for fp32 weights under autocast."""
    dtype = torch.float32 if autocast else torch.bfloat16
    separate = of_each_recursion(built(dtype, True), autocast, monkeypatch)
    found = core_gradients(built(dtype, True, policy), autocast)
    plain = core_gradients(built(dtype, False), autocast)
    exact = {name: sum(gradients[name].float() for gradients in separate) for name in found}
    assert len(separate) == RECURSIONS
    for name, gradient in found.items():
        assert torch.equal(gradient, exact[name].to(dtype)), name
    assert distance(found, exact) < (1e-6 if autocast else 0.9) * distance(plain, exact)


def distance(found: Gradients, exact: Gradients) -> float:
    """Sum of the norms of the differences."""
    return sum(float((found[name].float() - exact[name]).norm()) for name in exact)


def test_nothing_changes_in_fp32() -> None:
    plain, added = (core_gradients(built(torch.float32, flag), False) for flag in (False, True))
    for name in plain:
        torch.testing.assert_close(plain[name], added[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_that_arrive_stay_as_they_are(dtype: torch.dtype) -> None:
    """Autograd may hold the same tensor for other uses: the sum must not be written into it."""
    weight = torch.zeros(3, dtype=dtype, requires_grad=True)
    arriving = [torch.full((3,), value, dtype=dtype) for value in (1.0, 2.0, 4.0)]
    (found,) = torch.autograd.grad(recursion_module._FanOut.apply(weight, 3), weight, arriving)
    assert found.tolist() == [7.0] * 3
    assert [gradient.tolist() for gradient in arriving] == [[1.0] * 3, [2.0] * 3, [4.0] * 3]
