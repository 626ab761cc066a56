"""The count of visible query-key pairs compared with a loop over all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamor.model.flops import executed_flops, nominal_flops
from megamor.model.layouts import Geometry
from megamor.routing import TokenSet
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens, vanilla_config

LENGTHS = ((24,), (5, 1, 11, 7), (3, 20, 1))
"""Document lengths of each sequence."""


def documents() -> Tensor:
    """Ids [B, S]."""
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS]
    return torch.stack(ids)


def by_hand(queries: TokenSet, keys: TokenSet, kept_apart: Tensor | None) -> int:
    """Count by checking every pair."""
    device = torch.device("cpu")
    flat = torch.zeros(BATCH * SEQ_LEN, dtype=torch.int64) if kept_apart is None else kept_apart.flatten()
    return sum(
        query // SEQ_LEN == key // SEQ_LEN and key <= query and bool(flat[query] == flat[key])
        for query in queries.rows(device).tolist()
        for key in keys.rows(device).tolist()
    )


@pytest.mark.parametrize("apart", [False, True])
def test_pairs_are_those_of_a_loop(apart: bool) -> None:
    ids = documents() if apart else None
    geometry = Geometry.of(tokens(), tiny_config(ROUTERS["fixed"]).model, torch.float32, ids)
    everything = TokenSet.all(BATCH, SEQ_LEN)
    generator = torch.Generator().manual_seed(3)
    some = everything.pick(torch.rand(BATCH, SEQ_LEN, generator=generator).topk(9).indices.sort().values)
    ragged, _ = everything.where(torch.rand(BATCH * SEQ_LEN, generator=generator) < 0.4)
    fewer, _ = ragged.where(torch.rand(len(ragged), generator=generator) < 0.5)
    pairs = [(s, s) for s in (everything, some, ragged, fewer)]
    pairs += [(some, everything), (ragged, everything), (fewer, ragged)]
    for queries, keys in pairs:
        assert geometry.visible_pairs(queries, keys).item() == by_hand(queries, keys, ids)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_work_of_a_step_stays_inside_documents(kv_policy: str) -> None:
    model, ids = lively_model(tiny_config(ROUTERS["expert_choice"], kv_policy)), tokens()
    apart, whole = (model(ids, ids, documents=kept) for kept in (documents(), None))
    assert apart.pairs.item() == sum(n * (n + 1) / 2 for row in LENGTHS for n in row)
    assert whole.pairs.item() == BATCH * SEQ_LEN * (SEQ_LEN + 1) / 2
    assert apart.work[0].tolist() == [BATCH * SEQ_LEN, apart.pairs.item()]
    assert (apart.work[1:, 1] < whole.work[1:, 1]).all()
    assert (apart.work[:, 0] == whole.work[:, 0]).all()


def test_executed_flops_follow_the_documents() -> None:
    config = vanilla_config()
    whole, apart = (executed_flops(config, BATCH, [], pairs=pairs) for pairs in (None, 100.0))
    assert whole == nominal_flops(config, BATCH)
    assert apart.projections == whole.projections
    assert apart.attention == config.model.num_layers * 4 * config.model.dim * 100.0
