"""The settings that dense families need, compared with transformers and by hand, and in the models' batteries."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamor.config import Config, ModelConfig, config_from_dict
from megamor.config.derive import derive
from megamor.config.schema import RopeScalingConfig
from megamor.config.segments import segments
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.interop.dense import read_dense
from megamor.interop.export import export_huggingface
from megamor.load import load_model
from megamor.model import KVCache, build_model, layouts
from megamor.model.blocks import rotary_angles
from megamor.model.flops import executed_flops, full_work, nominal_flops
from megamor.model.layouts import Geometry
from megamor.optim import build_param_groups
from megamor.parallel import zero_config
from megamor.plan.memory import step_memory
from megamor.routing import TokenSet
from megamor.serve.options import POLICIES
from tests.causality.test_causality import PACKED
from tests.causality.test_causality import check as check_causality
from tests.causality.test_documents import check as check_documents
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens, vanilla_config
from tests.decoding.test_cached_decoding import check as check_decoding
from tests.decoding.test_cached_decoding import decode
from tests.dense_models import MODELS
from tests.distributed.harness import run_ranks
from tests.distributed.runs import StepResult, fresh_run, preload_deepspeed, relative_differences
from tests.distributed.runs import tiny as tiny_run
from tests.serve.test_equality import Schedule, expected
from tests.serve.test_equality import check as check_serving
from tests.unit.test_backbone_options import shaken
from tests.unit.test_memory_model import POLICIES as STEP_POLICIES
from tests.unit.test_memory_model import assert_close, measured_peak, step_config
from tests.unit.test_model import check_recomputation
from tests.unit.test_multi_scale import check_layouts
from tests.unit.test_padding import check_padding

SCALING = RopeScalingConfig(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
GEMMA: dict[str, Any] = {"ffn_activation": "gelu_tanh", "scale_embedding": True, "sandwich_norms": True}
OPTIONS: dict[str, Any] = {
    **GEMMA,
    "tied_head": False,
    "head_width": 12,
    "qk_norm": True,
    "rope_scaling": SCALING,
    "sliding_window": 5,
    "sliding_layers": (0, 2),
    "sliding_rope_theta": 100.0,
}
"""All options together."""


def with_options(config: Config, **options: Any) -> Config:
    return replace(config, model=replace(config.model, **(options or OPTIONS)))


def test_decoding_step_by_step_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    """tests/unit/test_interop_dense.py compares the logits of a whole pass, for every family."""
    theirs = MODELS["Gemma 3 text"].build()
    theirs.save_pretrained(tmp_path)
    imported, ids = read_dense(tmp_path), tokens(length=40)
    ours = build_model(imported.config)
    ours.load_state_dict(imported.weights)
    with torch.no_grad():
        want = theirs(ids).logits
    stepwise, _, _ = decode(ours, ids, [20] + [1] * 20)
    assert (stepwise - want).abs().max() < 1e-5 * want.abs().max()


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
    config = config_of(router, kv_policy, sharing)
    model = shaken(lively_model(config))
    for documents in (None, PACKED):
        check_causality(model, documents)
    check_documents(config)
    check_decoding(model, [10] + [1] * (SEQ_LEN - 10))
    check_decoding(shaken(lively_model(config, dtype=torch.float32)), [5, 1, 7, 11])


@pytest.mark.parametrize(("router", "kv_policy", "sharing"), BATTERIES)
def test_checkpointing(router: str, kv_policy: str, sharing: str) -> None:
    check_recomputation(build_model(config_of(router, kv_policy, sharing)))


@pytest.mark.parametrize("router", ["vanilla", "expert_choice"])
def test_padding_has_no_influence(router: str) -> None:
    check_padding(shaken(lively_model(config_of(router, "recursion_wise", "middle_cycle"))))


SERVED = [
    ("ema_threshold", "recursion_wise", "middle_cycle", True),
    *(
        pytest.param(router, policy, sharing, recorded, marks=pytest.mark.slow)
        for router in ("expert_choice", "token_choice")
        for policy in ("recursion_wise", "share_first")
        for sharing in ("middle_cycle", "sequence")
        for recorded in (False, True)
    ),
    pytest.param("vanilla", "", "", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("router", "kv_policy", "sharing", "recorded"), SERVED)
def test_serving(router: str, kv_policy: str, sharing: str, recorded: bool) -> None:
    model = shaken(lively_model(config_of(router, kv_policy, sharing)))
    wanted = expected(model)
    for policy in POLICIES:
        check_serving(model, Schedule(policy, page_size=3, chunk_size=4, recorded=recorded), wanted)


MEMORY = [("expert_choice", "none", "bf16"), ("vanilla", "selective sdpa mm", "fp32")]
MEMORY_CASES = [
    pytest.param(*case, marks=() if case in MEMORY else pytest.mark.slow)
    for case in product(("vanilla", "expert_choice", "hybrid"), STEP_POLICIES, ("fp32", "bf16"))
]


@pytest.mark.parametrize(("model", "policy", "precision"), MEMORY_CASES)
def test_the_plan_knows_the_memory(model: str, policy: str, precision: str) -> None:
    sizes = {"head_width": 48, "sliding_window": 64}
    config = with_options(step_config("wide", model, policy, precision), **{**OPTIONS, **sizes})
    assert_close(step_memory(config, 1, on_gpu=False), measured_peak(config))


def test_flops_are_those_of_the_profiler() -> None:
    config, ids = with_options(tiny_config(ROUTERS["fixed"])), tokens(length=SEQ_LEN + 1)
    model = build_model(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(ids[:, :-1], ids[:, 1:])
        out.loss_sum.backward()
    flops = executed_flops(config, BATCH, out.work.tolist())
    # The profiler counts all pairs, ours those that aren't masked: in four of the eight applications, of a window of 5.
    visible = 4 * SEQ_LEN * (SEQ_LEN + 1) / 2 + 4 * (15 + 5 * (SEQ_LEN - 5))
    square = 3 * BATCH * (8 * SEQ_LEN**2 - visible) * 4 * 4 * 12
    assert counter.get_total_flops() == pytest.approx(flops.training + square, rel=0.01)
    assert flops == nominal_flops(config, BATCH)
    assert executed_flops(config, BATCH, out.work.tolist(), pairs=out.pairs.item()) == flops
    assert full_work(config, BATCH * SEQ_LEN, out.pairs.item(), SEQ_LEN) == [tuple(row) for row in out.work.tolist()]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"head_width": 7}, "use head_width 6 or 8"),
        ({"rope_scaling": {"factor": 2, "low_freq_factor": 4}}, "isn't below high_freq_factor"),
        ({"sliding_window": 8}, "give both, or neither"),
        ({"sliding_layers": [1]}, "give both, or neither"),
        ({"sliding_window": 8, "sliding_layers": [3, 30]}, r"has \[30\], beyond model.num_layers = 30"),
        ({"sliding_window": 8, "sliding_layers": [1], "attention": "multi_scale"}, "use attention: full"),
        ({"sliding_rope_theta": 1e4}, "without model.sliding_layers: leave it out"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], problem: str) -> None:
    config = config_from_dict({"model": settings, "train": {"max_steps": 10}}, "test")
    with pytest.raises(ConfigError, match=problem):
        validate(config)


def test_the_stream_need_not_be_divisible_by_the_heads() -> None:
    settings = {"dim": 90, "num_heads": 4, "num_kv_heads": 2, "head_width": 16}
    config = config_from_dict({"model": settings, "train": {"max_steps": 100}}, "test")
    validate(config)
    assert config.model.head_dim == 16


def windowed(q: Tensor, k: Tensor, v: Tensor, queries: TokenSet, keys: TokenSet, owners: Tensor) -> tuple[Tensor, int]:
    """Outputs [N, heads · head_dim] and the number of pairs, by a loop; `owners` [T] number the rows' documents."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    key_rows, outs, pairs = keys.rows(q.device), [], 0
    for row, query in zip(queries.rows(q.device).tolist(), q, strict=True):
        seen = (key_rows <= row) & (key_rows > row - WINDOW) & (owners[key_rows] == owners[row])
        scores = torch.einsum("hd,khd->hk", query, k[seen]) / query.shape[-1] ** 0.5
        outs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen]).flatten())
        pairs += int(seen.sum())
    return torch.stack(outs), pairs


