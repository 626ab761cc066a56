"""Which tokens count in the loss: from prompts and answers to the labels of a batch, and every file on the way."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megamor.analysis.observe import observe
from megamor.cli import inspect_data, merge_data, preprocess
from megamor.codec import TextCodec
from megamor.config import ExpertChoiceConfig
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.config.schema import DataConfig, SourceConfig
from megamor.corpus import preprocess as preprocess_module
from megamor.corpus import text
from megamor.corpus.merge import merge_shards
from megamor.corpus.writer import ShardWriter
from megamor.data.dataset import BatchArrays, TrainingData
from megamor.data.loader import MicroBatch, TrainingLoader, open_validation_sets
from megamor.data.meta import fingerprint
from megamor.data.shard import TokenShard
from megamor.errors import DataError
from megamor.evaluate.floors import validation_windows
from megamor.evaluate.loss import mean_figures, summed_loss
from megamor.evaluate.tasks import harness_model
from tests.combinations import VOCAB, lively_model, tiny_config
from tests.commands import in_child, refusal, status
from tests.unit.test_data_interrupted import killed_at

EOD = "<|endoftext|>"
PROMPTS = ["", " ", "great film", "great film ", "Sentence: it is bad.\nAnswer:", "x \n\n", "naïve №", "  a", "f("]
ANSWERS = [" yes", "no", "\nno", " positive.", "!", "ïve", "  two", " 1984"]
NUMBERS = random.Random(3)
PAIRS = [(p, a) for p in PROMPTS for a in ANSWERS if (p, a) != ("f(", ")")] + [
    (" ".join(NUMBERS.choices(["film", "is", "bad", "(1)", "№"], k=n % 20)), f" {n % 7}") for n in range(120)
]
CLEAR = [(p, a) for p, a in PAIRS if a[0] in " \n"]
"""Pairs whose answers have tokens of their own in every tokenizer of bytes."""


def trained(model: Any, split: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    """A tokenizer of 300 to 400 entries, made from the pairs."""
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = split
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    kind = trainers.BpeTrainer if isinstance(model, models.BPE) else trainers.UnigramTrainer
    trainer = kind(vocab_size=400, special_tokens=["<unk>", EOD], show_progress=False, **options)
    tokenizer.train_from_iterator([p + a for p, a in PAIRS] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths by name: bytes as in GPT-2, one that may join words, one with a mark before words, and GPT-2's own."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made = {
        "bytes": trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), initial_alphabet=alphabet),
        "across words": trained(
            models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), initial_alphabet=alphabet
        ),
        "metaspace": trained(
            models.Unigram(), pre_tokenizers.Metaspace(prepend_scheme="always"), normalizers.NFC(), unk_token="<unk>"
        ),
    }
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, tokenizer in made.items():
        found[name] = str(folder / f"{name.split()[0]}.json")
        tokenizer.save(found[name])
    if (real := Path(os.environ.get("MEGAMOR_DATA", "../shared/data")) / "tokenizers" / "gpt2.json").is_file():
        found["gpt2"] = str(real)
    return found


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"q": p, "a": {"text": a}}) + "\n" for p, a in pairs))
    return path


def arguments(pairs: Path, tokenizer: str, prefix: Path, *options: object) -> list[str]:
    keys = ["--prompt-key", "q", "--answer-key", "a.text"]
    return [*map(str, ["--input", pairs, "--tokenizer", tokenizer, "--output-prefix", prefix, *keys, *options])]


def marked(shard: TokenShard) -> list[tuple[list[int], list[int]]]:
    """Ids of each document that don't count, and those that do; a prompt is what comes first."""
    assert shard.loss_mask is not None
    starts = shard.starts_of(np.arange(shard.num_documents + 1)).tolist()
    found = []
    for start, end in pairwise(starts):
        mask = shard.loss_mask[start:end]
        assert (np.diff(mask.astype(int)) >= 0).all()
        ids = shard.tokens[start:end]
        found.append((ids[mask == 0].tolist(), ids[mask == 1].tolist()))
    return found


