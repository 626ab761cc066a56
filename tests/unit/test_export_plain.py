"""`export-hf --plain`: transformers' own classes compute what a model of fixed depth does; and the model card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.checkpoint import TrainerState
from megamor.config import Config, SkipForwardRecurseConfig
from megamor.config.schema import RopeScalingConfig
from megamor.errors import ConfigError
from megamor.interop.export import export_huggingface
from megamor.interop.model_card import model_card
from megamor.interop.plain import plain_export
from megamor.model import Transformer
from tests.combinations import ROUTERS, lively_model, tiny_config, tokens, vanilla_config

pytest.importorskip("transformers")

FIXED = tiny_config(ROUTERS["fixed"])
SCALING = RopeScalingConfig(factor=4.0, original_max_seq_len=8)


def with_model(config: Config, **changes: Any) -> Config:
    return replace(config, model=replace(config.model, **changes))


def with_recursion(config: Config, **changes: Any) -> Config:
    return replace(config, recursion=replace(config.recursion, **changes))


GEMMA = {"qk_norm": True, "sandwich_norms": True, "scale_embedding": True, "ffn_activation": "gelu_tanh"}
SLIDING = {"sliding_window": 3, "sliding_layers": (0, 2), "sliding_rope_theta": 50.0}
CASES: dict[str, tuple[Config, int | None, str]] = {
    "vanilla": (with_model(vanilla_config(3), tied_head=False, head_width=12), None, "LlamaForCausalLM"),
    "scaled": (with_model(vanilla_config(3), rope_scaling=SCALING), None, "LlamaForCausalLM"),
    "recursive": (
        with_recursion(FIXED, separate_norms=True, lora_rank=2, residual_scaling="inverse_sqrt", kv_policy="hybrid"),
        None,
        "LlamaForCausalLM",
    ),
    "shallow": (tiny_config(ROUTERS["fixed"], sharing="middle_sequence"), 2, "LlamaForCausalLM"),
    "fixed_2_of_3": (with_model(tiny_config(ROUTERS["fixed_2_of_3"]), qk_norm=True), None, "Qwen3ForCausalLM"),
    "forward": (tiny_config(SkipForwardRecurseConfig(hidden=16)), 2, "LlamaForCausalLM"),
    # The prelude and the second block slide, the latter in each of its recursions.
    "gemma": (
        with_model(with_recursion(FIXED, residual_scaling="inverse"), **GEMMA, **SLIDING),
        None,
        "Gemma3ForCausalLM",
    ),
}


def built(config: Config) -> Transformer:
    """A model none of whose weights are zero, in fp32."""
    model, generator = lively_model(config, dtype=torch.float32), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_plain_export_computes_the_same(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config, depth, kind = CASES[name]
    model = built(config)
    export_huggingface(model, tmp_path / "plain", plain=plain_export(model, depth))
    assert not list((tmp_path / "plain").glob("*.py"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == kind
    if depth is not None:
        model.depth_bounds = (depth, depth)
    with torch.no_grad():
        wanted, found = model(tokens(), mode="causal").logits, plain(tokens()).logits
    torch.testing.assert_close(found / wanted.abs().max(), wanted / wanted.abs().max(), atol=1e-5, rtol=0)


def test_what_a_dense_model_cannot_express_is_refused_by_name() -> None:
    cases = (
        (tiny_config(ROUTERS["expert_choice"]), 2, "router.kind = expert_choice"),
        (tiny_config(SkipForwardRecurseConfig(hidden=16)), None, "router.kind = skip_forward_recurse"),
        (with_recursion(FIXED, recursion_embedding=True), None, "recursion.recursion_embedding"),
        (with_recursion(FIXED, input_injection=True), None, "recursion.input_injection"),
        (with_recursion(FIXED, kv_policy="share_first"), None, "kv_policy = share_first"),
        (with_model(FIXED, attention="multi_scale"), None, "model.attention = multi_scale"),
        (with_model(FIXED, sandwich_norms=True), None, "model.sandwich_norms without the others of Gemma 3"),
        (FIXED, 4, "--fixed-depth 4, with 3 recursions"),
    )
    for config, depth, message in cases:
        model = lively_model(config)
        with pytest.raises(ConfigError, match=message):
            plain_export(model, depth)


def test_the_card_says_what_the_checkpoint_records(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model = lively_model(tiny_config(ROUTERS["expert_choice"]))
    origin = {"kind": "init", "source": "/home/me/runs/first/checkpoints/step_00000070", "step": 70, "sha256": "abc"}
    imported = {"kind": "import", "source": "hf:some/llama", "sha256": "def"}
    dense = {"kind": "convert-depth", "source": "/home/me/llama/step_00000000", "step": 0, "sha256": "012"}
    converted = {"kind": "init", "source": "/home/me/mor/step_00000000", "step": 0, "sha256": "345"}
    converted["started_from"] = {**dense, "started_from": imported}
    state = TrainerState(
        step=5,
        tokens_seen=12_000,
        data={},
        world_size=1,
        backend="single",
        flops=3e12,
        started_from={**origin, "started_from": converted},
        data_fingerprints={"/home/me/a/train": "f00d", "/home/me/b/train": "beef"},
        versions={"torch": "2.9.1"},
    )
    (tmp_path / "trainer.json").write_text(state.to_json())
    report = {"schema": "megamor-evaluation/1", "sets": {"val": {"data": "/home/me/val", "loss_causal": 3.25}}}
    report["tasks"] = {"results": {"sst2": {"alias": "sst2", "acc,none": 0.75}}}
    (tmp_path / "figures.json").write_text(json.dumps(report))
    options: dict[str, Any] = {"plain": False, "license": "apache-2.0", "evaluations": [tmp_path / "figures.json"]}
    text = model_card(model, "first", tmp_path, **options)
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megamor"],
        "license": "apache-2.0",
    }
    unique = sum(p.numel() for name, p in model.named_parameters() if name != "embed.weight")
    for wanted in (
        f"{unique:,} without embedding and head, {model.num_parameters():,} in all",
        "8 at full depth, 4 of them unique",
        "up to 3 recursions; router expert_choice, threshold, router above 0.5",
        "12,000 tokens in 5 steps",
        "3e+12 (executed)",
        "Data `train` | fingerprint `f00d`; fingerprint `beef`",
        "Started from `first` | init at step 70, SHA-256 `abc`",
        "Started from `mor` | init at step 0, SHA-256 `345`",
        "Started from `llama` | convert-depth at step 0, SHA-256 `012`; import, SHA-256 `def`",
        "torch 2.9.1,",  # with which it was trained
        "| val | loss_causal | 3.25 |",
        "| sst2 | acc,none | 0.75 |",
    ):
        assert wanted in text, wanted
    assert "/home" not in text
    (tmp_path / "figures.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"figures\.json is not a file of `megamor evaluate --json`"):
        model_card(model, "first", tmp_path, **options)
