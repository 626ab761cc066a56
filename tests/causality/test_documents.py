"""Documents packed into one sequence give the same logits as each document alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamor.config import Config
from tests.combinations import (
    KV_POLICIES,
    ROUTERS,
    SEQ_LEN,
    STRUCTURES,
    lively_model,
    tiny_config,
    tokens,
    vanilla_config,
)

LENGTHS = (5, 1, 11, 7)
assert sum(LENGTHS) == SEQ_LEN


def restarting(config: Config) -> Config:
    return replace(config, model=replace(config.model, document_positions="restart"))


def check(config: Config) -> None:
    model, ids = lively_model(restarting(config)), tokens()
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).expand_as(ids)
    with torch.no_grad():
        packed = model(ids, mode="causal", documents=documents)
        alone = [model(document, mode="causal") for document in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], 1), atol=1e-10, rtol=0)
    if packed.depth is not None:
        assert torch.equal(packed.depth, torch.cat([out.depth for out in alone], 1))


@pytest.mark.promise("R12")
@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_packed_documents_equal_documents_alone(router: str, kv_policy: str, sharing: str) -> None:
    check(tiny_config(ROUTERS[router], kv_policy, sharing))


def test_vanilla() -> None:
    check(vanilla_config())


def test_positions_continue_unless_told_to_restart() -> None:
    config, ids = vanilla_config(), tokens()
    documents = (torch.arange(SEQ_LEN) >= 9).long().expand_as(ids)
    with torch.no_grad():
        through = lively_model(config)(ids, documents=documents).logits
        anew = lively_model(restarting(config))(ids, documents=documents).logits
    torch.testing.assert_close(through[:, :9], anew[:, :9], atol=1e-12, rtol=0)
    # RoPE is relative: only distances inside a document matter, so the position of its first token doesn't.
    torch.testing.assert_close(through[:, 9:], anew[:, 9:], atol=1e-9, rtol=0)
