"""A dense model becomes recursive: which layers its blocks take, and that nothing is lost where nothing must be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.config import Config, ExpertChoiceConfig, FixedDepthConfig
from megamor.config.segments import segments
from megamor.errors import ConfigError
from megamor.interop import depth
from megamor.interop.depth import convert_depth, router_names
from megamor.model import Transformer, build_model
from tests.combinations import ROUTERS, STRUCTURES, lively_model, tiny_config, tokens, vanilla_config

FULL_RANK = 64


def target(sharing: str = "middle_cycle", router: str = "fixed", **recursion: Any) -> Config:
    config = tiny_config(ROUTERS[router], sharing=sharing)
    return replace(config, recursion=replace(config.recursion, **recursion))


def dense_of(config: Config) -> tuple[Config, Transformer]:
    """A vanilla model with a layer for each application in `config`, whose weights differ, norms included."""
    applications = sum(segment.num_applications for segment in segments(config) if segment.num_blocks)
    dense = vanilla_config(applications)
    dense = replace(dense, model=replace(config.model, num_layers=applications))
    model = lively_model(dense)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(number))
    return dense, model


def built(config: Config, weights: dict[str, Tensor]) -> Transformer:
    model = build_model(config, seed=1).to(weights["norm.weight"].dtype)
    assert {*model.load_state_dict(weights, strict=False).missing_keys} == router_names(config)
    return model.eval()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(tokens(), mode="causal").logits


@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) for m in depth.METHODS[:-1]] + ["svd_lora"])
def test_every_sharing_and_method(sharing: str, method: str) -> None:
    config = target(sharing, "expert_choice", lora_rank=4, separate_norms=True, recursion_embedding=True)
    config = replace(config, recursion=replace(config.recursion, input_injection=True))
    dense, model = dense_of(config)
    assert built(config, convert_depth(dense, model.state_dict(), config, method))(tokens()).logits.isfinite().all()


LAYERS = {
    # A core of 14 blocks over layers 1 to 28: round(1 + b * 27 / 13).
    ("middle_cycle", 30, 2): {
        "stepwise": [1, 3, 5, 7, 9, 11, 13, 16, 18, 20, 22, 24, 26, 28],
        "lower": [*range(1, 15)],
        "upper": [*range(15, 29)],
    },
    ("cycle", 9, 3): {"stepwise": [0, 4, 8], "lower": [0, 1, 2], "upper": [6, 7, 8]},
    ("sequence", 4, 2): {"stepwise": [0, 3], "lower": [0, 1], "upper": [2, 3]},
    ("cycle", 4, 4): {"stepwise": [0], "lower": [0], "upper": [3]},
}


@pytest.mark.parametrize(("sharing", "num_layers", "recursions"), LAYERS)
def test_layers_that_blocks_take(sharing: str, num_layers: int, recursions: int) -> None:
    config = target(sharing, num_recursions=recursions)
    config = replace(config, model=replace(config.model, num_layers=num_layers))
    blocks = [block for block in depth.unique_blocks(config, num_layers) if ".blocks." in block.name]
    for method, layers in LAYERS[sharing, num_layers, recursions].items():
        assert [block.sources(method) for block in blocks] == [(layer,) for layer in layers]
    order = next(segment.schedule for segment in segments(config) if segment.schedule)
    runs = [[layer for r, row in enumerate(order) for layer in block.runs[r]] for block in blocks]
    middle = range(1, num_layers - 1) if "middle" in sharing else range(num_layers)
    expected = {
        "cycle": [[*middle][b :: len(blocks)] for b in range(len(blocks))],
        "sequence": [[*middle][b * recursions : (b + 1) * recursions] for b in range(len(blocks))],
    }
    assert runs == expected[sharing.removeprefix("middle_")]


@pytest.mark.parametrize(("dense_layers", "stepwise"), [(5, [1, 3]), (10, [1, 8]), (4, [1, 2])])
def test_dense_models_of_another_depth(dense_layers: int, stepwise: list[int]) -> None:
    """The target has 2 unshared blocks and 2 that run 3 times, the dense model 4 to 10 layers."""
    config = target(separate_norms=True)
    dense = replace(config, model=replace(config.model, num_layers=dense_layers), recursion=vanilla_config().recursion)
    weights = lively_model(dense).state_dict()
    found = convert_depth(dense, weights, config, "stepwise")
    name = "ffn.up_proj.weight"
    for block, layer in enumerate(stepwise):
        assert torch.equal(found[f"stage.blocks.{block}.{name}"], weights[f"prelude.{layer}.{name}"])
    assert torch.equal(found[f"coda.0.{name}"], weights[f"prelude.{dense_layers - 1}.{name}"])
    with pytest.raises(ConfigError, match=rf"average needs {dense_layers} applications of blocks, .* has 8"):
        convert_depth(dense, weights, config, "average")


def test_stages_over_a_dense_model_of_as_many_blocks() -> None:
    """Every unique block is its layer, however often it runs."""
    config = target("stages")
    dense = replace(vanilla_config(6), model=config.model)
    model = lively_model(dense)
    recursive = built(config, convert_depth(dense, model.state_dict(), config, "stepwise"))
    state = recursive.state_dict()
    names = {"layers_0.blocks.0": 0, "layers_1.0": 1, "layers_2.blocks.0": 2, "layers_2.blocks.1": 3, "layers_5.0": 5}
    for block, layer in names.items():
        weight = model.state_dict()[f"prelude.{layer}.attention.q_proj.weight"]
        assert torch.equal(state[f"{block}.attention.q_proj.weight"], weight)


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle", "stages"])
def test_full_rank_is_the_dense_model(sharing: str) -> None:
    config = target(sharing, lora_rank=FULL_RANK, separate_norms=True)
    # A recursion of `sequence` runs a block several times with one set of norms and updates, so it can't be exact.
    stages = tuple(replace(s, sharing="cycle", router=None, kv_policy=None) for s in config.recursion.stages)
    config = replace(config, recursion=replace(config.recursion, stages=stages))
    dense, model = dense_of(config)
    assert_same(logits(built(config, convert_depth(dense, model.state_dict(), config, "svd_lora"))), logits(model))


@pytest.mark.parametrize("sharing", STRUCTURES)
def test_equal_layers_lose_nothing(sharing: str) -> None:
    """Where all layers are the same, nothing is lost, with the order of `sequence` as well."""
    config = target(sharing, lora_rank=2)
    stages = tuple(replace(s, router=None, kv_policy=None) for s in config.recursion.stages)
    config = replace(config, recursion=replace(config.recursion, stages=stages))
    dense, model = dense_of(config)
    for layer in model.prelude:
        layer.load_state_dict(model.prelude[0].state_dict())
    for method in ("stepwise", "average"):
        assert_same(logits(built(config, convert_depth(dense, model.state_dict(), config, method))), logits(model))


def test_low_rank_updates_are_the_nearest() -> None:
    """Of what a recursion's layer differs from the mean, the update of rank k leaves the other singular values."""
    config = target(lora_rank=5, separate_norms=True)
    dense, model = dense_of(config)
    weights = model.state_dict()
    found = convert_depth(dense, weights, config, "svd_lora:5")
    layers = [weights[f"prelude.{layer}.ffn.down_proj.weight"] for layer in (1, 3, 5)]
    shared = found["stage.blocks.0.ffn.down_proj.weight"]
    torch.testing.assert_close(shared, sum(layers[1:], layers[0]) / 3)
    for r, layer in enumerate(layers):
        up, down = (found[f"stage.blocks.0.ffn.down_proj.{name}.{r}.weight"] for name in ("up", "down"))
        left = torch.linalg.svdvals(layer - shared)[5:].square().sum().sqrt()
        torch.testing.assert_close((layer - shared - up @ down).norm(), left)


