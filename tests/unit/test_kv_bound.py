"""A bounded cache: what it holds, what it keeps, and that it equals the unbounded one where nothing must leave."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.data.loader import MicroBatch
from megamor.errors import ConfigError
from megamor.evaluate.kv_curve import bounded_loss, documents_of
from megamor.evaluate.sampling import cache_for, generate
from megamor.model import CacheBound, KVCache, Transformer
from megamor.model.blocks import rotary_angles
from megamor.model.kv_cache import CacheStore
from megamor.model.multi_scale import BEYOND
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens, vanilla_config
from tests.unit.test_multi_scale import multi_scale

KEEPS = ("score", "depth", "recent")
SOME = [
    ("expert_choice", "recursion_wise", "score"),
    ("token_choice", "share_first", "recent"),
    ("act_hard", "hybrid", "depth"),
    ("monotone", "halted_reuse", "score"),
]
COMBINATIONS = [
    pytest.param(*each, marks=() if each in SOME else pytest.mark.slow) for each in product(ROUTERS, KV_POLICIES, KEEPS)
]


def decode(model: Transformer, ids: Tensor, bound: CacheBound | None, chunk: int = 1) -> tuple[Tensor, KVCache]:
    cache = KVCache(model.config.model, *ids.shape, model.embed.weight.dtype, bound=bound)
    with torch.no_grad():
        logits = [model(part, mode="causal", cache=cache).logits for part in ids.split(chunk, 1)]
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("attention", ["full", "multi_scale"])
@pytest.mark.parametrize(("router", "kv_policy", "keep"), COMBINATIONS)
def test_bound(router: str, kv_policy: str, keep: Any, attention: str) -> None:
    """Equal bit for bit where everything fits; otherwise no store is larger, and sequences stay independent."""
    config = tiny_config(ROUTERS[router], kv_policy)
    model, ids = lively_model(multi_scale(config) if attention == "multi_scale" else config), tokens()
    want, unbounded = decode(model, ids, None)
    got, cache = decode(model, ids, CacheBound(SEQ_LEN, keep))
    assert torch.equal(got, want)
    assert torch.equal(cache.bytes_held(), unbounded.bytes_held())
    bound = CacheBound(10, keep, sinks=2, recent=4)
    got, cache = decode(model, ids, bound)
    assert (got - want).abs().max() > 1e-3
    for key, store in cache.stores.items():
        assert store.k.shape[1] == store.v.shape[1] == store.order.shape[1] == 10
        lengths = unbounded.stores[key].lengths
        # Where every token takes the first recursion, share_first stores all tokens, whatever else changes.
        takes_first = not router.startswith(("skip_forward", "monotone"))
        if (kv_policy == "share_first" and takes_first) or key[0] in ("prelude", "coda"):
            assert torch.equal(store.lengths, lengths.clamp_max(10))
    alone, _ = decode(model, ids[1:2], bound)
    torch.testing.assert_close(got[1:2], alone, atol=1e-10, rtol=0)


def held(store: CacheStore) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(store.order, store.lengths.tolist(), strict=True)]


def store_of(order: list[list[int]], score: list[list[float]]) -> CacheStore:
    """A store of capacity 8 whose keys are the positions themselves."""
    lengths = torch.tensor([len(row) for row in order])
    padded = torch.tensor([row + [BEYOND] * (8 - len(row)) for row in order])
    scores = torch.tensor([row + [0.0] * (8 - len(row)) for row in score])
    values = padded.clamp_max(99).float()[..., None, None]
    return CacheStore(values, -values, padded, lengths, scores)


ORDER = [[0, 2, 3, 5, 7, 8, 10, 11], [1, 4, 6]]
SCORE = [[9.0, 1.0, 5.0, 2.0, 4.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
DEPTHS = torch.tensor([[1, 1, 3, 1, 1, 2, 1, 3, 2, 1, 1, 1]] * 2)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("score", [0, 3, 7, 8, 10, 11]), ("depth", [0, 2, 7, 8, 10, 11]), ("recent", [0, 5, 7, 8, 10, 11])],
)
def test_what_stays(keep: Any, kept: list[int]) -> None:
    """One sink and two newest, then three by the rule; a sequence with room loses nothing."""
    store = store_of(ORDER, SCORE)
    store.evict(CacheBound(8, keep, sinks=1, recent=2), torch.tensor([2, 1]), DEPTHS)
    assert held(store) == [kept, [1, 4, 6]]
    assert store.k[0, :6, 0, 0].tolist() == kept
    assert store.v[0, :6, 0, 0].tolist() == [-position for position in kept]
    assert store.score[0, :6].tolist() == [SCORE[0][ORDER[0].index(position)] for position in kept]
    assert (store.order[0, 6:] == BEYOND).all()


def test_scores_are_the_attention_received() -> None:
    """Of a one-layer model, recomputed from its projections."""
    config = vanilla_config(num_layers=1)
    model, ids = lively_model(config), tokens()
    _, cache = decode(model, ids, CacheBound(SEQ_LEN, "score"), chunk=1)
    (store,) = cache.stores.values()
    block = model.prelude[0]
    with torch.no_grad():
        normed = block.attention_norm(model.embed(ids))
        q, k = (block.attention.heads(p(normed)) for p in (block.attention.q_proj, block.attention.k_proj))
        angles = rotary_angles(torch.arange(SEQ_LEN), config.model, q.dtype)
        q, k = (torch.stack([angles.rotate(row) for row in x]).transpose(1, 2) for x in (q, k))
        scores = q @ k.repeat_interleave(2, 1).mT / config.model.head_dim**0.5
        future = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
        want = scores.masked_fill(future, -torch.inf).softmax(-1).sum((1, 2))
    torch.testing.assert_close(store.score, want.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(store.score.sum(1), torch.full((BATCH,), float(SEQ_LEN * config.model.num_heads)))


def test_scores_of_means_go_to_their_members() -> None:
    """All attention is accounted for, whichever keys are seen as means."""
    config = multi_scale(vanilla_config(num_layers=1))
    _, cache = decode(lively_model(config), tokens(), CacheBound(SEQ_LEN, "score"), chunk=5)
    (store,) = cache.stores.values()
    torch.testing.assert_close(store.score.sum(1), torch.full((BATCH,), float(SEQ_LEN * config.model.num_heads)))


def test_a_recent_cache_is_a_window_with_sinks() -> None:
    """With one layer, decoding equals attention to the sinks and the newest tokens alone."""
    config = vanilla_config(num_layers=1)
    model, ids = lively_model(config), tokens()
    got, _ = decode(model, ids, CacheBound(8, "recent", sinks=2, recent=5))
    with torch.no_grad():
        for position in (12, SEQ_LEN - 1):
            visible = [0, 1, *range(position - 5, position + 1)]
            layout_order = torch.tensor(visible)
            cache = KVCache(config.model, BATCH, SEQ_LEN, torch.float64)
            # Positions stay those of the sequence: an unbounded cache from which the other entries are removed.
            model(ids[:, :position], mode="causal", cache=cache)
            (store,) = cache.stores.values()
            hidden = [i for i in range(position) if i not in layout_order.tolist()]
            store.order[:, hidden] = BEYOND
            want = model(ids[:, position : position + 1], mode="causal", cache=cache).logits
            torch.testing.assert_close(got[:, position : position + 1], want, atol=1e-10, rtol=0)


def batch_of_documents() -> MicroBatch:
    documents = torch.tensor([[0] * 10 + [1] * 14, [0] * 24, [0] + [1] * 11 + [2] * 12])
    labels = tokens(1)
    labels[:, 3] = -100
    return MicroBatch(tokens(), labels, documents, torch.tensor([24, 24, 17]))


@pytest.mark.parametrize("attention", ["full", "multi_scale"])
def test_curve_without_a_bound_is_the_loss_of_evaluation(attention: str) -> None:
    config = tiny_config(ROUTERS["expert_choice"])
    model, batch = lively_model(multi_scale(config) if attention == "multi_scale" else config), batch_of_documents()
    with torch.no_grad():
        out = model(**batch.arguments(torch.device("cpu")), mode="causal")
    for bound in (None, CacheBound(40), CacheBound(25, "recent")):
        found = bounded_loss(model, [batch, batch], bound)
        assert found["loss"] == pytest.approx(out.loss_sum.item() / out.num_tokens.item(), rel=1e-6)
        assert found["kv_bytes"] == pytest.approx(bytes_of(model, batch), rel=1e-12)
    tight = bounded_loss(model, [batch], CacheBound(9))
    assert tight["kv_bytes"] < found["kv_bytes"]
    assert tight["loss"] != pytest.approx(found["loss"], rel=1e-6)


def bytes_of(model: Transformer, batch: MicroBatch) -> float:
    """Keys and values of a document in all applications, in the mean, from the depths of its tokens."""
    rows = [row[:1] for row in documents_of(batch)]
    assert [row.shape[1] for row in rows] == [10, 14, 24, 1, 11, 5]
    with torch.no_grad():
        entries = sum(2 * row.numel() + 2 * int(model(row, mode="causal").depth.sum()) for row in rows)
    return entries * 2 * 2 * 8 * 8 / len(rows)


def test_generate_with_a_bound() -> None:
    model = lively_model(replace(tiny_config(ROUTERS["expert_choice"])))
    prompt = tokens()[0, :9].tolist()
    free, wide, tight = (
        generate(model, prompt, 15, temperature=0, bound=bound)
        for bound in (None, CacheBound(24), CacheBound(8, sinks=1))
    )
    assert wide == free
    assert tight.prompt_length == 9
    assert len(tight.depths) == len(tight.ids) - 1 == 23
    assert tight.ids != free.ids


@pytest.mark.parametrize("settings", [{"budget": 8, "recent": 4}, {"budget": 1}, {"budget": 64, "sinks": -1}])
def test_budgets_that_cannot_be_divided(settings: Any) -> None:
    with pytest.raises(ConfigError, match="KV budget"):
        CacheBound(**settings)


def test_depth_needs_recursion() -> None:
    with pytest.raises(ConfigError, match="use --kv-keep score or recent"):
        cache_for(lively_model(vanilla_config()), 1, 20, CacheBound(10, "depth", recent=2))
