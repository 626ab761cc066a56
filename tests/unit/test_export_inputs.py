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
from megamor.load import load_model
from tests.combinations import KV_POLICIES, ROUTERS, lively_model, tiny_config, tokens, vanilla_config

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


@pytest.fixture(scope="module")
def model() -> Any:
    """An expert-choice model with a head of its own and scaled embeddings."""
    return exported(replace(EXPERT, model=replace(EXPERT.model, tied_head=False, scale_embedding=True)))


@torch.no_grad()
def test_uneven_prompts_generate_what_they_generate_alone(model: Any) -> None:
    ids = tokens()
    batch, mask = padded(ids, "left")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    whole: dict[str, Any] = {"attention_mask": mask, **options}
    for more in ({}, {"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        found = model.generate(batch, **whole, **more)[:, COLUMNS:]
        for row, length, new in zip(ids, LENGTHS, found, strict=True):
            alone = row[None, :length]
            options |= {"attention_mask": torch.ones_like(alone), "num_beams": more.get("num_beams", 1)}
            assert torch.equal(model.generate(alone, **options)[0, length:], new), more
    sampled = model.generate(batch, attention_mask=mask, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (6, COLUMNS + 3)
    embeds = model.get_input_embeddings()(batch)
    assert torch.equal(model.generate(inputs_embeds=embeds, **whole), model.generate(batch, **whole)[:, COLUMNS:])
    close(model(inputs_embeds=embeds, attention_mask=mask).logits, model(batch, attention_mask=mask).logits)


@torch.no_grad()
def test_a_decoding_loop_by_hand_gets_a_cache(model: Any) -> None:
    ids = tokens()[:, :8]
    out, parts = model(ids[:, :6]), []
    for column in (6, 7):
        out = model(ids[:, column : column + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    close(torch.cat(parts, 1), model(ids, use_cache=False).logits[:, 6:])
    right = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 8])
    assert model(ids, attention_mask=right).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None
    assert model.train()(ids).past_key_values is None
    model.eval()
    # `generate` continues with the cache that it returned.
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    mask = torch.ones(3, 15, dtype=torch.long)  # given, as token 0 occurs and would be taken for padding
    begun = model.generate(ids, attention_mask=mask[:, :8], max_new_tokens=3, **options)
    options |= {"past_key_values": begun.past_key_values, "attention_mask": mask[:, :11]}
    more = model.generate(begun.sequences, max_new_tokens=4, **options)
    assert torch.equal(more.sequences, model.generate(ids, attention_mask=mask[:, :8], max_new_tokens=7))


@torch.no_grad()
def test_only_the_logits_to_keep_are_computed(model: Any) -> None:
    batch, mask = padded(tokens(), "left")
    whole, seen = model(batch, attention_mask=mask).logits, []
    hook = model.model.head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    for keep, wanted in ((2, whole[:, -2:]), (torch.tensor([11, 3]), whole[:, [11, 3]]), (0, whole)):
        close(model(batch, attention_mask=mask, logits_to_keep=keep).logits, wanted)
    assert seen == [6, 6, 3 * COLUMNS]
    hook.remove()


@torch.no_grad()
def test_hidden_states_are_those_of_llama() -> None:
    """Embedding, each unshared block and each recursion; the last one after the final norm."""
    vanilla, ids = exported(CASES["vanilla"]), tokens()
    states, seen = vanilla(ids, output_hidden_states=True).hidden_states, []
    for block in vanilla.model.prelude:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0].view(3, -1, 32)))
    vanilla(ids)
    wanted = [vanilla.get_input_embeddings()(ids), *seen[:-1], vanilla.model.norm(seen[-1])]
    torch.testing.assert_close(states, tuple(wanted), rtol=0, atol=0)
    for name in ("act_hard", "expert_choice"):
        recursive = exported(CASES[name])
        out = recursive(ids, output_hidden_states=True)
        assert len(out.hidden_states) == 1 + 1 + 3 + 1  # embedding, prelude, recursions, coda
        coda = next(iter(recursive.model.coda))
        coda.register_forward_pre_hook(lambda _, args: seen.append(args[0].view(3, -1, 32)))
        recursive(ids)
        torch.testing.assert_close(out.hidden_states[-2], seen[-1], rtol=0, atol=0)
        close(out.hidden_states[-1] @ recursive.get_input_embeddings().weight.T, out.logits)


@torch.no_grad()
def test_positions_that_begin_again_are_documents(model: Any) -> None:
    ids = tokens()
    packed = torch.cat([row[:length] for row, length in zip(ids, LENGTHS, strict=True)]).unsqueeze(0)[:, :24]
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)[:, :24]
    found = model(packed, position_ids=positions).logits[0].split((12, 5, 7))
    for row, logits in zip(ids, found, strict=True):
        close(logits, model(row[None, : len(logits)]).logits[0])
    batch, mask = padded(ids, "left")
    wanted = model(batch, attention_mask=mask).logits
    follow = (mask.cumsum(1) - 1).clamp_min(0)
    for given in (follow, follow.masked_fill(mask == 0, 1), torch.arange(COLUMNS).unsqueeze(0)):
        assert torch.equal(model(batch, attention_mask=mask, position_ids=given).logits, wanted)