class Encoder:
    """What the harness model needs of a scorer to encode."""

    class model:
        class config:
            class model:
                max_seq_len = 8

    @staticmethod
    def before_pass() -> None:
        pass


@pytest.mark.parametrize(
    ("name", "accelerator"),
    [("bytes", "none"), ("bytes", "auto"), ("across words", "none"), ("metaspace", "none"), ("gpt2", "auto")],
)
def test_the_boundary_is_that_of_lm_eval(
    name: str, accelerator: str, tokenizers: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    if name not in tokenizers:
        pytest.skip("no tokenizers/gpt2.json beside the fixtures; set MEGAMOR_FIXTURES")
    harness = harness_model(Encoder(), TextCodec.load(tokenizers[name]))  # type: ignore[arg-type]
    expected = []
    pairs = []
    for prompt, answer in PAIRS:
        context, continuation = harness._encode_pair(prompt, answer) if prompt else ([], harness.tok_encode(answer))
        if continuation:  # the others are refused, see below
            pairs.append((prompt, answer))
            expected.append((context, [*continuation, harness.eot_token_id]))
    assert len(pairs) > 100
    options = ("--append-eod", "--accelerator", accelerator)
    preprocess.main(arguments(write_pairs(tmp_path / "p.jsonl", pairs), tokenizers[name], tmp_path / "x", *options))
    assert marked(TokenShard.open(tmp_path / "x")) == expected


def test_bad_pairs_and_options_are_refused(
    tokenizers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(pairs: list[tuple[str, str]], *options: object, name: str = "bytes") -> str:
        path = write_pairs(tmp_path / "p.jsonl", pairs)
        said = refusal(capsys, preprocess.main, *arguments(path, tokenizers[name], tmp_path / "x", *options))
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith("x")] == []
        return said

    for empty in ("", " \n"):
        assert "p.jsonl, line 2: the answer 'a.text' is empty" in refused([("a", " b"), ("a", empty)])
    joined = refused([("a", " b"), ("film", " i"), ("fil", "m")])
    assert "p.jsonl, line 3: the tokenizer joins the answer with the end of its prompt" in joined
    assert "no key 'nothing' (found: q, a); name the right one with" in refused([("a", "b")], "--answer-key", "nothing")
    assert "no --document-separator" in refused([("a", "b")], "--separator", "x")
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "p.jsonl").unlink()
    tok = tokenizers["bytes"]
    other = refusal(capsys, preprocess.main, *arguments(tmp_path / "t.txt", tok, tmp_path / "x"))
    assert "t.txt: --prompt-key and --answer-key need JSON lines" in other
    alone = arguments(tmp_path / "t.txt", tok, tmp_path / "x")[:-2]
    assert "go together" in refusal(capsys, preprocess.main, *alone)
    # Skipped and counted on request.
    path = write_pairs(tmp_path / "p.jsonl", [("a", " b"), ("a", ""), ("c", " d")])
    preprocess.main(arguments(path, tok, tmp_path / "x", "--on-bad-line", "skip"))
    assert "skipped: 1 bad line" in capsys.readouterr().out
    assert TokenShard.open(tmp_path / "x").num_documents == 2


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(preprocess_module, "JOURNAL_SECONDS", 0.0)


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


OPTIONS = ("--append-eod", "--split", "0.8,0.2", "--deduplicate", "--min-length", "4", "--workers", "2")


