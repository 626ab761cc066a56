"""Import of checkpoints of the released code: reference cases in its layout give the reference logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megamor.cli import import_weights as tool
from megamor.errors import CheckpointError, ConfigError
from megamor.interop.official import import_official
from megamor.interop.weights import read_state_dict, save_imported
from megamor.load import load_model
from megamor.model import build_model
from tests.commands import refusal
from tests.parity.reference import Case, cases

CASES = cases()
DIM, VOCAB = 16, 31
SHAPES = {
    "ln1": (DIM,), "q": (DIM, DIM), "k": (8, DIM), "v": (8, DIM), "o": (DIM, DIM),
    "ln2": (DIM,), "gate": (24, DIM), "up": (24, DIM), "down": (DIM, 24),
}  # fmt: skip
OFFICIAL = {
    "ln1": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "ln2": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip


def official_layout(weights: dict[str, Tensor], kind: str, sharing: str | None, recursions: int) -> dict[str, Tensor]:
    """Reference weights (`first`, `block.j`, `last`, `router.r`) as the released code stores them.

    `kind` is vanilla, recursive, expert or token.
    """
    state = {f"model.{n.replace('embed', 'embed_tokens')}": weights[n] for n in ("embed.weight", "norm.weight")}
    state["lm_head.weight"] = weights["embed.weight"].clone()

    def put(prefix: str, reference: str) -> None:
        for short, name in OFFICIAL.items():
            state[f"{prefix}.{name}.weight"] = weights[f"{reference}.{short}.weight"].clone()

    if kind == "vanilla":
        for layer in range(len({n.split(".")[1] for n in weights if n.startswith("layer.")})):
            put(f"model.layers.{layer}", f"layer.{layer}")
        return state
    assert sharing is not None
    edge = int(sharing.startswith("middle"))
    per_recursion = len({n.split(".")[1] for n in weights if n.startswith("block.")})
    for application in range(per_recursion * recursions):
        recursion, place = divmod(application, per_recursion)
        block = place if sharing.endswith("cycle") else application // recursions
        put(
            {
                "recursive": f"model.layers.{edge + application}",
                "expert": f"model.layers.{edge + recursion}.block.{place}",
                "token": f"model.layers.{'1.' if edge else ''}block_list.{recursion}.{place}",
            }[kind],
            f"block.{block}",
        )
    if edge:
        put("model.layers.0", "first")
        last = {"recursive": per_recursion * recursions, "expert": recursions, "token": 1}[kind] + 1
        put(f"model.layers.{last}", "last")
    for name, weight in weights.items():
        stem, *rest = name.replace("fc1", "0").replace("fc2", "2").split(".")
        if stem == "token_router":
            state[".".join([f"model.layers{'.1' if edge else ''}.mor_router.router", *rest])] = weight
        elif stem in ("router", "aux_router"):
            module = "mor_router" if stem == "router" else "mlp_router"
            state[".".join([f"model.layers.{edge + int(rest[0])}.{module}.router", *rest[1:]])] = weight
    return state


def official_case(case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and run settings of a reference case."""
    kind = case.settings["mor"]["type"] if case.meta["kind"] == "mor" else case.meta["kind"]
    state = official_layout(case.weights, kind, case.meta["sharing"], case.meta["num_recursion"])
    if "router_bias" in case.tensors:
        state["model.layers.1.router_bias"] = case.tensors["router_bias"].flatten()
    return state, {**case.settings, "model_config": {"num_attention_heads": 8}, "max_length": 32}


@pytest.mark.skipif(not CASES, reason="no reference cases; set MEGAMOR_FIXTURES")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_reference_case_keeps_its_logits(case: Case) -> None:
    imported = import_official(*official_case(case))
    model = build_model(imported.config)
    model.load_state_dict(imported.weights)
    mode = "topk" if "eval.loss" in case.tensors else "causal"
    with torch.no_grad():
        logits = model(case.tensors["input_ids"].long(), mode=mode, step=10**9).logits
    torch.testing.assert_close(logits, case.tensors["eval.logits"], atol=1e-5, rtol=0)
    assert imported.untied == ()


