"""Training data and loaders: which rank gets which tokens, resuming, and checks against model and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamor.config.batches import BatchSchedule, BatchShape
from megamor.config.schema import DataConfig, SourceConfig
from megamor.corpus.writer import ShardWriter
from megamor.data.dataset import BatchArrays, TrainingData
from megamor.data.loader import MicroBatch, TrainingLoader, ValidationSet, open_validation_sets
from megamor.data.meta import ShardMeta
from megamor.data.order import SampleOrder
from megamor.data.shard import TokenShard
from megamor.errors import ConfigError, DataError

VOCAB = 30_000
SEQ_LEN = 8


def write(prefix: Path, tokens: np.ndarray, **meta: object) -> str:
    with ShardWriter(prefix, "u2") as writer:
        for part in np.array_split(tokens, 5):
            writer.add(part)
        writer.commit(ShardMeta(**meta))  # type: ignore[arg-type]
    return str(prefix)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources of 40 and 25 windows in which every token is unique and so shows its position."""
    folder = tmp_path_factory.mktemp("data")
    a = write(folder / "a", np.arange(0, 40 * SEQ_LEN + 3))
    b = write(folder / "b", np.arange(1000, 1000 + 25 * SEQ_LEN + 1))
    return DataConfig(train=(SourceConfig(a, 2), SourceConfig(b, 1)), validation={"v": a}, seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def data(config: DataConfig) -> TrainingData:
    return TrainingData.open(config, seed=3, vocab_size=VOCAB)


def loaders(data: TrainingData, world: int, micro: int, batch: int = 24) -> list[TrainingLoader]:
    batches = BatchSchedule((BatchShape(batch, micro, data.config.seq_len),))
    return [TrainingLoader(data, rank=rank, world_size=world, batches=batches) for rank in range(world)]


def windows(data: TrainingData, first: int, count: int, order: SampleOrder | None = None) -> np.ndarray:
    """Samples as windows [n, S + 1]; they contain no padding."""
    rows = data.samples(first, count, order)
    assert (rows.inputs[:, 1:] == rows.labels[:, :-1]).all()
    return np.concatenate((rows.inputs[:, :1], rows.labels), axis=1)


def joined(batches: list[MicroBatch]) -> np.ndarray:
    """Windows [n, S + 1] of micro-batches, rebuilt from inputs and labels."""
    inputs = torch.cat([batch.inputs for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    assert inputs.dtype == labels.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    return torch.cat([inputs, labels[:, -1:]], dim=1).numpy()


def steps(ranks: list[TrainingLoader], count: int) -> np.ndarray:
    """Global batches of `count` consecutive steps; in each, all micro-batches, rank by rank."""
    return np.concatenate([joined([batch for rank in ranks for batch in rank.next_step()]) for _ in range(count)])


@pytest.mark.promise("R5")
@settings(max_examples=25, deadline=None)
@given(world=st.sampled_from([1, 2, 3, 4, 6]), micro=st.sampled_from([1, 2, 4]))
def test_order_is_the_same_for_any_ranks_and_micro_batches(data: TrainingData, world: int, micro: int) -> None:
    ranks = loaders(data, world, micro, 48)
    assert (steps(ranks, 3) == windows(data, 0, 144)).all()
    assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)
    assert [batch.inputs.shape for batch in ranks[0].next_step()] == [(micro, SEQ_LEN)] * (48 // world // micro)


def test_an_epoch_of_each_source_covers_its_stream(data: TrainingData, config: DataConfig) -> None:
    """A 2:1 blend of 40 and 25 windows: 60 samples contain all of a; an epoch has every target exactly once."""
    found = windows(data, 0, 75)
    a, b = found[found[:, 0] < 1000], found[found[:, 0] >= 1000]
    assert sorted(a[:40, 1:].ravel().tolist()) == list(range(1, 40 * SEQ_LEN + 1))
    assert sorted(b[:25, 1:].ravel().tolist()) == list(range(1001, 1001 + 25 * SEQ_LEN))
    assert (found[:, 1:] == found[:, :1] + np.arange(1, SEQ_LEN + 1)).all()
    assert a[:40, 0].tolist() != sorted(a[:40, 0].tolist())


def test_extending_a_run_changes_nothing_before(data: TrainingData) -> None:
    assert (windows(data, 0, 500)[:50] == windows(data, 0, 50)).all()
    assert (windows(data, 0, 500)[333:340] == windows(data, 333, 7)).all()


def test_seed_changes_the_order(config: DataConfig, data: TrainingData) -> None:
    other = TrainingData.open(config, seed=4, vocab_size=VOCAB)
    assert (windows(other, 0, 30) != windows(data, 0, 30)).any()


def test_state_counts_delivered_samples_and_a_step_can_be_taken_back(data: TrainingData) -> None:
    (loader,) = loaders(data, 1, 4)
    steps([loader], 2)
    before = loader.state_dict()
    assert before["consumed_samples"] == loader.consumed_samples == 48, "prefetched samples don't count"
    batches = joined(loader.next_step())
    loader.take_back()
    assert loader.state_dict() == before
    assert np.array_equal(joined(loader.next_step()), batches)


@pytest.mark.promise("R5", "R6")
@settings(max_examples=25, deadline=None)
@given(
    legs=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([12, 24, 48]), st.integers(0, 3)),
        min_size=1,
        max_size=5,
    )
)
def test_ranks_and_batch_may_change_at_every_restart(data: TrainingData, legs: list[tuple[int, int, int]]) -> None:
    """For any world sizes and batches of the launches, the samples equal those of one uninterrupted run."""
    state, seen = None, [np.empty((0, SEQ_LEN + 1), np.int64)]
    for world, batch, count in legs:
        ranks = loaders(data, world, 1, batch)
        for rank in ranks:
            if state:
                rank.load_state_dict(state)
        if count:
            seen.append(steps(ranks, count))
        state = json.loads(json.dumps(ranks[0].state_dict()))
        for rank in ranks:
            rank.close()
    found = np.concatenate(seen)
    assert (found == windows(data, 0, len(found))).all()


def test_blend_may_change_at_a_restart(config: DataConfig, data: TrainingData) -> None:
    (loader,) = loaders(data, 1, 4)
    before = steps([loader], 1)
    only_b = TrainingData.open(replace(config, train=config.train[1:]), seed=3, vocab_size=VOCAB)
    (resumed,) = loaders(only_b, 1, 4)
    resumed.load_state_dict(loader.state_dict())
    after = steps([resumed], 1)
    assert (before[:, 0] < 1000).sum() == 16
    seen_of_b = np.concatenate([before[before[:, 0] >= 1000], after])[:, 0]
    assert len(set(seen_of_b[:25].tolist())) == 25  # the whole epoch before any window repeats
    both = TrainingData.open(config, seed=3, vocab_size=VOCAB)
    assert (windows(both, 0, 48, resumed.order) == np.concatenate([before, after])).all()
    with pytest.raises(DataError, match=r"no longer names"):
        windows(only_b, 0, 48, resumed.order)


def test_moved_data_resumes_and_changed_data_is_refused(tmp_path: Path, config: DataConfig, data: TrainingData) -> None:
    (loader,) = loaders(data, 1, 4)
    steps([loader], 2)
    state = loader.state_dict()
    moved = TrainingData.open(
        replace(config, train=(SourceConfig(write(tmp_path / "moved", np.arange(0, 323)), 2), config.train[1])),
        seed=3,
        vocab_size=VOCAB,
    )
    (resumed,) = loaders(moved, 1, 4)
    resumed.load_state_dict(state)
    assert len(resumed.order.phases) == 1
    assert (steps([resumed], 1) == windows(data, 48, 24)).all()

    own = [write(tmp_path / name, np.arange(200)) for name in ("mine", "mine2")]
    mine = DataConfig(train=(SourceConfig(own[0]),), seq_len=SEQ_LEN)
    saved = loaders(TrainingData.open(mine, seed=3, vocab_size=VOCAB), 1, 4)[0].state_dict()
    write(tmp_path / "mine", np.arange(1, 201))
    (other,) = loaders(TrainingData.open(mine, seed=3, vocab_size=VOCAB), 1, 4)
    with pytest.raises(DataError, match="mine isn't the data"):
        other.load_state_dict(saved)


def test_other_seed_chunks_or_packing_are_refused(config: DataConfig, data: TrainingData) -> None:
    state = loaders(data, 1, 4)[0].state_dict()
    for changed, name in (
        (TrainingData.open(config, seed=4, vocab_size=VOCAB), r"run\.seed 3, not 4"),
        (TrainingData.open(replace(config, chunk_len=4), seed=3, vocab_size=VOCAB), r"data\.chunk_len 8, not 4"),
        (TrainingData.open(replace(config, packing="best_fit"), seed=3, vocab_size=VOCAB), r"stream, not best_fit"),
    ):
        with pytest.raises(ConfigError, match=name):
            loaders(changed, 1, 4)[0].load_state_dict(state)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetch_is_bounded_and_changes_nothing(
    config: DataConfig, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TrainingData.open(replace(config, prefetch_steps=prefetch), seed=3, vocab_size=VOCAB)
    asked: list[int] = []
    original = TrainingData.fill

    def counted(self: TrainingData, rows: BatchArrays, first: int, order: SampleOrder) -> None:
        asked.append(first)
        original(self, rows, first, order)

    monkeypatch.setattr(TrainingData, "fill", counted)
    (loader,) = loaders(data, 1, 4)
    got = steps([loader], 2)
    loader.close()
    monkeypatch.undo()
    assert (got == windows(data, 0, 48)).all()
    assert 2 <= len(asked) <= 2 + prefetch
    assert asked == [24 * i for i in range(len(asked))]


def test_errors_of_the_prefetch_thread_are_raised_every_time(config: DataConfig) -> None:
    """b contains ids from 1000 on, so with a smaller vocabulary the first of its samples must raise."""
    (loader,) = loaders(TrainingData.open(config, seed=3, vocab_size=1000), 1, 4)
    for _ in range(2):
        with pytest.raises(DataError, match=r"b\.bin holds token id 1\d\d\d.*0 to 999 \(model\.vocab_size\)"):
            loader.next_step()
    assert loader.consumed_samples == 0
    loader.close()


def test_a_failed_step_is_never_skipped(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainingData.fill

    def failing_first(self: TrainingData, rows: BatchArrays, first: int, order: SampleOrder) -> None:
        if first == 0:
            raise DataError("disk gone")
        original(self, rows, first, order)

    monkeypatch.setattr(TrainingData, "fill", failing_first)
    (loader,) = loaders(data, 1, 4)
    for _ in range(2):
        with pytest.raises(DataError, match="disk gone"):
            loader.next_step()
    loader.close()


def test_vocabulary_bound_is_exact(tmp_path: Path) -> None:
    config = DataConfig(train=(SourceConfig(write(tmp_path / "x", np.arange(SEQ_LEN + 1))),), seq_len=SEQ_LEN)
    assert TrainingData.open(config, seed=0, vocab_size=SEQ_LEN + 1).samples(0, 1).labels.max() == SEQ_LEN
    with pytest.raises(DataError, match=f"token id {SEQ_LEN}, "):
        TrainingData.open(config, seed=0, vocab_size=SEQ_LEN).samples(0, 1)


def change(config: DataConfig, **fields: object) -> DataConfig:
    return replace(config, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (lambda c: change(c, train=()), ConfigError, r"data\.train names no data set"),
        (lambda c: change(c, train=c.train + c.train[:1]), ConfigError, "same data twice"),
        (lambda c: change(c, seq_len=1000), DataError, r"a has 323 tokens, too few"),
        (lambda c: change(c, tokenizer="/nowhere/tok.json"), DataError, r"/nowhere/tok\.json can't be read"),
    ],
)
def test_data_that_does_not_fit_the_configuration_is_refused(
    config: DataConfig, spoil: Callable[[DataConfig], DataConfig], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        TrainingData.open(spoil(config), seed=0, vocab_size=VOCAB)


def test_side_file_is_checked_against_model_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tok.json"
    tokenizer.write_text("right")
    digest = hashlib.sha256(b"right").hexdigest()
    prefix = write(tmp_path / "x", np.arange(100), vocab_size=300, tokenizer_name="tok.json", tokenizer_sha256=digest)
    config = DataConfig(
        train=(SourceConfig(prefix),), validation={"v": prefix}, seq_len=SEQ_LEN, tokenizer=str(tokenizer)
    )
    assert TrainingData.open(config, seed=0, vocab_size=300)
    for opening in (TrainingData.open, lambda c, seed, vocab_size: open_validation_sets(c, vocab_size=vocab_size)):
        with pytest.raises(DataError, match=r"x\.meta\.json: the tokenizer has 300 entries.*299"):
            opening(config, seed=0, vocab_size=299)
        tokenizer.write_text("wrong")
        with pytest.raises(DataError, match=r"x was written with tokenizer tok\.json"):
            opening(config, seed=0, vocab_size=300)
        tokenizer.write_text("right")


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(2, 60), world=st.integers(1, 4), micro=st.integers(1, 4), limit=st.none() | st.integers(1, 9))
def test_validation_covers_each_target_once_with_equal_batches(
    tokens: int, world: int, micro: int, limit: int | None
) -> None:
    ids = np.arange(100, 100 + tokens, dtype=np.uint16)
    shard = TokenShard("v", ids, np.array([tokens], np.int32), np.array([0]), None)
    validation = ValidationSet("v", shard, seq_len=SEQ_LEN, vocab_size=VOCAB)
    per_rank = [list(validation.batches(rank, world, micro, limit)) for rank in range(world)]
    assert len({len(batches) for batches in per_rank}) == 1
    inputs = torch.cat([batch.inputs for batches in per_rank for batch in batches])
    labels = torch.cat([batch.labels for batches in per_rank for batch in batches])
    assert inputs.shape == (len(per_rank[0]) * world * micro, SEQ_LEN)
    used = labels != -100
    assert (labels[used] == inputs[used] + 1).all()
    assert (inputs >= 0).all()
    targets = sorted(labels[used].tolist())
    if limit is None or limit >= validation.num_sequences:
        assert targets == list(range(101, 100 + tokens))
    else:
        assert len(set(targets)) == len(targets)
        assert used.any(dim=1).sum() == limit
        # Spread evenly: window i of `limit` is the one at the same fraction of the set.
        firsts = sorted(((inputs[used.any(dim=1), 0] - 100) // SEQ_LEN).tolist())
        assert firsts == [number * validation.num_sequences // limit for number in range(limit)]


def test_validation_checks_ids_and_size(config: DataConfig, tmp_path: Path) -> None:
    validation = open_validation_sets(config, vocab_size=100)["v"]
    with pytest.raises(DataError, match=r"a\.bin holds token id"):
        list(validation.batches(0, 1, 4))
    with pytest.raises(DataError, match="too few"):
        open_validation_sets(replace(config, validation={"v": write(tmp_path / "x", np.arange(1))}), vocab_size=100)


def test_document_numbers_change_where_documents_begin(tmp_path: Path) -> None:
    """Document numbers of each window compared with the document lengths, for training and validation."""
    prefix, lengths = str(tmp_path / "d"), [5, 1, 9, 20, 3, 17]
    with ShardWriter(prefix, np.uint16) as writer:
        for number, length in enumerate(lengths):
            writer.add(np.full(length, number))  # each token identifies its document
        writer.commit()
    config = DataConfig(train=(SourceConfig(prefix),), validation={"v": prefix}, seq_len=8, document_mask=True)
    data = TrainingData.open(config, seed=0, vocab_size=100)
    (loader,) = loaders(data, 1, 3, batch=6)
    batches = [*loader.next_step(), *open_validation_sets(config, vocab_size=100)["v"].batches(0, 1, 4, 6)]
    loader.close()
    for batch in batches:
        rows = batch.labels[:, 0] >= 0
        assert torch.equal(batch.documents[rows].diff() != 0, batch.inputs[rows].diff() != 0)
    plain = TrainingData.open(replace(config, document_mask=False), seed=0, vocab_size=100)
    (loader,) = loaders(plain, 1, 3, batch=6)
    assert loader.next_step()[0].documents is None
    loader.close()


def test_batches_for_a_gpu_are_pinned(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step uses one page-locked block. Without a GPU torch can't allocate one, so the request is recorded."""
    asked: list[dict[str, object]] = []
    empty = torch.empty

    def recorded(*shape: int, pin_memory: bool = False, **options: object) -> torch.Tensor:
        asked.append({"shape": tuple(shape[0]), "pin_memory": pin_memory})  # type: ignore[arg-type]
        return empty(*shape, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", recorded)
    batches = BatchSchedule((BatchShape(24, 4, SEQ_LEN),))
    loader = TrainingLoader(data, rank=1, world_size=2, batches=batches, pinned=True)
    found = joined(loader.next_step())
    loader.close()
    assert asked[0] == {"shape": (3, 12, SEQ_LEN), "pin_memory": True}
    assert (found == windows(data, 12, 12)).all()
