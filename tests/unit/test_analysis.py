"""Analysis of routers: what is observed is what the model computes, statistics are those of other implementations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor

from megamor.analysis.analyze import Sample, choose_passages, mode_figures, token_counts
from megamor.analysis.classes import CLASSES, parts_of_speech, token_classes
from megamor.analysis.observe import Observations, heads, observe
from megamor.analysis.statistics import Bootstrap, agreement, grouped, interval, spearman
from megamor.cli import analyze as command
from megamor.codec import EndOfText, TextCodec
from megamor.config import Config, CustomRouterConfig
from megamor.config.exits import ExitRule
from megamor.config.segments import stages
from megamor.corpus.bpe import train_bpe
from megamor.corpus.tokenizer import char_tokenizer
from megamor.corpus.writer import ShardWriter
from megamor.data.loader import ValidationSet
from megamor.data.meta import ShardMeta, sha256_of_tokenizer
from megamor.data.shard import TokenShard
from megamor.model import Transformer
from megamor.model.recursion import StageOutput
from megamor.routing import InferenceRule, Mix, Router, RoutingContext, RoutingPlan, RoutingSession, TokenSet
from tests.combinations import ROUTERS, SEQ_LEN, VOCAB, lively_model, tiny_config, vanilla_config
from tests.commands import refusal, status
from tests.resume.runs import fit, tiny_run

LENGTHS = (7, 30, 1, 50, 24, 11, 40, 2, 60, 19)
"""Of documents; the last window of the set is short."""


def write_set(prefix: Path, mask: bool = False, lengths: tuple[int, ...] = LENGTHS) -> ValidationSet:
    """Documents of random tokens, of which low ids are more frequent."""
    generator = np.random.default_rng(0)
    with ShardWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add((VOCAB * generator.random(length) ** 2).astype(np.int64))
        writer.commit()
    shard = TokenShard.open(str(prefix))
    return ValidationSet("set", shard, seq_len=SEQ_LEN, vocab_size=VOCAB, document_mask=mask)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ValidationSet:
    return write_set(tmp_path_factory.mktemp("data") / "plain")


@pytest.mark.parametrize("name", ROUTERS)
def test_the_last_state_is_the_result(name: str, data: ValidationSet) -> None:
    """Without blocks after the stage, the logit lens after the last recursion is the model's own loss."""
    model = lively_model(tiny_config(ROUTERS[name], sharing="cycle"))
    found = observe(model, data, batch_size=4)
    view = found.stages[""]
    np.testing.assert_allclose(np.concatenate(view.lens, 1)[-1], found.nll, rtol=1e-9, atol=1e-12)
    assert model.stage is not None
    assert model.stage.observe is None
    for r, taken in enumerate(np.concatenate(view.took, 1)):
        gates = np.concatenate(view.gates.get(("gate", r), [np.zeros(0)]))
        assert len(gates) == taken.sum() or name.startswith("token_choice")  # whose tokens have one gate each
    gates_in_all = sum(len(part) for parts in view.gates.values() for part in parts)
    assert gates_in_all == len(found.ids) or not name.startswith("token_choice")
    learned = [*heads(model.stage.router)]
    assert bool(view.scores) == bool(learned)


@pytest.mark.parametrize("name", ["expert_choice", "token_choice", "act_hard", "monotone", "act_soft"])
@pytest.mark.parametrize("rule", [None, ExitRule("entropy", 3.0)])
def test_depths_are_those_of_the_model(name: str, rule: ExitRule | None, tmp_path: Path) -> None:
    """Of several stages, with documents that don't see each other, padding, and an exit rule."""
    documents = write_set(tmp_path / "masked", mask=True)
    model = lively_model(tiny_config(ROUTERS[name], sharing="stages"))
    model.set_exit(rule)
    found = observe(model, documents, batch_size=5)
    depth, nll, streams = [], [], {prefix: [] for prefix in model.stages}

    def keep(prefix: str) -> Any:
        def hook(_: object, __: object, out: StageOutput) -> None:
            assert out.depth is not None
            streams[prefix].append(out.depth)

        return hook

    for prefix, stage in model.stages.items():
        stage.register_forward_hook(keep(prefix))
    with torch.no_grad():
        for batch in documents.batches(0, 1, 3):
            out = model(**batch.arguments(torch.device("cpu")), mode="causal", score_tokens=True)
            valid = batch.labels != -100
            depth.append(out.depth[valid])
            nll.append(out.scores.nll[valid])
    np.testing.assert_allclose(found.nll, torch.cat(nll).numpy(), rtol=1e-9, atol=1e-12)
    took = {prefix: np.concatenate(view.took, 1).sum(0) for prefix, view in found.stages.items()}
    np.testing.assert_array_equal(sum(took.values()), torch.cat(depth).numpy())
    for prefix, own in streams.items():
        np.testing.assert_array_equal(took[prefix], torch.cat(own).numpy())
    if name != "act_soft":
        np.testing.assert_array_equal(found.depth, sum(took.values()))
    elif rule is None:
        first = stages(model.config)[0].prefix
        assert (took[first] == 3).all()
        assert len(np.unique(found.stages[first].depth)) > 1  # where they halt, though they pass through all
    starts = np.cumsum((0, *LENGTHS))
    places = found.window * SEQ_LEN + np.concatenate([np.arange(n) for n in np.bincount(found.window)])
    np.testing.assert_array_equal(found.document, np.searchsorted(starts, places, side="right") - 1)
    np.testing.assert_array_equal(found.position, np.minimum(places % SEQ_LEN, places - starts[found.document]))