def small_run(kind: str = "expert", head: str = "linear", **mor: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A released model of width 16 with random weights: 3 recursions of 2 blocks between 2 unique layers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {"embed.weight": random(VOCAB, DIM), "norm.weight": random(DIM)}
    for prefix in ("first", "block.0", "block.1", "last"):
        weights |= {f"{prefix}.{short}.weight": random(*shape) for short, shape in SHAPES.items()}
    width = {"mlp": 2, "wide_mlp": 4}.get(head, 0) * DIM
    routers = {"expert": ["router.0", "router.1", "router.2"], "token": ["token_router"]}.get(kind, [])
    if mor.get("expert", {}).get("sampling") == "aux_router":
        routers += [f"aux_{name}" for name in routers]
    for name in routers:
        outputs = 3 if kind == "token" else 1
        if width:
            weights |= {f"{name}.fc1.weight": random(width, DIM), f"{name}.fc2.weight": random(outputs, width)}
        else:
            weights[f"{name}.weight"] = random(outputs, DIM)
    settings = {
        "model_config": {"num_attention_heads": 4, "rope_theta": "5e4"},
        "max_length": 20,
        "recursive": {"enable": True, "num_recursion": 3, "sharing": "middle_cycle", "ln_share": True},
        "kv_sharing": {"enable": False, "num_recursion": None, "sharing": None},
        "mor": {"enable": kind != "recursive", "type": kind, "router_type": head, **mor},
    }
    return official_layout(weights, kind, "middle_cycle", 3), settings


@pytest.mark.parametrize("ln_share", [True, False])
def test_a_recursive_model_equals_itself_unrolled(ln_share: bool) -> None:
    state, settings = small_run("recursive")
    if not ln_share:
        generator = torch.Generator().manual_seed(1)
        for name in sorted(state):
            if "layernorm" in name:
                state[name] = torch.rand(DIM, generator=generator)
    settings["recursive"]["ln_share"] = ln_share
    inputs, logits = torch.arange(20).unsqueeze(0), []
    for enabled in (True, False):
        settings["recursive"]["enable"] = enabled
        imported = import_official(state, settings)
        model = build_model(imported.config)
        model.load_state_dict(imported.weights)
        with torch.no_grad():
            logits.append(model(inputs, mode="causal").logits)
        assert (model.stage is not None) == enabled
    torch.testing.assert_close(*logits)


def test_the_backbone_comes_from_weights_and_model_config() -> None:
    config = import_official(*small_run()).config
    model = config.model
    assert (model.vocab_size, model.dim, model.num_layers, model.ffn_dim) == (VOCAB, DIM, 8, 24)
    assert (model.num_heads, model.num_kv_heads, model.rope_theta, model.max_seq_len) == (4, 2, 5e4, 20)
    assert (config.recursion.num_recursions, config.recursion.sharing) == (3, "middle_cycle")


def test_the_heads_of_a_published_backbone_are_known() -> None:
    state, settings = small_run()
    del settings["model_config"]
    with pytest.raises(ConfigError, match=r"number of attention heads.*num_attention_heads"):
        import_official(state, settings)
    with pytest.raises(ConfigError, match="15"):  # SmolLM-360M has 15 heads, which width 16 can't be split into
        import_official(state, {**settings, "model_name_or_path": "HuggingFaceTB/SmolLM-360M"})


@pytest.mark.parametrize(("head", "expected"), [("linear", "linear"), ("mlp", "mlp"), ("wide_mlp", "wide_mlp")])
@pytest.mark.parametrize("kind", ["expert", "token"])
def test_router_heads(kind: str, head: str, expected: str) -> None:
    state, settings = small_run(kind, head)
    imported = import_official(state, settings)
    assert imported.config.router.head == expected
    build_model(imported.config).load_state_dict(imported.weights)


def test_a_wide_mlp_as_narrow_as_an_mlp_becomes_one() -> None:
    state, settings = small_run(head="mlp")
    settings["mor"]["router_type"] = "wide_mlp"
    assert import_official(state, settings).config.router.head == "mlp"


def test_without_a_function_alpha_is_not_applied() -> None:
    state, settings = small_run(expert={"router_func": None, "alpha": 0.1})
    router = import_official(state, settings).config.router
    assert (router.activation, router.alpha) == ("none", 1.0)


def test_auxiliary_routers_are_taken_over() -> None:
    state, settings = small_run(temp=2.0, expert={"sampling": "aux_router"})
    weights = import_official(state, settings).weights
    assert torch.equal(weights["stage.router.aux_router.1.weight"], state["model.layers.2.mlp_router.router.weight"])
    assert torch.equal(weights["stage.router.heads.1.weight"], state["model.layers.2.mor_router.router.weight"])


QUERY = "model.layers.{}.block.1.self_attn.q_proj.weight"


def untied_run() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An expert-choice model whose second recursion has its own attention weights."""
    state, settings = small_run()
    state[QUERY.format(2)] = state[QUERY.format(2)] + 3
    return state, settings


def test_untied_attention_is_refused_with_the_reason() -> None:
    with pytest.raises(
        CheckpointError, match=r"un-tied: model\.layers\.1\.block\.1\.self_attn\.q_proj.*167M.*--untied first"
    ):
        import_official(*untied_run())


@pytest.mark.parametrize(("untied", "shift"), [("first", 0.0), ("mean", 1.0)])
def test_untied_attention_on_request(untied: Any, shift: float) -> None:
    state, settings = untied_run()
    imported = import_official(state, settings, untied=untied)
    assert imported.untied == ("stage.blocks.1.attention.q_proj.weight",)
    torch.testing.assert_close(imported.weights[imported.untied[0]], state[QUERY.format(1)] + shift)


def test_other_weights_must_be_tied_even_then() -> None:
    state, settings = small_run()
    key = "model.layers.3.block.0.mlp.up_proj.weight"
    state[key] = state[key] + 1
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.block\.0\.mlp\.up_proj\.weight differ"):
        import_official(state, settings, untied="mean")


def test_a_head_of_its_own_is_imported() -> None:
    state, settings = small_run("recursive")
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    imported = import_official(state, settings)
    assert torch.equal(imported.weights["head.weight"], imported.weights["embed.weight"] + 1)
    build_model(imported.config).load_state_dict(imported.weights)
    del state["lm_head.weight"]  # dropped if a tied head is stored once
    assert "head.weight" not in import_official(state, settings).weights


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (
            "model.layers.2.block.1.mlp.gate_proj.weight",
            r"model\.layers\.2\.block\.1\.mlp\.gate_proj\.weight is missing",
        ),
        ("model.layers.3.mor_router.router.weight", r"mor_router\.router\.weight is missing"),
        ("model.embed_tokens.weight", "not a state dict of the released code"),
    ],
)
def test_a_missing_weight_is_named(key: str, match: str) -> None:
    state, settings = small_run()
    del state[key]
    with pytest.raises(CheckpointError, match=match):
        import_official(state, settings)


def test_an_unexpected_weight_is_named() -> None:
    state, settings = small_run()
    state["model.layers.1.block.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # a buffer of older transformers
    import_official(state, settings)
    state["model.layers.1.mlp_router.router.weight"] = torch.ones(1, DIM)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp_router\.router\.weight is not in the model"):
        import_official(state, settings)


def test_a_weight_of_another_shape_is_named() -> None:
    state, settings = small_run()
    state["model.layers.4.self_attn.v_proj.weight"] = torch.ones(16, DIM)
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.self_attn\.v_proj\.weight has shape \(16, 16\)"):
        import_official(state, settings)


@pytest.mark.parametrize(
    ("section", "changes", "match"),
    [
        ("relaxation", {"enable": True}, r"relaxation\.enable"),
        ("recursive", {"enable": True, "num_recursion": 3, "sharing": "sequence", "ln_share": False}, "ln_share"),
        ("recursive", {"enable": True, "num_recursion": 3, "sharing": "middle_sequence"}, "middle_sequence"),
        ("recursive", {"enable": False}, r"mor\.enable"),
        ("mor", {"enable": True, "type": "expert", "rand_router": True}, r"mor\.rand_router"),
        ("mor", {"enable": True, "type": "layer"}, r"mor\.type = layer"),
        ("mor", {"enable": True, "type": "expert", "router_type": "mlp"}, r"mor\.router_type"),
        ("mor", {"enable": True, "type": "expert", "temp": "warm"}, r"mor\.temp = 'warm'"),
        ("mor", {"enable": True, "type": "expert", "capacity": "1,0.5"}, "capacity"),
        ("kv_sharing", {"enable": True, "num_recursion": 2}, r"kv_sharing\.num_recursion = 2"),
        ("model_config", {"num_attention_heads": 4, "hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_settings_without_a_counterpart_are_named(section: str, changes: dict[str, Any], match: str) -> None:
    state, settings = small_run()
    with pytest.raises(ConfigError, match=match):
        import_official(state, {**settings, section: changes})


def test_the_tool_writes_a_checkpoint_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, settings = untied_run()
    backbone = settings.pop("model_config")
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "config.json").write_text(json.dumps(backbone))
    arguments = ["--state-dict", str(tmp_path), "--config", str(tmp_path / "run.yaml")]
    arguments += ["--model-config", str(tmp_path / "config.json"), "--output", str(tmp_path / "out")]
    assert "CheckpointError: attention is un-tied" in refusal(capsys, tool.main, *arguments)
    tool.main([*arguments, "--untied", "first"])
    loaded = load_model(tmp_path / "out", "cpu")
    expected = import_official(state, {**settings, "model_config": backbone}, untied="first")
    assert loaded.config == expected.config
    torch.testing.assert_close(dict(loaded.model.state_dict()), expected.weights, rtol=0, atol=0)
    assert "not an empty directory" in refusal(capsys, tool.main, *arguments, "--untied", "first")


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    (tmp_path / "c.bin").write_bytes(b"nothing")
    for name in ("a.pt", "b.safetensors", "c.bin", "absent.bin", "."):
        with pytest.raises(CheckpointError):
            read_state_dict(tmp_path / name)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        save_imported(import_official(*small_run()), tmp_path / "out", tmp_path / "no.json")
