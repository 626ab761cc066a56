"""Bits per byte, accuracy, and figures by position and by source, against direct computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megamor.codec import TextCodec, find_end_of_text
from megamor.config import Config
from megamor.corpus.tokenizer import byte_tokenizer, char_tokenizer
from megamor.corpus.writer import ShardWriter
from megamor.data.loader import MicroBatch
from megamor.data.meta import ShardMeta
from megamor.errors import DataError
from megamor.evaluate.loss import dataset_losses
from megamor.evaluate.text_bytes import TextBytes
from megamor.load import LoadedModel
from tests.combinations import ROUTERS, SEQ_LEN, VOCAB, lively_model, tiny_config, vanilla_config

END = "<|endoftext|>"
TEXTS = ("Grüße an Zoë, naïve café", "日本語 und 🙂 emoji", "a b", "plain words only")
WORDS = ("two words here", "one", "here two two")


def trained(tokenizer: Tokenizer, kind: type = trainers.BpeTrainer, **options: object) -> Tokenizer:
    tokenizer.train_from_iterator(
        [*TEXTS, *WORDS] * 2, kind(vocab_size=400, special_tokens=[END, "[UNK]"], show_progress=False, **options)
    )
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama() -> Tokenizer:
    """Bytes for what the vocabulary lacks, and a space before the text that decoding takes away again."""
    names = [END, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehilmnoprstuwyz", "▁a", "▁w", "wo", "▁wo", "▁▁"]
    merges = [("▁", "a"), ("▁", "w"), ("w", "o"), ("▁", "wo"), ("▁", "▁")]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([END])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer, unk_token="[UNK]")


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    return trained(tokenizer, trainers.WordPieceTrainer)


def suffixes() -> Tokenizer:
    """A mark after each word, which decoding turns into a space but for the last one."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>")
    return trained(tokenizer, end_of_word_suffix="</w>")


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (byte_level, TEXTS),
        (lambda: byte_tokenizer([END]), TEXTS),
        (lambda: char_tokenizer(TEXTS, [END]), TEXTS),
        (llama, (*TEXTS, " two  words ")),
        (unigram, WORDS),
        (word_pieces, WORDS),
        (suffixes, WORDS),
    ],
    ids=["byte-level", "bytes", "characters", "byte fallback", "unigram", "word pieces", "suffixes"],
)
def test_bytes_of_whole_texts_are_those_of_their_files(make: Callable[[], Tokenizer], texts: tuple[str, ...]) -> None:
    """Whatever the tokenizer writes into its tokens, and however the tokens are divided into windows."""
    tokenizer = make()
    codec = TextCodec(tokenizer, end_of_text=find_end_of_text(tokenizer, "it", END))
    ids = [codec.end_of_text.id]
    for text in texts:
        assert codec.decode(codec.encode(text)) == text
        ids += [*codec.encode(text), codec.end_of_text.id]
    counter = TextBytes(codec, max(ids) + 10)
    expected = sum(len(text.encode()) for text in texts)
    for size in (len(ids), 7):
        parts = [ids[start : start + size + 1] for start in range(0, len(ids) - 1, size)]
        batches = [MicroBatch(torch.tensor([part[:-1]]), torch.tensor([part[1:]])) for part in parts]
        assert sum(counter.count(batch) for batch in batches) == expected
    assert counter.count(MicroBatch(torch.tensor([[ids[0], 0]]), torch.tensor([[ids[0], -100]]))) == 0


def test_bytes_by_hand() -> None:
    """é has two bytes and 語 three; a token beyond the tokenizer's vocabulary, or a special one, has none."""
    tokenizer = char_tokenizer(["é語a"], [END])
    codec = TextCodec(tokenizer, end_of_text=find_end_of_text(tokenizer, "it", END))
    (a, e, go), end = codec.encode("aé語"), codec.end_of_text.id
    labels = torch.tensor([[e, go, end, a, -100, end + 1]])
    assert TextBytes(codec, end + 2).count(MicroBatch(torch.full_like(labels, a), labels)) == 2 + 3 + 0 + 1 + 0 + 0


def written(directory: Path, lengths: tuple[int, ...], name: str = "set", **meta: object) -> str:
    """A shard of random documents of these lengths."""
    ids = np.random.default_rng(0)
    with ShardWriter(directory / name, np.dtype("<u2")) as writer:
        for length in lengths:
            writer.add(ids.integers(0, VOCAB, length).tolist())
        writer.commit(ShardMeta(**meta))
    return str(directory / name)


