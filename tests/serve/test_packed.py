"""Prepacked projections: the same logits as the model's own, on a copy that leaves the model alone."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from megamor.config import Config, FixedDepthConfig
from megamor.load import cast
from megamor.model import Transformer, build_model
from megamor.serve.engine.packed import PackedLinear, packed, why_not_packed
from tests.combinations import ROUTERS, lively_model, tiny_config, tokens, vanilla_config


def logits(model: Transformer, rows: int) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(seed=1, batch=1, length=rows), mode="causal").logits[0].double()


def variants() -> dict[str, Config]:
    """Models whose projections differ in kind."""
    base = tiny_config(ROUTERS["expert_choice"])
    lora = replace(base.recursion, lora_rank=2, separate_norms=True)
    return {
        "cycle, low-rank updates, separate norms": replace(base, recursion=lora),
        "share-first": tiny_config(ROUTERS["token_choice"], "share_first", "cycle"),
        "own head, normalised queries": replace(base, model=replace(base.model, tied_head=False, qk_norm=True)),
        "no recursion, GeGLU": replace(
            vanilla_config(), model=replace(vanilla_config().model, ffn_activation="gelu_tanh")
        ),
    }


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("rows", [1, 19])
def test_the_logits_are_those_of_the_model(name: str, rows: int) -> None:
    model = cast(lively_model(variants()[name]), torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "others" in parameter_name or ".up." in parameter_name:
            parameter.data.normal_(generator=generator)
    other = packed(model)
    assert sum(isinstance(module, PackedLinear) for module in other.modules()) == 1 + 4 * model_blocks(model)
    torch.testing.assert_close(logits(other, rows), logits(model, rows), rtol=1e-5, atol=1e-5)


def model_blocks(model: Transformer) -> int:
    return sum(name.endswith("attention.q_proj") for name, _ in model.named_modules())


def test_bf16_is_as_exact_as_the_models_own() -> None:
    config = tiny_config(FixedDepthConfig())
    exact, own = build_model(config).eval(), cast(build_model(config), torch.bfloat16).eval()
    if why_not_packed(own):
        pytest.skip(f"bf16: {why_not_packed(own)}")
    want = logits(exact, 19)
    mine, theirs = ((logits(model, 19) - want).abs().max() for model in (packed(own), own))
    assert 0 < mine < 1.5 * theirs


def test_the_model_stays_as_it_was_and_its_projections_go_with_it() -> None:
    model = lively_model(tiny_config(ROUTERS["expert_choice"])).float().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = packed(model)
    assert packed(other) is other
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert other.embed.weight is model.embed.weight
    gone = weakref.ref(model.prelude[0].attention.q_proj.weight)
    del model
    gc.collect()
    assert gone() is None


def test_other_types_are_multiplied_as_they_are() -> None:
    model = build_model(tiny_config(FixedDepthConfig())).double()
    assert why_not_packed(model) == "oneDNN has no kernels for float64 on this processor"
    assert packed(model) is model