@pytest.mark.usefixtures("small_chunks")
def test_killed_runs_resume_to_the_same_bytes(tokenizers: dict[str, str], tmp_path: Path) -> None:
    """At every third rename or sync, with all options that leave documents out."""
    pairs = write_pairs(tmp_path / "p.jsonl", [*CLEAR, *CLEAR[::3]])
    held_out = write_pairs(tmp_path / "h.jsonl", CLEAR[5:9])
    options = (*OPTIONS, "--holdout", held_out)
    preprocess.main(arguments(pairs, tokenizers["bytes"], tmp_path / "whole" / "x", *options))
    expected = outputs(tmp_path / "whole")
    ends = ("bin", "idx", "loss_mask", "meta.json")
    assert sorted(expected) == [f"x_{split}.{end}" for split in ("train", "val") for end in ends]
    kept = [pair for split in ("train", "val") for pair in marked(TokenShard.open(tmp_path / "whole" / f"x_{split}"))]
    assert all(answer for _, answer in kept)
    # The tokens of an older data set of that name, without a mask, are replaced as a whole.
    kills = 0
    for count in range(0, 200, 3):

        def action(count: int = count) -> None:
            killed_at(count, ("replace", "fsync"))()
            preprocess.main(arguments(pairs, tokenizers["bytes"], tmp_path / "out" / "x", *options))

        if in_child(action) == 0:
            break
        kills += 1
    assert kills > 4
    assert outputs(tmp_path / "out") == expected


@pytest.mark.usefixtures("small_chunks")
def test_the_jobs_of_an_array_merge_to_the_whole(tokenizers: dict[str, str], tmp_path: Path) -> None:
    pairs, tok = write_pairs(tmp_path / "p.jsonl", CLEAR), tokenizers["bytes"]
    preprocess.main(arguments(pairs, tok, tmp_path / "whole" / "x", "--append-eod"))
    for job in range(3):
        preprocess.main(arguments(pairs, tok, tmp_path / "parts" / "x", "--append-eod", "--shard", f"{job}/3"))
    merge_data.main(["--output-prefix", str(tmp_path / "parts" / "x")])
    merged = {name: data for name, data in outputs(tmp_path / "parts").items() if "shard" not in name}
    assert merged == outputs(tmp_path / "whole")


def write_set(prefix: Path, masks: list[list[int]] | None, lengths: tuple[int, ...], first: int = 0) -> str:
    """Documents of `lengths` with ascending ids from `first`."""
    with ShardWriter(prefix, np.uint16, loss_mask=masks is not None) as writer:
        for number, length in enumerate(lengths):
            ids = np.arange(first, first + length)
            writer.add_tokens(ids, None if masks is None else np.array(masks[number]))
            writer.add_lengths(np.array([length]))
            first += length
        writer.commit()
    return str(prefix)


