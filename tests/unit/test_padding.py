"""Padding changes nothing: a document gives the same result alone, in a padded window and beside other sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megamor.config import Config, ExpertChoiceConfig, SourceConfig, TokenChoiceConfig
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.corpus.writer import ShardWriter
from megamor.data.dataset import TrainingData
from megamor.data.loader import MicroBatch, TrainingLoader, open_validation_sets
from megamor.evaluate.loss import modes_of, summed_loss
from megamor.evaluate.savings import measure_savings
from megamor.model import ModelOutput, Transformer, build_model
from megamor.model.flops import executed_flops
from megamor.model.loss import IGNORE
from megamor.routing.plan import TokenSet
from tests.combinations import KV_POLICIES, ROUTERS, SEQ_LEN, VOCAB, lively_model, tiny_config, tokens, vanilla_config

pytestmark = pytest.mark.promise("R18")

CPU = torch.device("cpu")
LENGTHS = (SEQ_LEN, 9, 0, 17, 1)
"""Real tokens of the sequences of a padded batch."""
DOCUMENTS = (30, 2, 11, 5, 1, 18, 7, 25, 3, 26)
"""Tokens of the documents on disk."""


def run(model: Transformer, mode: str, **batch: object) -> ModelOutput:
    """A pass with the same random numbers every time."""
    torch.manual_seed(0)
    return model(mode=mode, step=3, **batch)


def figures(out: ModelOutput) -> dict[str, Tensor]:
    """The router's statistics without their weight beside other micro-batches."""
    found = {name: ratio.numerator / ratio.denominator for name, ratio in out.ratios.items()} | out.totals
    if "threshold_quantiles" in found:
        weight = found.pop("threshold_batches")
        found["threshold_quantiles"] = found["threshold_quantiles"] / torch.where(weight > 0, weight, 1.0)
    return {name: value.nan_to_num(-1.0) for name, value in found.items()}


def padded_batch() -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S]; the padding holds ids and labels that would show if they were looked at."""
    ids = tokens(batch=len(LENGTHS), length=SEQ_LEN + 1)
    return ids[:, :-1], ids[:, 1:]


def token_losses(model: Transformer, mode: str, labels: Tensor, **batch: object) -> Tensor:
    """Loss of each token of inputs [B, S]."""
    logits = run(model, mode, **batch).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def modes(model: Transformer, router: str) -> list[str]:
    """Modes in which a sequence's result may not depend on its neighbours."""
    # Random numbers and pooled quantities of training belong to the micro-batch; the others to each sequence.
    pooled = router.startswith(("random", "skip", "token_choice"))
    return ["causal", "topk"] + ["train"] * (not pooled)


