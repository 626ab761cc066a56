"""No logit depends on a later token: for every router × KV policy × sharing, with and without document masks.

Routers that are causal in training are also tested under the training rule. Top-k selection is not causal; a test
checks that too, which shows that these tests can detect a dependence on later tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamor.model import Transformer
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, STRUCTURES, lively_model, tiny_config, tokens

CUT = SEQ_LEN // 2
PACKED = (torch.arange(SEQ_LEN) // 9).expand(BATCH, SEQ_LEN)


def logits(model: Transformer, ids: Tensor, mode: str, documents: Tensor | None = None) -> Tensor:
    torch.manual_seed(0)  # some routers sample
    with torch.no_grad():
        return model(ids, mode=mode, step=10**6, documents=documents).logits


def modes(model: Transformer) -> list[str]:
    causal = all(stage.router.causal_in_training for stage in model.stages.values())
    return ["causal", "train"] if causal else ["causal"]


def change_future(ids: Tensor) -> Tensor:
    changed = ids.clone()
    changed[:, CUT:] = tokens(seed=1)[:, CUT:]
    return changed


def check(model: Transformer, documents: Tensor | None) -> None:
    """Later tokens change later logits alone, by the rule of training too where that is causal."""
    for mode in modes(model):
        before, after = (logits(model, ids, mode, documents) for ids in (tokens(), change_future(tokens())))
        torch.testing.assert_close(after[:, :CUT], before[:, :CUT], atol=1e-12, rtol=0)
        assert (after[:, CUT:] - before[:, CUT:]).abs().max() > 1e-3


@pytest.mark.promise("R12")
@pytest.mark.parametrize("documents", [False, True], ids=["stream", "documents"])
@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_logits_ignore_later_tokens(router: str, kv_policy: str, sharing: str, documents: bool) -> None:
    model = lively_model(tiny_config(ROUTERS[router], kv_policy, sharing))
    check(model, PACKED if documents else None)


@pytest.mark.promise("R12")
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_logits_depend_on_earlier_tokens(router: str, kv_policy: str) -> None:
    model = lively_model(tiny_config(ROUTERS[router], kv_policy))
    ids, changed = tokens(), tokens()
    changed[:, CUT] = (changed[:, CUT] + 1) % 97
    difference = (logits(model, ids, "causal") - logits(model, changed, "causal")).abs().amax((0, 2))
    assert difference[:CUT].max() < 1e-12
    assert (difference[CUT + 1 :] > 1e-6).float().mean() > 0.9


def test_top_k_selection_does_look_ahead() -> None:
    model = lively_model(tiny_config(ROUTERS["expert_choice"]))
    ids = tokens()
    difference = logits(model, ids, "topk") - logits(model, change_future(ids), "topk")
    assert difference[:, :CUT].abs().max() > 1e-6


@pytest.mark.promise("R12")
@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_documents_do_not_see_each_other(router: str, kv_policy: str, sharing: str) -> None:
    """Changing the tokens of one document leaves the logits of the next unchanged (under causal routing rules)."""
    model = lively_model(tiny_config(ROUTERS[router], kv_policy, sharing))
    ids, changed = tokens(), tokens()
    changed[:, :CUT] = tokens(seed=2)[:, :CUT]
    documents = (torch.arange(SEQ_LEN) >= CUT).long().expand_as(ids)
    for mode in modes(model):
        before, after = (logits(model, x, mode, documents) for x in (ids, changed))
        torch.testing.assert_close(after[:, CUT:], before[:, CUT:], atol=1e-12, rtol=0)
        assert (after[:, :CUT] - before[:, :CUT]).abs().max() > 1e-3
