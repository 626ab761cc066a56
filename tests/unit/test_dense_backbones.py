"""The settings that dense families need, compared with transformers and by hand, and in the models' batteries."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamor.config import Config, ModelConfig, config_from_dict
from megamor.config.derive import derive
from megamor.config.schema import RopeScalingConfig
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.model import Transformer, build_model
from megamor.model.blocks import rotary_angles
from megamor.model.flops import executed_flops
from megamor.optim import build_param_groups
from megamor.plan.memory import step_memory
from megamor.serve.options import POLICIES
from tests.causality.test_causality import CUT, change_future, logits, modes
from tests.causality.test_documents import check as check_documents
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens, vanilla_config
from tests.decoding.test_cached_decoding import check as check_decoding
from tests.serve.test_equality import Schedule, expected
from tests.serve.test_equality import check as check_serving
from tests.unit.test_memory_model import assert_close, measured_peak, step_config
from tests.unit.test_model import gradients

SCALING = RopeScalingConfig(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
GEMMA: dict[str, Any] = {"ffn_activation": "gelu_tanh", "scale_embedding": True, "sandwich_norms": True}
OPTIONS: dict[str, Any] = {
    **GEMMA,
    "tied_head": False,
    "head_width": 12,
    "qk_norm": True,
    "rope_scaling": SCALING,
}
"""All options together."""


def with_options(config: Config, **options: Any) -> Config:
    return replace(config, model=replace(config.model, **(options or OPTIONS)))


def shaken(model: Transformer) -> Transformer:
    """Give norms values that differ from their initial ones, each its own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "router" not in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "ffn": "mlp",
    "embed": "model.embed_tokens",
    "prelude": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
}
GEMMA_NAMES = {"attention_out_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
GEMMA_NAMES |= {"ffn_out_norm": "post_feedforward_layernorm"}


def family(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny random model of transformers, and the settings of ours that it corresponds to."""
    import transformers

    common: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 12}
    if name == "llama":
        rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        config: Any = transformers.LlamaConfig(**common, rope_parameters=rope, tie_word_embeddings=False)
        settings = {"rope_scaling": SCALING, "rope_theta": 500.0, "tied_head": False, "norm_eps": 1e-6}
        return transformers.LlamaForCausalLM(config), settings
    if name == "qwen3":
        config = transformers.Qwen3Config(**common, tie_word_embeddings=True, rope_parameters={"rope_theta": 500.0})
        return transformers.Qwen3ForCausalLM(config), {"qk_norm": True, "rope_theta": 500.0, "norm_eps": 1e-6}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1000.0}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 100.0}
    own = {"layer_types": types, "rope_parameters": rope, "sliding_window": 8, "query_pre_attn_scalar": 20}
    config = transformers.Gemma3TextConfig(**common, **own)
    settings = {**GEMMA, "qk_norm": True, "rope_theta": 1000.0, "norm_eps": 1e-6}
    return transformers.Gemma3ForCausalLM(config), settings


def renamed(name: str, gemma: bool) -> str:
    """The name in transformers of one of our parameters."""
    names = {**NAMES, **GEMMA_NAMES} if gemma else NAMES
    return ".".join(names.get(part, part) for part in name.split("."))


def corresponding(name: str) -> tuple[Any, Transformer]:
    """A tiny random model of transformers, and ours with its weights."""
    theirs, settings = family(name)
    shaken(theirs)
    shape = {"dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "head_width": 12, "max_seq_len": 64}
    config = with_options(vanilla_config(3), **shape, **settings)
    ours, stored = build_model(config), theirs.state_dict()
    with torch.no_grad():
        for own, parameter in ours.named_parameters():
            value = stored[renamed(own, name == "gemma3")]
            if name == "gemma3" and "norm" in own:
                value = (value + 1) * (math.sqrt(12 / 20) if "q_norm" in own else 1)
            parameter.copy_(value)
    return theirs.eval(), ours


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_are_those_of_transformers(name: str) -> None:
    theirs, ours = corresponding(name)
    ids = tokens(length=40)
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids, mode="causal").logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_rope_scaling_by_hand() -> None:
    """Frequencies of few turns in the old context are divided, of many kept, and between the two interpolated."""
    shape = ModelConfig(head_width=8, rope_theta=1e4, rope_scaling=RopeScalingConfig(8.0, 1.0, 4.0, 64))
    found = rotary_angles(torch.tensor([1]), shape, torch.float64)
    angles = torch.atan2(found.signed_sin[0, 0, 4:], found.cos[0, 0, 4:])
    # Of the frequencies 1, 0.1, 0.01 and 0.001, the second makes 64 · 0.1 / 2π = 1.0186 turns.
    kept = (6.4 / (2 * math.pi) - 1) / 3
    wanted = [1.0, 0.1 * (kept + (1 - kept) / 8), 0.01 / 8, 0.001 / 8]
    torch.testing.assert_close(angles, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("router", ["vanilla", "expert_choice"])
def test_parameters_are_those_that_the_formula_says(router: str) -> None:
    base = vanilla_config() if router == "vanilla" else tiny_config(ROUTERS[router])
    recursion: Any = {} if router == "vanilla" else {"separate_norms": True, "lora_rank": 2}
    config = with_options(replace(base, recursion=replace(base.recursion, **recursion)))
    model = build_model(config)
    assert model.num_parameters() == derive(config, 1).unique_parameters_with_embedding
    assert model.head_weight is model.head.weight
    assert model.head.weight.shape == (97, 32)
    if router != "vanilla":
        assert {"attention_out_norm.others.1", "ffn_out_norm.others.1"} <= {*model.stage.blocks[0].state_dict()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sandwich", [True, False])
def test_the_first_loss_is_that_of_a_uniform_guess(tied: bool, sandwich: bool) -> None:
    config = with_options(vanilla_config(2), **{**GEMMA, "tied_head": tied, "sandwich_norms": sandwich, "dim": 512})
    ids = tokens(length=SEQ_LEN + 1)
    model = build_model(config)
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:]).loss_sum / ids[:, 1:].numel()
        assert model.embedded(ids[0]).std().item() == pytest.approx(config.model.init_std, rel=0.05)
    assert loss.item() == pytest.approx(math.log(97), abs=0.3)


def test_groups_of_the_optimizer() -> None:
    """A head of its own is treated as the embedding is: by AdamW, with weight decay."""
    model = build_model(with_options(tiny_config(ROUTERS["expert_choice"])))
    for kind in ("adamw", "muon"):
        groups = build_param_groups(model, replace(model.config.optim, kind=kind))  # type: ignore[arg-type]
        (group,) = [g for g in groups if any(p is model.head.weight for p in g["params"])]
        assert any(parameter is model.embed.weight for parameter in group["params"])
        assert not group["muon"]
        assert group["weight_decay"] == model.config.optim.weight_decay


CASES = [
    ("vanilla", ""),
    ("expert_choice", "recursion_wise"),
    ("ema_threshold", "hybrid"),
    ("expert_choice", "halted_reuse"),
    ("ema_threshold", "share_first"),
]
ALL_CASES = [(router, policy) for router in ("expert_choice", "ema_threshold") for policy in KV_POLICIES]
SLOW = [
    pytest.param(*case, sharing, marks=pytest.mark.slow)
    for sharing in ("middle_cycle", "sequence", "stages")
    for case in ALL_CASES
    if sharing != "middle_cycle" or case not in CASES
]
BATTERIES = [*((*case, "middle_cycle") for case in CASES), *SLOW]


def config_of(router: str, kv_policy: str, sharing: str) -> Config:
    base = vanilla_config() if router == "vanilla" else tiny_config(ROUTERS[router], kv_policy, sharing)
    return with_options(base)


@pytest.mark.parametrize(("router", "kv_policy", "sharing"), BATTERIES)
def test_batteries(router: str, kv_policy: str, sharing: str) -> None:
    """Causal, with documents too; packed documents equal documents alone; decoding equals the full pass."""
    config, ids = config_of(router, kv_policy, sharing), tokens()
    model = shaken(lively_model(config))
    for documents in (None, (torch.arange(SEQ_LEN) // 9).expand_as(ids)):
        for mode in modes(model):
            before, after = (logits(model, x, mode, documents) for x in (ids, change_future(ids)))
            torch.testing.assert_close(after[:, :CUT], before[:, :CUT], atol=1e-12, rtol=0)
            assert (after[:, CUT:] - before[:, CUT:]).abs().max() > 1e-3
    check_documents(config)
    check_decoding(model, [10] + [1] * (SEQ_LEN - 10))
    check_decoding(shaken(lively_model(config, dtype=torch.float32)), [5, 1, 7, 11])


@pytest.mark.parametrize(("router", "kv_policy", "sharing"), BATTERIES)
def test_checkpointing(router: str, kv_policy: str, sharing: str) -> None:
    model, ids = build_model(config_of(router, kv_policy, sharing)), tokens(length=SEQ_LEN + 1)
    plain = gradients(model, ids, "none")
    for mode in ("recursion", "block", "selective"):
        again = gradients(model, ids, mode)
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("router", ["vanilla", "expert_choice"])
def test_padding_has_no_influence(router: str) -> None:
    model, ids = shaken(lively_model(config_of(router, "recursion_wise", "middle_cycle"))), tokens()
    lengths = (24, 9, 17)
    with torch.no_grad():
        padded = model(ids, mode="causal", lengths=lengths).logits
        for number, length in enumerate(lengths):
            alone = model(ids[number : number + 1, :length], mode="causal").logits
            torch.testing.assert_close(padded[number : number + 1, :length], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("router", ["expert_choice", "ema_threshold"])
def test_serving(router: str) -> None:
    model = shaken(lively_model(with_options(tiny_config(ROUTERS[router]))))
    wanted = expected(model)
    for policy in POLICIES:
        check_serving(model, Schedule(policy, page_size=3, chunk_size=4), wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["none", "block", "recursion", "selective sdpa mm", "selective silu"])
def test_the_plan_knows_the_memory(policy: str, precision: str) -> None:
    config = with_options(step_config("wide", "expert_choice", policy, precision), **{**OPTIONS, "head_width": 48})
    assert_close(step_memory(config, 1, on_gpu=False), measured_peak(config))


def test_flops_are_those_of_the_profiler() -> None:
    config, ids = with_options(tiny_config(ROUTERS["fixed"])), tokens(length=SEQ_LEN + 1)
    model = build_model(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(ids[:, :-1], ids[:, 1:])
        out.loss_sum.backward()
    flops = executed_flops(config, BATCH, out.work.tolist())
    # The profiler counts all pairs, ours those that aren't masked.
    square = 3 * 8 * BATCH * (SEQ_LEN**2 - SEQ_LEN * (SEQ_LEN + 1) / 2) * 4 * 4 * 12
    assert counter.get_total_flops() == pytest.approx(flops.training + square, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"head_width": 7}, "use head_width 6 or 8"),
        ({"rope_scaling": {"factor": 2, "low_freq_factor": 4}}, "isn't below high_freq_factor"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], problem: str) -> None:
    config = config_from_dict({"model": settings, "train": {"max_steps": 10}}, "test")
    with pytest.raises(ConfigError, match=problem):
        validate(config)


def test_the_stream_need_not_be_divisible_by_the_heads() -> None:
    settings = {"dim": 90, "num_heads": 4, "num_kv_heads": 2, "head_width": 16}
    validate(config_from_dict({"model": settings, "train": {"max_steps": 100}}, "test"))