WINDOW = 5
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 24, [0] + [1] * 11 + [2] * 12])


@pytest.mark.parametrize("rows_per_chunk", [3, 64])
@pytest.mark.parametrize("kind", ["whole", "documents", "padding"])
def test_windows_are_those_of_the_definition(kind: str, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tokens and for subsets, with outputs, gradients and pairs; also with the bounds that a GPU would use."""
    monkeypatch.setattr(layouts, "ROWS_PER_CHUNK", rows_per_chunk)
    monkeypatch.setattr(layouts, "KEY_MULTIPLE", 1)
    documents = DOCUMENTS if kind == "documents" else None
    lengths = (24, 9, 17) if kind == "padding" else None
    whole = Geometry.of(tokens(), with_options(vanilla_config()).model, torch.float64, documents, lengths=lengths)
    check_layouts(windowed, whole.seen_by(True), documents, several_chunks=rows_per_chunk < 64)


def test_a_window_saves_compute() -> None:
    """At 2,048 tokens and a window of 256, SDPA is given less than a third of the causal pairs, documents or not."""
    config = with_options(vanilla_config(), **{**OPTIONS, "sliding_window": 256, "max_seq_len": 2048}).model
    ids = torch.zeros(2, 2048, dtype=torch.int64)
    for documents in (None, (torch.arange(2048) // 1500).expand_as(ids)):
        geometry = Geometry.of(ids, config, torch.float32, documents).seen_by(True)
        layout = geometry.layout(geometry.everything, geometry.everything)
        given = sum(chunk.mask.shape[2] * chunk.mask.shape[3] for chunk in layout.chunks)
        assert 256 * 2048 * 0.9 < given < 2048 * 2049 / 2 / 3
    assert Geometry.of(ids[:, :256], config, torch.float32).seen_by(True).reach is None  # nothing to hide


@pytest.mark.parametrize(
    ("sharing", "layers", "wanted"),
    [
        ("none", (0, 7), {"prelude": (0, 7), "coda": ()}),
        # Layers 0, then blocks 0 and 1 three times from layer 1 on, then 7. Layer 5 is the third of block 0.
        ("middle_cycle", (0, 2, 5, 7), {"prelude": (0,), "stage": (1,), "coda": (0,)}),
        # Layers 0 to 2 are block 0, and 3 to 5 block 1.
        ("sequence", (1, 2, 3), {"prelude": (), "stage": (1,), "coda": ()}),
        # Unique blocks: stages of layer 0, of layers 2 and 3, and of layer 4.
        ("stages", (0, 3, 5), {"layers_0": (0,), "layers_1": (), "layers_2": (1,), "layers_4": (), "layers_5": (0,)}),
    ],
)
def test_blocks_slide_if_they_first_run_as_a_sliding_layer(
    sharing: str, layers: tuple[int, ...], wanted: dict[str, tuple[int, ...]]
) -> None:
    base = vanilla_config() if sharing == "none" else tiny_config(ROUTERS["fixed"], sharing=sharing)
    config = with_options(base, sliding_window=5, sliding_layers=layers)
    assert {segment.name: segment.sliding for segment in segments(config)} == wanted


def train(config: Config) -> list[StepResult]:
    """The first steps of a run in one process or two."""
    world_size = 1 if config.parallel.backend == "single" else 2
    return run_ranks(fresh_run, config, 5, world_size=world_size)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("backend", "stage"),
    [
        ("fsdp2", 2),
        pytest.param("ddp", 2, marks=pytest.mark.slow),
        *(pytest.param("deepspeed", stage, marks=pytest.mark.slow) for stage in (1, 2, 3)),
    ],
)
def test_backends_agree_with_one_process(backend: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "deepspeed":
        preload_deepspeed()
        monkeypatch.setattr(zero_config, "PERSIST_BELOW", 100)
    single = with_options(tiny_run("single", micro_batch_size=4))
    parallel = with_options(tiny_run(backend, micro_batch_size=2, zero_stage=stage))
    losses, norms = relative_differences(train(single), train(parallel))
    assert losses < 1e-6
    assert norms < 2e-6  # see tests/distributed/test_zero.py


def test_an_export_is_read_back(tmp_path: Path) -> None:
    model = shaken(lively_model(with_options(tiny_config(ROUTERS["expert_choice"])), dtype=torch.float32))
    export_huggingface(model, tmp_path)
    again = load_model(tmp_path).model
    assert again.config.model == model.config.model
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(tokens(), mode="causal").logits, model(tokens(), mode="causal").logits)


def test_prompts_of_different_lengths_are_decoded_as_if_alone() -> None:
    """A window is one of each sequence's own positions."""
    model, ids = shaken(lively_model(config_of("ema_threshold", "hybrid", "middle_cycle"))), tokens()
    lengths, steps = (10, 3, 7), 9
    prompts = torch.stack([F.pad(row[:n], (10 - n, 0)) for row, n in zip(ids, lengths, strict=True)])
    cache = KVCache(model.config.model, BATCH, SEQ_LEN, torch.float64)
    with torch.no_grad():
        columns = tuple(10 - n for n in lengths)
        found = [model(prompts, mode="causal", cache=cache, lengths=lengths, columns=columns).logits[:, -1]]
        for step in range(steps):
            following = torch.stack([row[n + step] for row, n in zip(ids, lengths, strict=True)]).unsqueeze(1)
            found.append(model(following, mode="causal", cache=cache).logits[:, -1])
        for row, n, got in zip(ids, lengths, torch.stack(found, 1), strict=True):
            alone = model(row[None, : n + steps], mode="causal").logits[0, n - 1 :]
            torch.testing.assert_close(got, alone, atol=1e-10, rtol=0)
