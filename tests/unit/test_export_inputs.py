"""What an exported model takes from transformers' users: padding, positions, embeddings, generation, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import Config
from megamor.interop.export import model_settings
from tests.combinations import (
    KV_POLICIES,
    ROUTERS,
    lively_model,
    tiny_config,
    tokens,
    vanilla_config,
)

pytest.importorskip("transformers")

LENGTHS, COLUMNS = (12, 5, 9), 12
EXPERT = tiny_config(ROUTERS["expert_choice"])
CASES: dict[str, Config] = {name: tiny_config(router) for name, router in ROUTERS.items()}
CASES |= {f"token_choice-{policy}": tiny_config(ROUTERS["token_choice"], policy) for policy in KV_POLICIES[1:]}
CASES["stages"] = tiny_config(ROUTERS["act_hard"], "hybrid", "stages")
CASES["multi_scale"] = replace(
    EXPERT, model=replace(EXPERT.model, attention="multi_scale", attention_window=4, attention_block=2)
)
CASES["vanilla"] = vanilla_config(3)


def exported(config: Config) -> Any:
    """The model of `config` as `from_pretrained` builds it."""
    from megamor.interop.modeling_megamor import MegamorConfig, MegamorForCausalLM

    options: dict[str, Any] = {**model_settings(config, torch.float32, None), "pad_token_id": 0}
    model: Any = MegamorForCausalLM(MegamorConfig(**options))
    model.model.load_state_dict(lively_model(config, dtype=torch.float32).state_dict())
    return model.eval()


def padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """The first `LENGTHS` of `ids` [3, S], padded on a side, and the mask."""
    mask = (torch.arange(COLUMNS) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    batch = torch.zeros_like(mask)
    batch[mask == 1] = torch.cat([row[:length] for row, length in zip(ids, LENGTHS, strict=True)])
    if side == "right":
        return batch, mask
    turned = [row.roll(COLUMNS - length) for row, length in zip(batch, LENGTHS, strict=True)]
    return torch.stack(turned), mask.flip(1)


def close(found: Tensor, wanted: Tensor) -> None:
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_padded_batch_equals_single_sequences(name: str) -> None:
    model, ids, more = exported(CASES[name]), tokens(), tokens(1)[:, :2]
    rows = [torch.cat((row[:length], new)) for row, length, new in zip(ids, LENGTHS, more, strict=True)]
    single = [model(row.unsqueeze(0)).logits[0] for row in rows]
    for side in ("left", "right"):
        batch, mask = padded(ids, side)
        logits = model(batch, attention_mask=mask).logits
        for found, real, wanted in zip(logits, mask == 1, single, strict=True):
            close(found[real], wanted[:-2])
            assert not found[~real].any()
    # With a cache: the prompt in chunks, of which the first has nothing of sequence 1, and two tokens one by one.
    batch, mask = padded(ids, "left")
    mask, batch = F.pad(mask, (0, 2), value=1), torch.cat((batch, more), 1)
    parts, cache = [], None
    for first, end in ((0, 4), (4, 12), (12, 13), (13, 14)):
        out = model(batch[:, first:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    for found, real, wanted in zip(torch.cat(parts, 1), mask == 1, single, strict=True):
        close(found[real], wanted)