class ByToken(Router):
    """Depth 1 + id % 3: the embedding's first value is the id."""

    causal_in_training = True
    inference_rule = InferenceRule("by_token")

    def __init__(self, options: dict[str, float], dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions)

    def begin(self, rows: Tensor, context: RoutingContext) -> RoutingSession:
        return ByTokenSession(context, 1 + rows[:, 0].round().long() % 3)


class ByTokenSession(RoutingSession):
    def __init__(self, context: RoutingContext, depth: Tensor) -> None:
        super().__init__(context)
        self.depth = depth

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        return RoutingPlan(*candidates.where(candidates.gather(self.depth) > recursion), Mix())


@pytest.fixture(scope="module")
def oracle(data: ValidationSet) -> tuple[Transformer, Observations, Sample]:
    config = tiny_config(CustomRouterConfig(target="tests.unit.test_analysis:ByToken"), sharing="cycle")
    model = lively_model(config)
    with torch.no_grad():
        model.embed.weight[:, 0] = torch.arange(float(VOCAB))
    found = observe(model, data)
    return model, found, Sample.of(found, token_counts(data.shard), None, resamples=200)


def test_known_depths_give_known_correlations(
    data: ValidationSet, oracle: tuple[Transformer, Observations, Sample]
) -> None:
    model, found, sample = oracle
    depth = 1 + found.ids % 3
    np.testing.assert_array_equal(found.depth, depth)
    stage = mode_figures(model, found, sample)["stages"]["stage"]
    assert stage["depths"] == [0, *np.bincount(depth)[1:]]
    assert stage["recursions"][2]["tokens"] == (depth >= 2).sum()
    stream = np.asarray(data.shard.tokens)
    frequency = np.array([(stream == token).sum() for token in found.ids])
    column = np.concatenate([np.arange(n) for n in np.bincount(found.window)])
    inside = column > 0
    before = np.flatnonzero(inside) - 1
    expected = {
        "position": spearmanr(column, depth),
        "frequency": spearmanr(frequency, depth),
        "loss": spearmanr(found.nll, depth),
        "entropy": spearmanr(found.entropy, depth),
        "surprisal": spearmanr(found.nll[before], depth[inside]),
        "previous depth": spearmanr(depth[before], depth[inside]),
    }
    for name, rho in expected.items():
        value = stage["correlations"][name]
        assert value["value"] == pytest.approx(rho.statistic, abs=1e-9), name
        assert value["low"] < rho.statistic < value["high"]
    assert stage["correlations"]["previous depth"]["tokens"] == inside.sum()
    curve = stage["curves"]["previous depth"]
    assert [point["at"] for point in curve] == [1, 2, 3]
    assert [p["value"] for p in curve] == pytest.approx([depth[inside][depth[before] == d].mean() for d in (1, 2, 3)])


def test_intervals_are_over_documents(oracle: tuple[Transformer, Observations, Sample]) -> None:
    """Tokens that occur ten times over in their documents tell nothing new; more documents do."""
    _, found, sample = oracle
    x, depth, unit = grouped(found.nll), found.depth, sample.unit
    once = interval(spearman(sample.bootstrap.tables(unit, x, depth)))
    tenfold = interval(spearman(sample.bootstrap.tables(*(np.tile(values, 10) for values in (unit, x, depth)))))
    assert once == pytest.approx(tenfold)
    same = interval(spearman(Bootstrap.of(len(set(unit)), 200).tables(unit, x, depth)))
    assert same == once
    more = Bootstrap.of(10 * len(set(unit)), 200)
    units = np.concatenate([unit + copy * len(set(unit)) for copy in range(10)])
    narrow = interval(spearman(more.tables(units, np.tile(x, 10), np.tile(depth, 10))))
    assert narrow["high"] - narrow["low"] < 0.6 * (once["high"] - once["low"])  # type: ignore[operator]