def test_merging_with_unmarked_data_counts_all_of_it(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", [[0, 1], [0, 0, 2]], (2, 3))
    b, c = (write_set(tmp_path / name, None, (3,)) for name in "bc")
    merged = merge_shards([b, a, c], str(tmp_path / "m"))
    assert merged.loss_mask is not None
    assert merged.loss_mask.tolist() == [1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1]


def test_damage_is_found(tmp_path: Path, tokenizers: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """By everyone who opens the data, or by its hash; `inspect-data` shows what counts."""
    pairs = write_pairs(tmp_path / "p.jsonl", [("great film\nAnswer:", " yes"), ("bad", " no")])
    prefix = tmp_path / "x"
    preprocess.main(arguments(pairs, tokenizers["bytes"], prefix, "--append-eod"))
    capsys.readouterr()
    show = [str(prefix), "--tokenizer", tokenizers["bytes"]]
    inspect_data.main(show)
    shown = capsys.readouterr().out
    answers = [len(own) for _, own in marked(TokenShard.open(prefix))]
    assert f"{sum(answers)} of {TokenShard.open(prefix).num_tokens} tokens count in the loss" in shown
    assert "counted: ' yes<|endoftext|>'" in shown
    before = fingerprint(TokenShard.open(prefix))
    mask = Path(f"{prefix}.loss_mask")
    whole = mask.read_bytes()
    config = DataConfig(train=(SourceConfig(str(prefix)),), seq_len=4)
    mask.write_bytes(whole[:-1] + b"\0")
    assert fingerprint(TokenShard.open(prefix)) != before
    assert "x.loss_mask is not the file" in refusal(capsys, inspect_data.main, *show)
    assert "x.loss_mask is not the file" in refusal(
        capsys, merge_data.main, "--inputs", prefix, "--output-prefix", tmp_path / "m"
    )
    mask.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"loss_mask has {len(whole) - 1} bytes, .*bin {len(whole)} tokens"):
        TrainingData.open(config, seed=0, vocab_size=400)
    mask.unlink()
    with pytest.raises(DataError, match=r"x.loss_mask is missing, but .*x.meta.json describes it"):
        TrainingData.open(config, seed=0, vocab_size=400)
    # Data without a mask takes its place: nothing of the old mask stays, even if the renames were interrupted.
    mask.write_bytes(whole)
    Path(f"{mask}.partial").write_bytes(b"\1")
    write_set(prefix, None, (9,))
    assert TokenShard.open(prefix).loss_mask is None
    assert not list(tmp_path.glob("x.loss_mask*"))
    mask.write_bytes(b"\1" * 9)
    with pytest.raises(DataError, match=r"x.loss_mask is of other data"):
        TrainingData.open(config, seed=0, vocab_size=400)


def check_labels(batch: MicroBatch | BatchArrays, counting: set[int]) -> Counter[int]:
    """Each label is the token after its input (ids ascend) if that counts, and -100 otherwise; returns the labels."""
    found: Counter[int] = Counter()
    assert batch.lengths is not None
    for inputs, labels, length in zip(
        batch.inputs.tolist(), batch.labels.tolist(), batch.lengths.tolist(), strict=True
    ):
        after = [token + 1 for token in inputs[:length]]
        assert labels == [token if token in counting else -100 for token in after] + [-100] * (len(inputs) - length)
        found.update(label for label in labels if label != -100)
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data(), packing=st.sampled_from(["stream", "best_fit", "document"]), seq_len=st.sampled_from([4, 8, 12]))
def test_every_marked_token_is_a_label_once_an_epoch(
    data: st.DataObject, packing: str, seq_len: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=12).filter(lambda found: sum(found) > 8))
    bits = data.draw(st.lists(st.integers(0, 1), min_size=sum(lengths), max_size=sum(lengths)))
    masks = [part.tolist() for part in np.split(np.array(bits), np.cumsum(lengths)[:-1])]
    prefix = write_set(tmp_path_factory.mktemp("p") / "a", masks, tuple(lengths))
    config = DataConfig(train=(SourceConfig(prefix),), packing=packing, seq_len=seq_len, chunk_len=8)
    if packing != "stream" and max(lengths) < 2:
        return  # no pairs
    opened = TrainingData.open(config, seed=5, vocab_size=400)
    (source,) = opened.sources.values()
    counting = {int(token) for token in np.flatnonzero(bits)}
    # As many epochs as a sequence has tokens: a whole number of sequences, whatever the length.
    found = check_labels(opened.samples(0, source.num_chunks * 8), counting)
    if packing == "stream":
        readable = set(range(1, source.num_chunks * 8 + 1))
    else:
        readable = set(range(sum(lengths))) - {0, *np.cumsum(lengths).tolist()}
    assert found == Counter(dict.fromkeys(counting & readable, seq_len))


@pytest.mark.parametrize("packing", ["stream", "best_fit", "document"])
def test_marks_follow_blends_ramps_restarts_and_ranks(tmp_path: Path, packing: str) -> None:
    """A source with marks and one where all counts, sequences of two lengths, and a changing number of ranks."""
    generator = np.random.default_rng(1)
    lengths = tuple(generator.integers(1, 30, 20).tolist())
    masks = [generator.integers(0, 2, length).tolist() for length in lengths]
    sources = (
        SourceConfig(write_set(tmp_path / "a", masks, lengths), 0.7),
        SourceConfig(write_set(tmp_path / "b", None, (40, 7, 30), first=1000), 0.3),
    )
    counting = {token for token, bit in enumerate(chain(*masks)) if bit} | set(range(1000, 1100))
    config = DataConfig(train=sources, packing=packing, seq_len=8, prefetch_steps=1)
    opened = TrainingData.open(config, seed=5, vocab_size=2000)
    batches = BatchSchedule((BatchShape(4, 2, 4), BatchShape(8, 2, 8)), (3,))
    whole = TrainingLoader(opened, rank=0, world_size=1, batches=batches)
    state: Any = None
    for world in (1, 2, 1, 2):
        loaders = [TrainingLoader(opened, rank=rank, world_size=world, batches=batches) for rank in range(world)]
        for loader in loaders if state else []:
            loader.load_state_dict(state)
        for _ in range(2):
            given, expected = [batch for loader in loaders for batch in loader.next_step()], whole.next_step()
            for batch in given:
                check_labels(batch, counting)
            for kind in ("inputs", "labels"):
                ours, theirs = (torch.cat([getattr(batch, kind) for batch in each]) for each in (given, expected))
                assert torch.equal(ours, theirs)
        state = loaders[0].state_dict()
        for loader in loaders:
            loader.close()
    whole.close()


