"""Multi-scale attention compared with a loop over the definition, and in the batteries that every model passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import Config, config_from_dict
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.model import build_model, layouts
from megamor.model.attention import AttentionLayout
from megamor.model.flops import dense_pairs, executed_flops, nominal_flops
from megamor.model.layouts import Geometry
from megamor.plan.memory import step_memory
from megamor.routing import TokenSet
from megamor.serve.engine.engine import ServingEngine
from tests.causality.test_causality import PACKED
from tests.causality.test_causality import check as check_causality
from tests.causality.test_documents import check as check_documents
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens, vanilla_config
from tests.decoding.test_cached_decoding import check as check_decoding
from tests.distributed.harness import run_ranks
from tests.distributed.runs import fresh_run, relative_differences
from tests.distributed.runs import tiny as tiny_run
from tests.unit.test_memory_model import assert_close, measured_peak, step_config
from tests.unit.test_model import check_recomputation
from tests.unit.test_padding import check_padding

WINDOW, BLOCK = 4, 2
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 24, [0] + [1] * 11 + [2] * 12])
EVERY_POLICY = [(router, policy) for router in ROUTERS for policy in KV_POLICIES]
SOME = [
    ("expert_choice", "recursion_wise"),
    ("expert_choice", "hybrid"),
    ("token_choice", "share_first"),
    ("act_hard", "recursion_wise"),
    ("skip_forward_recurse", "hybrid"),
    ("fixed", "share_first"),
    ("monotone", "halted_reuse"),
]
COMBINATIONS = [
    pytest.param(*pair, "middle_cycle", marks=() if pair in SOME else pytest.mark.slow) for pair in EVERY_POLICY
] + [pytest.param(*pair, other, marks=pytest.mark.slow) for pair in EVERY_POLICY for other in ("sequence", "stages")]


def multi_scale(config: Config, window: int = WINDOW, block: int = BLOCK) -> Config:
    settings = {"attention": "multi_scale", "attention_window": window, "attention_block": block}
    return replace(config, model=replace(config.model, **settings))


def reference(
    q: Tensor, k: Tensor, v: Tensor, queries: TokenSet, keys: TokenSet, documents: Tensor
) -> tuple[Tensor, int]:
    """Outputs [N, heads · head_dim] and the number of pairs, by a loop over queries and blocks.

    `documents` [T] are the rows' sequences and documents as one number; rows of one document are neighbours.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    key_rows, outs, pairs = keys.rows(q.device).tolist(), [], 0
    for row, query in zip(queries.rows(q.device).tolist(), q, strict=True):
        begin = int((documents == documents[row]).nonzero()[0])
        position = row - begin
        fine = max(0, position // BLOCK * BLOCK - WINDOW)
        seen = [([i], 0.0) for i, key in enumerate(key_rows) if begin + fine <= key <= row]
        for first in range(0, fine, BLOCK):
            members = [i for i, key in enumerate(key_rows) if begin + first <= key < begin + first + BLOCK]
            seen += [(members, math.log(len(members)))] if members else []
        means = [(k[m].mean(0), v[m].mean(0), weight) for m, weight in seen]
        scores = torch.stack([(query * key).sum(-1) / query.shape[-1] ** 0.5 + w for key, _, w in means])
        outs.append((scores.softmax(0).unsqueeze(-1) * torch.stack([value for _, value, _ in means])).sum(0).flatten())
        pairs += len(seen)
    return torch.stack(outs), pairs


@pytest.mark.parametrize("rows_per_chunk", [3, 64])
@pytest.mark.parametrize("kind", ["whole", "documents", "padding"])
def test_attention_is_that_of_the_definition(kind: str, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tokens and for subsets, with outputs, gradients and pairs; also with the bounds that a GPU would use."""
    monkeypatch.setattr(layouts, "ROWS_PER_CHUNK", rows_per_chunk)
    monkeypatch.setattr(layouts, "KEY_MULTIPLE", 1)
    config = multi_scale(vanilla_config()).model
    documents = DOCUMENTS if kind == "documents" else None
    lengths = (24, 9, 17) if kind == "padding" else None
    geometry = Geometry.of(tokens(), config, torch.float64, documents, lengths=lengths)
    check_layouts(reference, geometry, documents, several_chunks=rows_per_chunk < 64)


def check_layouts(
    reference: Callable[..., tuple[Tensor, int]], geometry: Geometry, documents: Tensor | None, several_chunks: bool
) -> None:
    """Outputs, gradients and pairs of the layouts of `geometry` are those of `reference`, a loop over the definition,
    for all tokens and for subsets, also with the bounds that a GPU would use."""
    everything, generator = geometry.everything, torch.Generator().manual_seed(3)
    owners = everything.sequences(torch.device("cpu")) * 10 + (0 if documents is None else documents.flatten())
    ragged, _ = everything.where(torch.rand(len(everything), generator=generator) < 0.6)
    fewer, _ = ragged.where(torch.rand(len(ragged), generator=generator) < 0.5)
    sets = [(everything, everything), (ragged, ragged), (ragged, everything), (fewer, ragged)]
    if everything.lengths is None:
        some = everything.pick(torch.rand(BATCH, SEQ_LEN, generator=generator).topk(11).indices.sort().values)
        sets += [(some, some), (some, everything)]
    for queries, keys in sets:
        leaves = [
            torch.randn(len(s), heads, 4, dtype=torch.float64, generator=generator, requires_grad=True)
            for s, heads in ((queries, 4), (keys, 2), (keys, 2))
        ]
        want, pairs = reference(*leaves, queries, keys, owners)
        weights = torch.randn(want.shape, dtype=torch.float64, generator=generator)
        expected = torch.autograd.grad(want, leaves, weights)
        for device_bounds in (False, True):
            layout = layout_of(geometry, queries, keys, device_bounds)
            got = layout.attend(*leaves)
            torch.testing.assert_close(got, want)
            for ours, theirs in zip(torch.autograd.grad(got, leaves, weights), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
        assert geometry.visible_pairs(queries, keys).item() == pairs
        assert len(layout.chunks) > 1 or not several_chunks


def layout_of(geometry: Geometry, queries: TokenSet, keys: TokenSet, device_bounds: bool) -> AttentionLayout:
    """The layout on a CPU; with `device_bounds` its chunks are those of a device that the host doesn't read."""
    if not device_bounds:
        return geometry.layout(queries, keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "reads_freely", lambda _: False)
        return geometry.layout(queries, keys)


def test_window_over_everything_is_full_attention() -> None:
    config = tiny_config(ROUTERS["expert_choice"])
    full, wide = (lively_model(c)(tokens()).logits for c in (config, multi_scale(config, SEQ_LEN)))
    torch.testing.assert_close(wide, full)
    assert (lively_model(multi_scale(config))(tokens()).logits - full).abs().max() > 1e-3


def test_equal_keys_in_a_block_give_full_attention() -> None:
    """Why a mean of n keys weighs as much as n."""
    geometry = Geometry.of(tokens(batch=1), multi_scale(vanilla_config()).model, torch.float64)
    every = geometry.everything
    q = torch.randn(SEQ_LEN, 2, 4, dtype=torch.float64)
    k, v = (torch.randn(SEQ_LEN // BLOCK, 2, 4, dtype=torch.float64).repeat_interleave(BLOCK, 0) for _ in range(2))
    want = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
    torch.testing.assert_close(geometry.layout(every, every).attend(q, k, v), want.flatten(1))


@pytest.mark.parametrize(("router", "kv_policy", "sharing"), COMBINATIONS)
def test_batteries(router: str, kv_policy: str, sharing: str) -> None:
    """Causal, with documents too; packed documents equal documents alone; decoding equals the full pass."""
    config = multi_scale(tiny_config(ROUTERS[router], kv_policy, sharing))
    model = lively_model(config)
    for documents in (None, PACKED):
        check_causality(model, documents)
    check_documents(config)
    check_decoding(model, [10] + [1] * (SEQ_LEN - 10))
    check_decoding(model, [5, 1, 7, 11])


@pytest.mark.parametrize(("router", "kv_policy", "sharing"), COMBINATIONS)
def test_checkpointing(router: str, kv_policy: str, sharing: str) -> None:
    check_recomputation(build_model(multi_scale(tiny_config(ROUTERS[router], kv_policy, sharing))))


def test_vanilla() -> None:
    config = multi_scale(vanilla_config())
    check_documents(config)
    model = lively_model(config)
    check_decoding(model, [10] + [1] * (SEQ_LEN - 10))
    check_causality(model, None)


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_padding_has_no_influence(router: str) -> None:
    check_padding(lively_model(multi_scale(tiny_config(ROUTERS[router]))))


def test_flops_count_fine_and_coarse_pairs() -> None:
    config = multi_scale(vanilla_config())
    by_hand = 0
    for position in range(SEQ_LEN):
        fine = max(0, position // BLOCK * BLOCK - WINDOW)
        by_hand += position - fine + 1 + fine // BLOCK
    assert dense_pairs(config.model, SEQ_LEN) == by_hand
    out = build_model(config)(tokens(), tokens())
    assert out.pairs.item() == BATCH * by_hand
    assert executed_flops(config, BATCH, [], pairs=BATCH * by_hand) == nominal_flops(config, BATCH)
    fixed = multi_scale(tiny_config(ROUTERS["fixed"]))
    out = build_model(fixed)(tokens(), tokens())
    assert executed_flops(fixed, BATCH, out.work.tolist()) == nominal_flops(fixed, BATCH)


def test_fewer_keys_are_computed_than_in_full_attention() -> None:
    """At 2,048 tokens SDPA is given less than half of the causal pairs, documents or not."""
    config = multi_scale(vanilla_config(), window=256, block=16).model
    ids = torch.zeros(1, 2048, dtype=torch.int64)
    for documents in (None, (torch.arange(2048) // 1500).unsqueeze(0)):
        geometry = Geometry.of(ids, replace(config, max_seq_len=2048), torch.float32, documents)
        given = sum(chunk.mask.numel() for chunk in geometry.layout(geometry.everything, geometry.everything).chunks)
        assert geometry.visible_pairs(geometry.everything, geometry.everything).item() < given < 2048 * 2049 / 2 / 2


@pytest.mark.parametrize(
    ("window", "problem"), [(250, "use attention_window 240 or 256"), (2048, "use a shorter window")]
)
def test_settings_that_contradict_each_other(window: int, problem: str) -> None:
    settings = {"attention": "multi_scale", "attention_window": window, "attention_block": 16}
    config = config_from_dict({"model": settings, "train": {"max_steps": 10}}, "test")
    with pytest.raises(ConfigError, match=problem):
        validate(config)


@pytest.mark.parametrize("policy", ["none", "block"])
def test_plan_estimates_the_memory_of_a_step(policy: str) -> None:
    config = multi_scale(step_config("wide", "expert_choice", policy), window=64, block=16)
    assert_close(step_memory(config, 1, on_gpu=False), measured_peak(config))


def test_serving_refuses() -> None:
    with pytest.raises(ConfigError, match=r"multi_scale can't be served.*megamor generate"):
        ServingEngine(build_model(multi_scale(vanilla_config())))


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_backends_agree_with_one_process(backend: str) -> None:
    single = multi_scale(tiny_run("single", micro_batch_size=4))
    sharded = multi_scale(tiny_run(backend, micro_batch_size=2))
    (want,) = run_ranks(fresh_run, single, 5, world_size=1)
    for got in run_ranks(fresh_run, sharded, 5, world_size=2):
        assert max(relative_differences(want, got)) < 1e-6