def test_a_resample_has_ranks_of_its_own() -> None:
    generator = np.random.default_rng(3)
    unit, depth = np.sort(generator.integers(0, 9, 400)), generator.integers(1, 5, 400)
    values = np.round(generator.normal(size=400) + 0.3 * depth + unit / 5, 1)  # with ties
    bootstrap = Bootstrap.of(9, 3)
    found = spearman(bootstrap.tables(unit, grouped(values), depth))
    for weights, rho in zip((np.ones(9), *bootstrap.weights), found, strict=True):
        drawn = np.repeat(np.arange(400), weights[unit].astype(int))
        assert rho == pytest.approx(spearmanr(values[drawn], depth[drawn]).statistic, abs=1e-12)
    constant = spearman(bootstrap.tables(unit, grouped(values), np.ones_like(unit)))
    assert interval(constant) == {"value": None, "low": None, "high": None}


def test_groups_hardly_change_a_rank_correlation() -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    depth = np.digitize(values + np.random.default_rng(1).normal(size=20_000), (-1, 0, 1))
    group = grouped(values)
    assert len(np.unique(group)) == 256
    assert (np.diff(group[np.argsort(values)]) >= 0).all()
    rho = spearman(Bootstrap.of(1, 0).tables(np.zeros_like(group), group, depth))[0]
    assert rho == pytest.approx(spearmanr(values, depth).statistic, abs=1e-4)


def test_agreement_by_hand() -> None:
    """The usual example of Cohen's kappa: 20 and 15 agree, 5 and 10 don't; expected .5, kappa .4."""
    a = np.repeat([0, 0, 1, 1], (20, 5, 10, 15))
    b = np.repeat([0, 1, 0, 1], (20, 5, 10, 15))
    found = agreement(Bootstrap.of(50, 100), np.arange(50), a, b)
    assert {name: round(figure["value"], 9) for name, figure in found.items() if name != "spearman"} == {
        "agreement": 0.7,
        "chance": 0.5,
        "kappa": 0.4,
    }
    assert found["spearman"]["value"] == pytest.approx(spearmanr(a, b).statistic)
    constant = agreement(Bootstrap.of(50, 100), np.arange(50), np.ones_like(a), np.ones_like(a))
    assert constant["agreement"]["value"] == 1
    assert constant["kappa"]["value"] is None


TEXT = "def résumé_2(x): 42 ☃\n\n  _it's 3.5"


def classes_of(tokenizer: Tokenizer, text: str) -> list[tuple[str, str]]:
    end = EndOfText("<eot>", tokenizer.token_to_id("<eot>"))
    codec = TextCodec(tokenizer, "test", end)
    ids = np.array([*codec.encode(text), end.id])
    found = token_classes(codec, ids, np.arange(len(ids)) == 0)
    return [(codec.name(token), CLASSES[kind]) for token, kind in zip(ids.tolist(), found, strict=True)]


def test_classes_of_bytes_by_hand() -> None:
    """Byte-level BPE whose words begin with their spaces; a character of several bytes is no character in parts."""
    tokenizer = train_bpe(["def x def x re sum sum 42 42"] * 50, 275, ["<eot>"])
    found = classes_of(tokenizer, "def sum_x(42 ☃\n  defx")
    by_name = dict(found)
    assert by_name["def"] == by_name[" sum"] == "word start"
    assert by_name["x"] == "continuation"
    assert by_name["_"] == by_name["("] == "punctuation"
    assert by_name["\n"] == "white space"
    assert by_name["<eot>"] == "other"
    assert sum(name.startswith("token_id:") for name, _ in found) == 3  # the snowman
    assert {kind for name, kind in found if name.startswith("token_id:")} == {"other"}


def test_classes_of_characters_by_hand() -> None:
    found = classes_of(char_tokenizer([TEXT], ["<eot>"]), TEXT)
    s, c, p, d, w = "word start", "continuation", "punctuation", "digits", "white space"
    expected = [
        *[s, c, c, w], *[s, *[c] * 5, p, d, p, s, p, p, w], *[d, d, w, p], *[w] * 4, *[p, c, c, p, s, w, d, p, d],
    ]  # fmt: skip
    assert [kind for _, kind in found] == [*expected, "other"]


def test_parts_of_speech_of_the_word_that_a_token_is_in() -> None:
    codec = TextCodec(char_tokenizer(["the cat sat"]), "test")

    def tagger(text: str) -> Iterator[tuple[int, int, str]]:
        for word, tag in (("the", "DET"), ("cat", "NOUN"), ("sat", "VERB")):
            yield text.index(word), text.index(word) + 3, tag

    found = parts_of_speech(codec, tagger, [np.array(codec.encode("the cat sat"))])
    assert found == [*["DET"] * 3, "", *["NOUN"] * 3, "", *["VERB"] * 3]


