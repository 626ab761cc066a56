"""Prefill and one-token steps equal the full forward pass under the inference rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamor.model import KVCache, Transformer
from tests.combinations import (
    BATCH,
    KV_POLICIES,
    ROUTERS,
    SEQ_LEN,
    STRUCTURES,
    lively_model,
    tiny_config,
    tokens,
    vanilla_config,
)

PROMPT = 10
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def decode(model: Transformer, ids: Tensor, chunks: list[int]) -> tuple[Tensor, Tensor | None, KVCache]:
    """Logits and depths of `ids` fed to a cache in chunks of the given lengths."""
    dtype = model.embed.weight.dtype
    cache = KVCache(model.config.model, ids.shape[0], ids.shape[1], dtype)
    outs = []
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            outs.append(model(chunk, mode="causal", cache=cache))
    depths = None if outs[0].depth is None else torch.cat([out.depth for out in outs], 1)
    return torch.cat([out.logits for out in outs], 1), depths, cache


def check(model: Transformer, chunks: list[int]) -> KVCache:
    ids = tokens()
    with torch.no_grad():
        whole = model(ids, mode="causal")
    logits, depths, cache = decode(model, ids, chunks)
    if whole.depth is not None:
        assert torch.equal(depths, whole.depth)
    scale = whole.logits.abs().max()
    torch.testing.assert_close(logits / scale, whole.logits / scale, atol=TOLERANCE[logits.dtype], rtol=0)
    return cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_prefill_and_steps_equal_the_full_pass(router: str, kv_policy: str, sharing: str, dtype: torch.dtype) -> None:
    model = lively_model(tiny_config(ROUTERS[router], kv_policy, sharing), dtype=dtype)
    check(model, [PROMPT] + [1] * (SEQ_LEN - PROMPT))


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("chunks", [[1] * SEQ_LEN, [5, 1, 7, 11], [SEQ_LEN]], ids=["steps", "chunks", "whole"])
def test_any_division_into_chunks(kv_policy: str, chunks: list[int]) -> None:
    check(lively_model(tiny_config(ROUTERS["expert_choice"], kv_policy)), chunks)


def test_vanilla() -> None:
    check(lively_model(vanilla_config()), [PROMPT] + [1] * (SEQ_LEN - PROMPT))


def test_cache_holds_only_what_was_computed() -> None:
    """recursion_wise: one entry per token and recursion that it takes; share_first: one per token."""
    for kv_policy in ("recursion_wise", "share_first"):
        model = lively_model(tiny_config(ROUTERS["token_choice"], kv_policy))
        _, depths, cache = decode(model, tokens(), [SEQ_LEN])
        entries = sum(int(store.lengths.sum()) for store in cache.stores.values())
        unshared, num_tokens = 2 * BATCH * SEQ_LEN, BATCH * SEQ_LEN
        core = 2 * (int(depths.sum()) if kv_policy == "recursion_wise" else num_tokens)
        assert entries == unshared + core