def test_updates_that_are_drawn_have_the_scale_of_new_weights() -> None:
    config = target(lora_rank=16, separate_norms=True)
    dense, model = dense_of(config)
    found = convert_depth(dense, model.state_dict(), config, "stepwise")
    down, up = (found[f"stage.blocks.0.ffn.up_proj.{name}.1.weight"] for name in ("down", "up"))
    assert float(down.std()) == pytest.approx(config.model.init_std, rel=0.15)
    assert not up.any()


def test_own_norms() -> None:
    config = target(separate_norms=True)
    dense, model = dense_of(config)
    weights = model.state_dict()
    found = convert_depth(dense, weights, config, "stepwise")
    norms = [found[f"stage.blocks.1.ffn_norm.{name}"] for name in ("weight", "others.0", "others.1")]
    for layer, norm in zip((2, 4, 6), norms, strict=True):
        assert torch.equal(norm, weights[f"prelude.{layer}.ffn_norm.weight"])


def test_the_check_finds_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    config = target(separate_norms=True)
    dense, model = dense_of(config)
    mean_of = depth.mean_of

    def forgets_norms(layers: Any, chosen: Any) -> dict[str, Tensor]:
        return {n: torch.ones_like(w) if n == "ffn_norm.weight" else w for n, w in mean_of(layers, chosen).items()}

    monkeypatch.setattr(depth, "mean_of", forgets_norms)
    with pytest.raises(AssertionError, match="layer 1 isn't the original's"):
        convert_depth(dense, model.state_dict(), config, "average")
    monkeypatch.undo()
    model.state_dict()["prelude.2.ffn.up_proj.weight"].fill_(torch.nan)
    with pytest.raises(AssertionError, match="layer 2 isn't the original's: differs by nan"):
        convert_depth(dense, model.state_dict(), config, "average")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "stepwize", "method 'stepwize' is unknown: give stepwise, average"),
    ({}, "average:3", "method 'average:3' is unknown"),
    ({"separate_norms": True}, "svd_lora:4", "svd_lora:4 with recursion.lora_rank = 0: set it to 4"),
    ({"separate_norms": True, "lora_rank": 8}, "svd_lora:4", "recursion.lora_rank = 8: set it to 4"),
    ({"lora_rank": 4}, "svd_lora", "set recursion.separate_norms"),
    ({"residual_scaling": "inverse"}, "stepwise", "recursion.residual_scaling would change"),
    ({"num_recursions": 1, "sharing": "none"}, "stepwise", "the target shares no layers"),
]