def test_the_loss_is_that_of_single_sequences(model: Any) -> None:
    ids = tokens()
    sums = [model(row[None, :n], labels=row[None, :n]).loss * (n - 1) for row, n in zip(ids, LENGTHS, strict=True)]
    for side in ("left", "right"):
        batch, mask = padded(ids, side)
        loss = model(batch, attention_mask=mask, labels=batch).loss
        torch.testing.assert_close(loss, sum(sums) / (sum(LENGTHS) - 3))
        counted = model(batch, attention_mask=mask, labels=batch, num_items_in_batch=torch.tensor(50)).loss
        torch.testing.assert_close(counted, sum(sums) / 50)


def test_checkpointed_gradients_are_the_same(model: Any) -> None:
    batch, mask = padded(tokens(), "left")
    found: list[list[Tensor]] = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(batch, attention_mask=mask, labels=batch).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert model.is_gradient_checkpointing is enable
        assert {block.recomputation.policy for block in model.model.stage.blocks} == {"block" if enable else "none"}
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_survives_saving(tied: bool, tmp_path: Any) -> None:
    config = replace(EXPERT, model=replace(EXPERT.model, tied_head=tied))
    small = exported(config)
    before = small(tokens()).logits
    small.resize_token_embeddings(101, mean_resizing=False)
    after = small(tokens(), use_cache=False).logits
    assert after.shape[-1] == 101
    close(after[..., :97], before)
    assert 0.001 < after[..., 97:].std() < 10  # new rows are drawn with the model's deviation
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert torch.equal(again(tokens(), use_cache=False).logits, after)
    assert torch.equal(load_model(tmp_path, "cpu").model(tokens(), mode="causal").logits, after)


def test_what_is_not_supported_is_refused_by_name(model: Any) -> None:
    from transformers import DynamicCache

    ids, batch_mask = tokens()[:, :8], torch.ones(3, 8, dtype=torch.long)
    hole, right, empty = batch_mask.clone(), batch_mask.clone(), batch_mask.clone()
    hole[1, 3], right[1, 6:], empty[1] = 0, 0, 0
    random = exported(CASES["random"])
    cases: tuple[tuple[str, Any], ...] = (
        ("attention_mask has a hole", lambda: model(ids, attention_mask=hole)),
        (r"attention_mask of shape \[3, 1, 8, 8\]", lambda: model(ids, attention_mask=torch.ones(3, 1, 8, 8))),
        (r"shape \[3, 7\].*here \[3, 8\]", lambda: model(ids, attention_mask=batch_mask[:, 1:])),
        ("padding must come before", lambda: model(ids, attention_mask=right, use_cache=True)),
        ("padding_side = 'left'", lambda: model.generate(ids, attention_mask=right, max_new_tokens=2)),
        ("leave out empty prompts", lambda: model.generate(ids, attention_mask=empty, max_new_tokens=2)),
        ("position_ids must count", lambda: model(ids, position_ids=torch.arange(0, 16, 2).unsqueeze(0))),
        (r"position_ids of shape \[1, 5\].*\[3, 8\]", lambda: model(ids, position_ids=torch.arange(5).unsqueeze(0))),
        (r"position_ids of shape \[2, 8\]", lambda: model(ids, position_ids=torch.arange(8).expand(2, 8))),
        ("attention_mask of shape dict", lambda: model(ids, attention_mask={"full_attention": None})),
        (r"inputs of shape \[3, 0\]", lambda: model(ids[:, :0])),
        (r"inputs of shape \[8\]", lambda: model(ids[0])),
        (
            "leave out use_cache=False and prefill_chunk_size",
            lambda: model.generate(
                inputs_embeds=model.get_input_embeddings()(ids), attention_mask=batch_mask, prefill_chunk_size=4
            ),
        ),
        ("output_attentions isn't supported", lambda: model(ids, output_attentions=True)),
        ("sentence_mask isn't supported", lambda: model(ids, sentence_mask=hole)),
        ("type DynamicCache isn't supported", lambda: model(ids, past_key_values=DynamicCache())),
        ("type DynamicCache", lambda: model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2)),
        ("'static' isn't supported", lambda: model.generate(ids, cache_implementation="static", max_new_tokens=2)),
        ("'quantized' isn't", lambda: model.generate(ids, cache_implementation="quantized", max_new_tokens=2)),
        ("assisted_generation isn't", lambda: model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=2)),
        ("assisted_generation isn't", lambda: model.generate(ids[:1], assistant_model=model, max_new_tokens=2)),
        ("attn_implementation = 'eager'", lambda: model.set_attn_implementation("eager")),
        ("either input_ids or inputs_embeds", lambda: model()),
        ("router reads the text", lambda: random(inputs_embeds=random.get_input_embeddings()(ids))),
        ("logits_to_keep and labels", lambda: model(ids, labels=ids, logits_to_keep=1)),
    )
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