def check_padding(model: Transformer) -> None:
    """By the inference rule, each of three padded sequences has the logits that it has alone."""
    ids, lengths = tokens(), (24, 9, 17)
    with torch.no_grad():
        padded = model(ids, mode="causal", lengths=lengths).logits
        for number, length in enumerate(lengths):
            alone = model(ids[number : number + 1, :length], mode="causal").logits
            torch.testing.assert_close(padded[number : number + 1, :length], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_padded_window_is_its_document(router: str) -> None:
    """One sequence: everything is as without padding, gradients included, in every mode."""
    model = lively_model(tiny_config(ROUTERS[router]))
    inputs, labels = padded_batch()
    for length in (17, 1):
        for mode in ("train", "topk", "causal"):
            found = []
            for given, kept in ((SEQ_LEN, (length,)), (length, None)):
                model.zero_grad()
                out = run(model, mode, inputs=inputs[:1, :given], labels=labels[:1, :given], lengths=kept)
                (out.loss_sum + sum(out.router_losses.values())).backward()
                found.append((out, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
            (padded, padded_grads), (alone, grads) = found
            assert torch.equal(padded.depth[:, :length], alone.depth)
            assert (padded.depth[:, length:] == -1).all()
            assert torch.equal(padded.work, alone.work)
            assert (padded.pairs, padded.num_tokens) == (alone.pairs, alone.num_tokens)
            torch.testing.assert_close(padded.router_losses, alone.router_losses, atol=1e-12, rtol=0)
            torch.testing.assert_close(*(figures(out) for out in (padded, alone)), atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(padded.loss_sum, alone.loss_sum, atol=1e-10, rtol=0)
            torch.testing.assert_close(padded_grads, grads, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_document_is_the_same_alone_and_in_a_padded_batch(router: str, kv_policy: str) -> None:
    model = lively_model(tiny_config(ROUTERS[router], kv_policy))
    inputs, labels = padded_batch()
    with core_rows(model) as rows:
        for mode in modes(model, router):
            del rows[:]
            losses = token_losses(model, mode, labels, inputs=inputs, lengths=LENGTHS)
            out = run(model, mode, inputs=inputs, labels=labels, lengths=LENGTHS)
            # Two passes, each block once in each recursion that any token takes: never a row beside the real ones.
            per_recursion = [int((out.depth > r).sum()) for r in range(3) if (out.depth > r).any()]
            assert sorted(set(rows)) == sorted(set(per_recursion)), (mode, rows)
            assert out.work[0, 0] <= sum(LENGTHS)
            expected: dict[str, Tensor] = {}
            for row, length in enumerate(LENGTHS):
                assert (out.depth[row, length:] == -1).all()
                if length:
                    alone = {"inputs": inputs[row : row + 1, :length]}
                    label = labels[row : row + 1, :length]
                    torch.testing.assert_close(
                        losses[row : row + 1, :length], token_losses(model, mode, label, **alone), atol=1e-10, rtol=0
                    )
                    single = run(model, mode, labels=label, **alone)
                    assert torch.equal(out.depth[row, :length], single.depth[0])
                    for name, loss in single.router_losses.items():
                        expected[name] = expected.get(name, 0) + loss.detach() * length / sum(LENGTHS)
            # Each sequence counts by its tokens.
            found = {name: loss.detach() for name, loss in out.router_losses.items()}
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@contextmanager
def core_rows(model: Transformer) -> Iterator[list[int]]:
    """Collects how many rows each call of a block of the core gets."""
    rows: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
        for block in model.stage.blocks
    ]
    yield rows
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("positions", ["continue", "restart"])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_documents_in_a_padded_window_are_kept_apart(kv_policy: str, positions: str) -> None:
    config = tiny_config(ROUTERS["ema_threshold"], kv_policy)
    config = replace(config, model=replace(config.model, document_positions=positions))
    model, ids = lively_model(config), tokens(batch=2)
    documents = (torch.arange(SEQ_LEN) >= 7).long().expand_as(ids)
    with torch.no_grad():
        whole = model(ids, mode="causal", documents=documents)
        short = model(ids, mode="causal", documents=documents, lengths=(SEQ_LEN, 15))
    torch.testing.assert_close(short.logits[0], whole.logits[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(short.logits[1, :15], whole.logits[1, :15], atol=1e-10, rtol=0)
    assert (short.logits[1, 15:] == 0).all()
    pairs = model(ids, ids, mode="causal", documents=documents, lengths=(SEQ_LEN, 15)).pairs
    assert pairs == 7 * 8 / 2 * 2 + 17 * 18 / 2 + 8 * 9 / 2


def test_forty_tokens_reach_the_same_depths_in_a_long_window() -> None:
    """They used to compete with padding: 40/26/13 tokens alone, 40/0/0 in a window of 128."""
    config = tiny_config(ExpertChoiceConfig())
    model = build_model(replace(config, model=replace(config.model, max_seq_len=128)))
    inputs = torch.zeros(1, 128, dtype=torch.int64)
    inputs[0, :40] = tokens(batch=1, length=40)
    for given, lengths in ((inputs[:, :40], None), (inputs, (40,))):
        depth = model(given, mode="topk", lengths=lengths).depth
        assert [int((depth > recursion).sum()) for recursion in range(3)] == [40, 26, 13]


def test_tokens_without_a_label_are_no_padding() -> None:
    model, (inputs, labels) = lively_model(tiny_config(ROUTERS["expert_choice"])), padded_batch()
    some = labels.clone()
    some[:, ::2] = IGNORE
    whole, masked = (run(model, "train", inputs=inputs, labels=x, lengths=LENGTHS) for x in (labels, some))
    assert torch.equal(whole.depth, masked.depth)
    torch.testing.assert_close(whole.router_losses, masked.router_losses)
    assert masked.num_tokens == sum(length // 2 for length in LENGTHS)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_batch_of_padding_alone_is_zero_everywhere(router: str) -> None:
    """It depends on the parameters that any other batch depends on, so that sharded ranks don't wait for it."""
    model, (inputs, labels) = lively_model(tiny_config(ROUTERS[router])), padded_batch()
    out = run(model, "train", inputs=inputs, labels=labels, lengths=(0,) * len(LENGTHS))
    (out.loss_sum + sum(out.router_losses.values())).backward()
    assert out.loss_sum == 0
    assert out.num_tokens == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    assert (out.depth == -1).all()
    for value in (out.work, out.pairs, *out.router_losses.values(), *out.totals.values()):
        assert (value == 0).all()
    assert all((ratio.numerator, ratio.denominator) == (0, 0) for ratio in out.ratios.values())
    logits = model(inputs, mode="causal", lengths=(0,) * len(LENGTHS)).logits
    assert logits.shape == (*inputs.shape, VOCAB)
    assert (logits == 0).all()


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_padding_alone_uses_the_parameters_that_tokens_use(sharing: str) -> None:
    """Ranks reduce gradients together: one must not have gradients that others lack."""
    config = tiny_config(ROUTERS["random"], "share_first", sharing)
    config = replace(config, recursion=replace(config.recursion, lora_rank=2, separate_norms=True))
    model, ids = lively_model(replace(config, model=replace(config.model, qk_norm=True))), tokens(length=SEQ_LEN + 1)
    found = []
    for lengths in (None, (0, 0, 0)):
        model.zero_grad(set_to_none=True)
        run(model, "train", inputs=ids[:, :-1], labels=ids[:, 1:], lengths=lengths).loss_sum.backward()
        found.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert found[0] == found[1]
    assert "stage.blocks.0.attention.k_proj.up.1.weight" not in found[0]


def test_token_choice_balances_real_tokens() -> None:
    model, (inputs, labels) = lively_model(tiny_config(TokenChoiceConfig(balancing="loss_free"))), padded_batch()
    out = run(model, "train", inputs=inputs, labels=labels, lengths=LENGTHS)
    assert out.totals["depth_choices"].sum() == sum(LENGTHS)
    assert out.totals["depth_choices"].tolist() == torch.bincount(out.depth.flatten() + 1)[2:].tolist()


def test_thresholds_weigh_micro_batches_by_their_tokens() -> None:
    model, (inputs, labels) = lively_model(tiny_config(ROUTERS["ema_threshold"])), padded_batch()
    full, padded = (run(model, "train", inputs=inputs, labels=labels, lengths=x).totals for x in (None, LENGTHS))
    fill = sum(LENGTHS) / inputs.numel()
    assert full["threshold_batches"].tolist() == [0.0, 1.0, 1.0]
    assert padded["threshold_batches"].tolist() == pytest.approx([0.0, fill, fill])
    quantiles = [
        totals["threshold_quantiles"] / totals["threshold_batches"].clamp_min(1e-9) for totals in (full, padded)
    ]
    model.stage.router.update({name: full[name] + padded[name] for name in full})
    expected = (quantiles[0] + fill * quantiles[1]) / (1 + fill)
    found = torch.stack([model.stage.router.threshold(recursion) for recursion in range(3)])
    torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-5, rtol=1e-5)


def test_gradients_are_the_sum_of_the_documents() -> None:
    for config in (tiny_config(ROUTERS["fixed"]), tiny_config(ROUTERS["expert_choice"]), vanilla_config()):
        model, (inputs, labels) = lively_model(config), padded_batch()
        run(model, "train", inputs=inputs, labels=labels, lengths=LENGTHS).loss_sum.backward()
        padded = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        for row, length in enumerate(LENGTHS):
            if length:
                part = slice(row, row + 1), slice(0, length)
                run(model, "train", inputs=inputs[part], labels=labels[part]).loss_sum.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch.testing.assert_close(padded, grads, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("policy", ["recursion", "block", "selective"])
def test_recomputation_knows_no_padding_either(policy: str, kv_policy: str) -> None:
    model, (inputs, labels) = lively_model(tiny_config(ROUTERS["ema_threshold"], kv_policy)), padded_batch()
    found = []
    for each in ("none", policy):
        model.set_activation_checkpointing(each, ["sdpa"])
        model.zero_grad()
        run(model, "train", inputs=inputs, labels=labels, lengths=LENGTHS).loss_sum.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


def test_half_the_tokens_take_half_the_flops() -> None:
    """By torch's counter, which leaves out attention on a CPU, and by the reported figure, which knows it."""
    config = tiny_config(ExpertChoiceConfig())
    model = build_model(config)
    inputs, labels = tokens(batch=4), tokens(batch=4, length=SEQ_LEN)

    def executed(lengths: tuple[int, ...] | None) -> tuple[float, float]:
        with FlopCounterMode(display=False) as counter:
            out = model(inputs, labels, lengths=lengths)
        work, count = out.work.tolist(), None if lengths is None else sum(lengths)
        reported = executed_flops(config, 4, work, pairs=float(out.pairs), tokens=count)
        return counter.get_total_flops(), reported.forward

    full, reported = executed(None)
    half, reported_half = executed((SEQ_LEN, SEQ_LEN, 0, 0))
    assert half / full == pytest.approx(0.5, abs=1e-12)
    assert reported_half / reported == pytest.approx(0.5, abs=1e-12)
    short, reported_short = executed((SEQ_LEN // 2,) * 4)
    assert short / full == pytest.approx(0.5, abs=1e-12)
    assert 0.4 < reported_short / reported < 0.5


def test_top_takes_each_sequence_s_own_number() -> None:
    everything = TokenSet.all(4, SEQ_LEN, (5, 0, 3, 1))
    scores = torch.tensor([0.1, 0.9, 0.2, 0.9, 0.8, 5.0, 4.0, 6.0, -3.0])
    chosen, indices = everything.top(scores, (3, 0, 1, 1))
    assert indices.tolist() == [1, 3, 4, 7, 8]
    assert chosen.lengths is not None
    assert (chosen.lengths.tolist(), chosen.max_length) == ([3, 0, 1, 1], 3)
    fewer, indices = chosen.top(scores[indices], (1, 0, 1, 0))
    assert (fewer.index.tolist(), indices.tolist()) == ([1, 7], [0, 3])
    assert chosen.rank_of(fewer, CPU).tolist() == [0, 0]
    assert everything.rank_of(chosen, CPU).tolist() == [1, 3, 4, 2, 0]
    assert everything.number_in(scores > 0.5).tolist() == [3, 0, 3, 0]


def write_documents(prefix: Path, lengths: tuple[int, ...] = DOCUMENTS) -> str:
    """Documents of random tokens."""
    generator = np.random.default_rng(5)
    with ShardWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add(generator.integers(0, VOCAB, length))
        writer.commit()
    return str(prefix)


def packed(config: Config, prefix: str, packing: str, **data: object) -> Config:
    """`config` with the data set at `prefix`."""
    source = (SourceConfig(prefix),)
    return replace(
        config,
        data=replace(config.data, train=source, validation={"v": prefix}, packing=packing, **data),  # type: ignore[arg-type]
    )


def batches_of(config: Config, size: int, count: int) -> list[MicroBatch]:
    """An epoch of micro-batches."""
    data = TrainingData.open(config.data, seed=0, vocab_size=VOCAB)
    shape = BatchShape(count, size, config.data.seq_len)
    loader = TrainingLoader(data, rank=0, world_size=1, batches=BatchSchedule((shape,)))
    found = loader.next_step()
    loader.close()
    return found


@pytest.mark.parametrize("mask", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("seq_len", [8, 12, 24, 32])
@pytest.mark.parametrize("packing", ["stream", "document", "best_fit"])
def test_padding_is_at_the_end_and_its_length_is_known(tmp_path: Path, packing: str, seq_len: int, mask: bool) -> None:
    """Also where a window is joined from several padded chunks, or cut from the padding of one."""
    prefix = write_documents(tmp_path / "d")
    config = packed(tiny_config(ROUTERS["fixed"]), prefix, packing, chunk_len=16, document_mask=mask, seq_len=seq_len)
    data = TrainingData.open(config.data, seed=0, vocab_size=VOCAB)
    (source,) = data.sources.values()
    rows = data.samples(0, source.num_chunks * 16)  # as many epochs as a window has tokens
    assert rows.lengths is not None
    assert rows.lengths.sum() == source.num_pairs * seq_len
    for inputs, labels, length in zip(rows.inputs, rows.labels, rows.lengths, strict=True):
        assert (labels[:length] != IGNORE).all()
        assert (labels[length:] == IGNORE).all()
        assert (inputs[length:] == 0).all()
    (batch, *_) = batches_of(config, 4, 12)
    given = batch.arguments(CPU)
    padded = batch.lengths is not None and bool((batch.lengths < seq_len).any())
    assert given["lengths"] == (tuple(batch.lengths.tolist()) if padded else None)
    assert padded == (packing != "stream")


@pytest.mark.parametrize("packing", ["document", "best_fit"])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "act_hard", "ema_threshold"])
def test_loaded_windows_are_what_they_are_without_padding(tmp_path: Path, router: str, packing: str) -> None:
    config = packed(tiny_config(ROUTERS[router]), write_documents(tmp_path / "d"), packing)
    model = lively_model(config)
    for batch in batches_of(config, 4, 8):
        assert batch.documents is not None
        for mode in ("causal", "topk"):
            out = model(**batch.arguments(CPU), mode=mode)
            for row, length in enumerate(batch.lengths):
                part = slice(row, row + 1), slice(0, length)
                alone = model(batch.inputs[part], batch.labels[part], mode=mode, documents=batch.documents[part])
                assert torch.equal(out.depth[row, :length], alone.depth[0])


@torch.no_grad()
def test_a_short_validation_window_is_its_tokens(tmp_path: Path) -> None:
    """One window of 60, and one of 17 tokens in a set of windows of 24: 2 real windows in a batch of 4."""
    config = packed(tiny_config(ROUTERS["expert_choice"]), write_documents(tmp_path / "d", (42,)), "stream")
    model = lively_model(config)
    (batch,) = open_validation_sets(config.data, vocab_size=VOCAB)["v"].batches(0, 1, 4)
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [24, 17, 0, 0]
    assert batch.num_tokens == 41
    for mode in modes_of(model):
        total = summed_loss(model, [batch], mode, CPU)
        alone = [
            model(batch.inputs[r : r + 1, :n], batch.labels[r : r + 1, :n], mode=mode) for r, n in ((0, 24), (1, 17))
        ]
        assert total[0].item() == pytest.approx(sum(float(out.loss_sum) for out in alone), rel=1e-12)
        assert total[1:3].tolist() == [41, sum(int(out.depth.sum()) for out in alone)]
    nothing = MicroBatch(batch.inputs[2:], batch.labels[2:], None, batch.lengths[2:])
    assert not summed_loss(model, [nothing], "causal", CPU).any()
    only = MicroBatch(batch.inputs[1:2, :17], batch.labels[1:2, :17])
    short = MicroBatch(batch.inputs[1:2], batch.labels[1:2], None, batch.lengths[1:2])
    for name in ("flops_per_token", "flops_ratio"):
        assert measure_savings(model, [short], 1)[name] == measure_savings(model, [only], 1)[name]