def marked_validation(tmp_path: Path, masks: list[list[int]] | None, name: str = "v") -> Any:
    lengths = (9, 14, 30)
    config = replace(
        tiny_config(ExpertChoiceConfig()),
        data=DataConfig(validation={"v": write_set(tmp_path / name, masks, lengths)}, seq_len=16),
    )
    return config, open_validation_sets(config.data, vocab_size=VOCAB)["v"]


@torch.no_grad()
def test_figures_are_of_the_tokens_that_count(tmp_path: Path) -> None:
    """Loss and depth of them alone; FLOPs of all tokens, since all are computed."""
    config, plain = marked_validation(tmp_path, None, "plain")
    masks = [[0] * 5 + [1] * 4, [0] * 14, [0, 1, 0] * 10]
    _, data = marked_validation(tmp_path, masks)
    model, cpu = lively_model(config), torch.device("cpu")
    (everything,), (batch,) = plain.batches(0, 1, 4), data.batches(0, 1, 4)
    flat = np.concatenate(masks)[1:]
    assert batch.labels[batch.labels != -100].tolist() == (np.flatnonzero(flat) + 1).tolist()
    assert torch.equal(batch.inputs, everything.inputs)
    for mode in ("topk", "causal"):
        figures = mean_figures(config, summed_loss(model, [batch], mode, cpu))
        of_all = mean_figures(config, summed_loss(model, [everything], mode, cpu))
        out = model(**everything.arguments(cpu), mode=mode, score_tokens=True)
        counted = batch.labels != -100
        assert figures["loss"] == pytest.approx(float(out.scores.nll[counted].mean()), rel=1e-6)
        assert figures["mean_depth"] == pytest.approx(float(out.depth[counted].double().mean()))
        assert figures["flops_per_token"] == of_all["flops_per_token"]
    seen = [observe(model, each).nll for each in (plain, data)]
    assert (seen[0] == seen[1]).all()
    with pytest.raises(DataError, match=r"v has a loss mask, and n-gram floors are of all tokens"):
        validation_windows(data, 2)
    _, none = marked_validation(tmp_path, [[0] * 9, [0] * 14, [0] * 30], "none")
    with pytest.raises(DataError, match="no token of the windows measured counts"):
        mean_figures(config, summed_loss(model, none.batches(0, 1, 4), "causal", cpu))


def test_a_stream_of_pairs_is_warned_about(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "a", [[0] * 20 + [1] * 20], (40,))
    said = []
    for packing in ("stream", "best_fit"):
        config = DataConfig(train=(SourceConfig(prefix),), packing=packing, seq_len=8)
        loader = TrainingLoader(
            TrainingData.open(config, seed=0, vocab_size=99),
            rank=0,
            world_size=1,
            batches=BatchSchedule((BatchShape(1, 1, 8),)),
        )
        said.append("has a loss mask" in " ".join(loader.describe(2)))
    assert said == [True, False]


def test_status_is_2(tmp_path: Path, tokenizers: dict[str, str]) -> None:
    pairs = write_pairs(tmp_path / "p.jsonl", [("a", "")])
    assert status(preprocess.main, *arguments(pairs, tokenizers["bytes"], tmp_path / "x")) == 2