@pytest.mark.parametrize(("recursion", "method", "message"), REFUSED)
def test_refused(recursion: dict[str, Any], method: str, message: str) -> None:
    config = target(**recursion)
    dense, model = dense_of(config)
    with pytest.raises(ConfigError, match=message):
        convert_depth(dense, model.state_dict(), config, method)


def test_all_differences_of_backbones_are_named() -> None:
    config = target()
    dense, model = dense_of(config)
    changed = replace(config.model, vocab_size=101, dim=64, rope_theta=5e5, qk_norm=True, norm_eps=1e-6)
    with pytest.raises(ConfigError) as caught:
        convert_depth(dense, model.state_dict(), replace(config, model=changed), "stepwise")
    for name in ("vocab_size is 97 and in the target 101", "dim", "head_dim", "rope_theta", "qk_norm", "norm_eps"):
        assert f"model.{name}" in str(caught.value)
    recursive, routed = replace(config, router=FixedDepthConfig()), replace(config, router=ExpertChoiceConfig())
    with pytest.raises(ConfigError, match="has recursion stages: give a vanilla one"):
        convert_depth(recursive, build_model(recursive).state_dict(), routed, "lower")


def test_sliding_windows() -> None:
    """Blocks stand for layers of their own kind; others are refused."""
    config = target("cycle", separate_norms=True, lora_rank=FULL_RANK)  # two blocks, three times
    sliding = replace(config.model, sliding_window=5, sliding_layers=(0, 2, 4), sliding_rope_theta=100.0)
    config = replace(config, model=sliding)
    dense, model = dense_of(config)
    assert_same(logits(built(config, convert_depth(dense, model.state_dict(), config, "svd_lora"))), logits(model))
    uneven = replace(dense, model=replace(sliding, sliding_layers=(0, 2)))
    for method in ("average", "stepwise"):  # stepwise takes layer 0 alone, which slides
        with pytest.raises(ConfigError, match=r"blocks.0 attends to a sliding window, and the layers \[4\] to the"):
            convert_depth(uneven, model.state_dict(), config, method)


@pytest.mark.parametrize(
    "settings", [{"tied_head": False, "head_width": 10, "qk_norm": True}, {"sandwich_norms": True}]
)
def test_backbones_of_other_families(settings: dict[str, Any]) -> None:
    settings = {**settings, "ffn_activation": "gelu_tanh", "scale_embedding": True}
    config = target(lora_rank=FULL_RANK, separate_norms=True)
    config = replace(config, model=replace(config.model, **settings))
    dense, model = dense_of(config)
    assert_same(logits(built(config, convert_depth(dense, model.state_dict(), config, "svd_lora"))), logits(model))