def loaded_model(config: Config, document_mask: bool = False) -> LoadedModel:
    config = replace(config, data=replace(config.data, document_mask=document_mask, seq_len=SEQ_LEN))
    return LoadedModel(lively_model(config), config, Path("/nowhere"), None, torch.device("cpu"))


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("router", ["expert_choice", "act_soft"])
def test_means_over_positions_and_over_all(tmp_path: Path, router: str, document_mask: bool) -> None:
    """Against log-likelihoods of the model's own logits, document by document where they are kept apart."""
    lengths = (30, 2, 11, 5, 1, 18, 7)
    loaded = loaded_model(tiny_config(ROUTERS[router]), document_mask)
    prefix = written(tmp_path, lengths)
    figures = dataset_losses(loaded, prefix, batch_size=2, by=["position"])
    ids = np.fromfile(f"{prefix}.bin", "<u2").astype(np.int64)
    ends = np.cumsum(lengths)
    nats: dict[int, list[float]] = {}
    right: list[bool] = []
    for window in range(0, len(ids) - 1, SEQ_LEN):
        cuts = sorted({window, *(ends if document_mask else ()), min(window + SEQ_LEN, len(ids) - 1)})
        for begin, end in pairwise(cuts):
            if not window <= begin < end <= window + SEQ_LEN:
                continue
            with torch.no_grad():
                logits = loaded.model(torch.tensor(ids[None, begin:end]), mode="causal").logits[0]
            found = logits.log_softmax(-1)[torch.arange(end - begin), torch.tensor(ids[begin + 1 : end + 1])]
            for position, nat in enumerate((-found).tolist()):
                nats.setdefault(position.bit_length(), []).append(nat)
            right += (logits.argmax(-1).numpy() == ids[begin + 1 : end + 1]).tolist()
    rows = figures["by_position_causal"]
    assert [row["first"] for row in rows] == [0, 1, 2, 4, 8, 16][: len(rows)]
    assert [row["last"] for row in rows] == [0, 1, 3, 7, 15, SEQ_LEN - 1][: len(rows)]
    assert [row["tokens"] for row in rows] == [len(nats[number]) for number in sorted(nats)]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(nats[number]) for number in sorted(nats)], rel=1e-9)
    assert figures["accuracy_causal"] == np.mean(right)
    total = sum(row["tokens"] * row["loss"] for row in rows)
    assert figures["tokens"] == len(ids) - 1 == sum(row["tokens"] for row in rows)
    assert figures["loss_causal"] == pytest.approx(total / figures["tokens"], rel=1e-9)
    assert sum(row["tokens"] * row["mean_depth"] for row in rows) == pytest.approx(
        figures["tokens"] * figures["mean_depth_causal"]
    )
    assert figures["bits_per_byte_causal"] is figures["bytes"] is None, "no tokenizer"


def test_bits_per_byte_counts_the_loss_of_the_end_of_text(tmp_path: Path) -> None:
    """é (2 bytes) and a (1 byte) with an end of text between them: all nats, over 3 bytes."""
    config = vanilla_config()
    loaded = loaded_model(replace(config, data=replace(config.data, tokenizer="kept beside the model")))
    loaded = replace(loaded, directory=tmp_path)
    tokenizer = char_tokenizer(["aé"], [END])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in ("a", "é", END, "a")]
    with ShardWriter(tmp_path / "set", np.dtype("<u2")) as writer:
        writer.add(ids)
        writer.commit()
    figures = dataset_losses(loaded, str(tmp_path / "set"))
    assert figures["bytes"] == 3
    assert figures["bits_per_byte_causal"] == pytest.approx(figures["loss_causal"] * 3 / math.log(2) / 3)


def test_figures_of_the_sources_of_one_set(tmp_path: Path) -> None:
    """They are those of the tokens that the side file gives to each source, whatever windows are measured."""
    lengths = (30, 12, 11, 40, 18)
    sources = [{"name": "a", "tokens": 42}, {"name": "nothing", "tokens": 0}, {"name": "b", "tokens": 69}]
    loaded = loaded_model(tiny_config(ROUTERS["expert_choice"]))
    prefix = written(tmp_path, lengths, sources=sources)
    figures = dataset_losses(loaded, prefix, batch_size=2, by=["source"])
    first, second = figures["by_source_causal"]
    assert (first["source"], first["tokens"], second["source"], second["tokens"]) == ("a", 41, "b", 69)
    mean = (41 * first["loss"] + 69 * second["loss"]) / 110
    assert figures["loss_causal"] == pytest.approx(mean, rel=1e-9)
    # Windows 0, 1 and 3 of five hold tokens 1 to 48 and 73 to 96.
    rows = dataset_losses(loaded, prefix, sequences=3, by=["source"])["by_source_causal"]
    assert [row["tokens"] for row in rows] == [41, 7 + 24]
    alone = dataset_losses(loaded, written(tmp_path, (42,), "alone"))
    assert alone["tokens"] == 41
    assert alone["loss_causal"] == pytest.approx(first["loss"], rel=1e-9), "the same tokens, by the same seed"
    for other in ([{"name": "a", "tokens": 41}], [{**sources[0], "scattered": True}, *sources[1:]], []):
        with pytest.raises(DataError, match="which tokens come from which source"):
            dataset_losses(loaded, written(tmp_path, lengths, "other", sources=other), by=["source"])