def test_passages_by_spread() -> None:
    depth = np.concatenate(([1, 3] * 64, [2] * 128, [1, 2] * 64, [3] * 5))
    found = fake(depth)
    codec = TextCodec(char_tokenizer(["abc"]), "test")
    chosen = choose_passages(found, codec, 3)
    assert {name: list(passage.depths) for name, passage in chosen.items()} == {
        "widest": [1, 3] * 64,
        "median": [1, 2] * 64,
        "narrowest": [2] * 128,
    }
    assert choose_passages(fake(np.ones(50, int)), codec, 3) == {}


def fake(depth: np.ndarray) -> Observations:
    """One window of tokens of these depths."""
    zeros = np.zeros(len(depth), np.int64)

    class Fixed(Observations):
        @property
        def depth(self) -> np.ndarray:
            return depth

    return Fixed(zeros, zeros, zeros, zeros, np.arange(len(depth)), zeros, zeros, {"": None})  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has learned that letters repeat, with its tokenizer; `seed1` is the same with another seed."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_run(folder, max_steps=30, eval_every=30)
    path = folder / "tokenizer.json"
    letters = "abcdefgh .1"
    path.write_text(char_tokenizer([letters], ["<|endoftext|>"]).to_str())
    generator = np.random.default_rng(0)
    for name, documents in (("train", 200), ("val", 25)):
        with ShardWriter(folder / "data" / f"{name}_text", np.uint16) as writer:
            for _ in range(documents):
                runs = np.repeat(generator.integers(0, len(letters), 12), generator.integers(1, 9, 12))
                writer.add(np.append(runs, len(letters)))
            meta = ShardMeta("tokenizer.json", sha256_of_tokenizer(path), 12, "<|endoftext|>", len(letters), True)
            writer.commit(meta)
    train = (replace(config.data.train[0], prefix=str(folder / "data" / "train_text")),)
    validation = {"v": str(folder / "data" / "val_text")}
    data = replace(config.data, train=train, validation=validation, tokenizer=str(path))
    config = replace(config, data=data, optim=replace(config.optim, lr=1e-2))
    for seed, name in ((0, "tiny"), (1, "seed1")):
        fit(replace(config, run=replace(config.run, name=name, seed=seed)), world_size=1)
    return config


def test_the_command(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, prefix = Path(run.run.dir), run.data.validation["v"]
    arguments = [
        "--checkpoint",
        runs / "tiny",
        "--data",
        prefix,
        "--against",
        runs / "seed1",
        "--output",
        tmp_path / "o",
    ]
    assert status(command.main, *arguments) == 0
    out = capsys.readouterr().out
    assert "agreement with its own top-k depths" in out
    assert "widest spread of depths" in out
    figures = json.loads((tmp_path / "o/analysis.json").read_text())
    assert figures["schema"] == "megamor-analysis/1"
    assert figures["modes"].keys() == {"topk", "causal"}
    assert figures["data"]["documents"] == 25
    causal = figures["modes"]["causal"]
    assert causal["loss"] < figures["data"]["unigram_entropy"]
    classes = {row["at"]: row["tokens"] for row in causal["stages"]["stage"]["classes"]["class"]}
    assert classes.keys() == {"word start", "continuation", "white space", "punctuation", "digits", "other"}
    assert sum(classes.values()) == figures["data"]["tokens"]
    page = (tmp_path / "o/index.html").read_text()
    assert page.count("<svg") == len(list((tmp_path / "o").glob("*.svg")))
    assert str(runs / "seed1") in page


def test_untrained_models_are_refused(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untrained = replace(run, run=replace(run.run, name="new"), train=replace(run.train, max_steps=2))
    fit(replace(untrained, optim=replace(run.optim, lr=1e-9)), world_size=1)
    arguments = ["--checkpoint", Path(run.run.dir) / "new", "--data", run.data.validation["v"]]
    message = refusal(capsys, command.main, *arguments, "--json", tmp_path / "x.json")
    loss, entropy = map(float, re.findall(r"\b\d\.\d{4}\b", message))
    assert "isn't trained" in message
    assert 4 < loss < 6  # ln 128 is 4.85
    assert 2 < entropy < 2.5  # ln 12 is 2.48
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "file").touch()
    assert "can't write to --output" in refusal(capsys, command.main, *arguments, "--output", tmp_path / "file" / "o")


def test_without_recursion_there_is_nothing_to_correlate(run: Config, data: ValidationSet) -> None:
    model = lively_model(vanilla_config())
    found = observe(model, data)
    sample = Sample.of(found, token_counts(data.shard), None, resamples=20)
    assert mode_figures(model, found, sample)["stages"] == {}
    fixed = lively_model(tiny_config(ROUTERS["fixed"]))
    found = observe(fixed, data)
    figures = mode_figures(fixed, found, sample)["stages"]["stage"]
    assert {figure["value"] for figure in figures["correlations"].values()} == {None}
    assert figures["recursions"][3]["tokens"] == len(found.ids)
