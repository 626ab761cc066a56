"""Packing: best fit, the contents of windows under each packing, padding, blocks of documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamor.config.batches import BatchSchedule, BatchShape
from megamor.config.schema import DataConfig, SourceConfig
from megamor.corpus.writer import ShardWriter
from megamor.data import source
from megamor.data.dataset import TrainingData
from megamor.data.loader import TrainingLoader, open_validation_sets
from megamor.data.packing import best_fit, count_bins
from megamor.errors import DataError

LENGTHS = (5, 1, 9, 20, 3, 17, 2, 0, 8, 8, 33, 4, 9, 12)
"""Of documents, in tokens."""
SEQ_LEN = 8


def rooms_one_by_one(sizes: Sequence[int], capacity: int) -> list[int]:
    """Space left in each bin by the textbook algorithm of best-fit decreasing."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        room = min(fitting, default=capacity)
        if fitting:
            rooms.remove(room)
        rooms.append(room - size)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_best_fit_is_that_of_items_one_by_one(data: st.DataObject, capacity: int) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=120)), np.int64)
    items, bounds = best_fit(sizes, capacity)
    bins = [items[a:b] for a, b in pairwise(bounds)]
    assert sorted(items.tolist()) == list(range(len(sizes)))
    assert sorted(capacity - int(sizes[items].sum()) for items in bins) == rooms_one_by_one(sizes.tolist(), capacity)
    assert count_bins(np.bincount(sizes, minlength=capacity + 1)) == len(bins)
    assert (items == best_fit(sizes, capacity)[0]).all()


def test_best_fit_wastes_little() -> None:
    sizes = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 50_000).astype(np.int64) + 1, 2048)
    assert count_bins(np.bincount(sizes, minlength=2049)) <= 1.001 * sizes.sum() / 2048


def write_documents(prefix: Path, lengths: Sequence[int] = LENGTHS) -> str:
    """Documents with unique tokens: those of document d start at 100 * d."""
    with ShardWriter(prefix, np.uint16) as writer:
        for number, length in enumerate(lengths):
            writer.add(100 * number + np.arange(length))
        writer.commit()
    return str(prefix)


def opened(prefix: str, packing: str, **changes: object) -> TrainingData:
    config = DataConfig(train=(SourceConfig(prefix),), seq_len=SEQ_LEN, packing=packing, **changes)  # type: ignore[arg-type]
    return TrainingData.open(config, seed=1, vocab_size=10_000)


def expected_pairs(lengths: Sequence[int] = LENGTHS) -> list[tuple[int, int]]:
    """(input, label) of every pair inside a document."""
    return [(100 * d + i, 100 * d + i + 1) for d, length in enumerate(lengths) for i in range(length - 1)]


def pairs_of(inputs: np.ndarray, labels: np.ndarray) -> list[tuple[int, int]]:
    shown = labels != -100
    return list(zip(inputs[shown].tolist(), labels[shown].tolist(), strict=True))


@pytest.mark.parametrize("packing", ["best_fit", "document"])
@pytest.mark.parametrize("per_block", [2**18, 5, 1])
def test_an_epoch_has_every_pair_of_every_document_once(
    tmp_path: Path, packing: str, per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds for any division of the documents into blocks; each epoch has another order."""
    monkeypatch.setattr(source, "DOCUMENTS_PER_BLOCK", per_block)
    data = opened(write_documents(tmp_path / "d"), packing)
    (only,) = data.sources.values()
    rows = data.samples(0, 2 * only.num_chunks)
    for epoch in np.split(rows.inputs, 2), np.split(rows.labels, 2):
        assert sorted(map(tuple, epoch[0])) == sorted(map(tuple, epoch[1]))
        assert (epoch[0] != epoch[1]).any()
    first = slice(0, only.num_chunks)
    assert sorted(pairs_of(rows.inputs[first], rows.labels[first])) == sorted(expected_pairs())
    assert only.num_pairs == len(expected_pairs())
    alone = [data.samples(n, 1).inputs[0].tolist() for n in reversed(range(2 * only.num_chunks))]
    assert alone[::-1] == rows.inputs.tolist()


def test_best_fit_cuts_only_documents_longer_than_the_window(tmp_path: Path) -> None:
    data = opened(write_documents(tmp_path / "d"), "best_fit")
    (only,) = data.sources.values()
    rows = data.samples(0, only.num_chunks)
    assert rows.documents is not None
    for number, length in enumerate(LENGTHS):
        positions = np.argwhere((rows.inputs // 100 == number) & (rows.labels != -100))
        lengths = Counter(rows.documents[row, column] for row, column in positions)
        full, rest = divmod(max(length - 1, 0), SEQ_LEN)
        assert sorted(lengths.values(), reverse=True) == [SEQ_LEN] * full + [rest] * (rest > 0)
    # 118 pairs need at least 15 windows of 8 even if documents could be cut anywhere.
    assert (len(expected_pairs()), only.num_chunks) == (118, 15)


def test_one_document_in_each_window(tmp_path: Path) -> None:
    data = opened(write_documents(tmp_path / "d"), "document")
    (only,) = data.sources.values()
    assert only.num_chunks == sum(-(-max(length - 1, 0) // SEQ_LEN) for length in LENGTHS)
    rows = data.samples(0, only.num_chunks)
    for inputs, labels in zip(rows.inputs, rows.labels, strict=True):
        assert len(set(inputs[labels != -100] // 100)) == 1


@pytest.mark.parametrize("packing", ["stream", "best_fit", "document"])
def test_numbers_keep_documents_and_padding_apart(tmp_path: Path, packing: str) -> None:
    data = opened(write_documents(tmp_path / "d"), packing)
    (only,) = data.sources.values()
    rows = data.samples(0, only.num_chunks)
    assert rows.documents is not None
    for inputs, labels, numbers in zip(rows.inputs, rows.labels, rows.documents, strict=True):
        own = np.where(labels == -100, -1, inputs // 100)
        assert (np.diff(numbers) == (np.diff(own) != 0)).all()
        assert (inputs[labels == -100] == 0).all()
        if packing == "stream":
            assert (labels != -100).all()
        else:
            assert (np.diff(labels == -100) >= 0).all()  # at the end
    assert opened(write_documents(tmp_path / "e"), packing, document_mask=False).samples(0, 1).documents is None


def test_padding_of_joined_chunks_moves_to_the_end(tmp_path: Path) -> None:
    """Chunks of 4 joined into rows of 8: the documents stay apart, and the padding of both chunks follows them."""
    data = opened(write_documents(tmp_path / "d", (4, 3, 4, 3)), "document", chunk_len=4)
    rows = data.samples(0, 2)
    padding = rows.labels == -100
    assert rows.documents is not None
    assert rows.lengths is not None
    assert rows.lengths.sum() == 10
    assert (padding == (np.arange(8) >= rows.lengths[:, None])).all()
    assert [len(set(numbers[:length])) for numbers, length in zip(rows.documents, rows.lengths, strict=True)] == [2, 2]
    assert (np.diff(rows.documents) == (np.diff(np.where(padding, -1, rows.inputs // 100)) != 0)).all()


def test_padding_counts_in_epochs(tmp_path: Path) -> None:
    """An epoch is over when every window has been read, whatever part of the windows is padding."""
    data = opened(write_documents(tmp_path / "d"), "document")
    (only,) = data.sources.values()
    assert only.num_pairs < only.epoch_tokens == only.num_chunks * SEQ_LEN
    loader = TrainingLoader(
        data, rank=0, world_size=1, batches=BatchSchedule((BatchShape(only.num_chunks, only.num_chunks, SEQ_LEN),))
    )
    epochs = []
    for _ in range(2):
        loader.next_step()
        epochs += loader.epochs().values()
    loader.close()
    assert epochs == [1.0, 2.0]


def test_validation_is_read_in_order_whatever_the_packing(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "d")
    seen = []
    for packing in ("stream", "best_fit", "document"):
        config = DataConfig(validation={"v": prefix}, seq_len=SEQ_LEN, packing=packing)  # type: ignore[arg-type]
        batches = list(open_validation_sets(config, vocab_size=10_000)["v"].batches(0, 1, 4))
        labels = torch.cat([batch.labels for batch in batches]).flatten()
        stream = [100 * d + i for d, length in enumerate(LENGTHS) for i in range(length)]
        assert labels[labels != -100].tolist() == stream[1:]
        seen.append(torch.cat([batch.documents for batch in batches if batch.documents is not None]))
    assert torch.equal(seen[0], seen[1])


def test_ids_of_packed_windows_are_checked_and_minus_100_is_no_id(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "d")
    config = DataConfig(train=(SourceConfig(prefix),), seq_len=SEQ_LEN, packing="document")
    largest = max(label for _, label in expected_pairs())
    (only,) = TrainingData.open(config, seed=0, vocab_size=largest + 1).sources.values()
    TrainingData.open(config, seed=0, vocab_size=largest + 1).samples(0, only.num_chunks)
    with pytest.raises(
        DataError, match=rf"d\.bin holds token id {largest}, but the model's ids are 0 to {largest - 1}"
    ):
        TrainingData.open(config, seed=0, vocab_size=largest).samples(0, only.num_chunks)
    with ShardWriter(tmp_path / "s", np.int32) as writer:
        writer.add(np.array([5, -100, 7, 8, 9]))
        writer.commit()
    for packing in ("stream", "document"):
        config = DataConfig(train=(SourceConfig(str(tmp_path / "s")),), seq_len=4, packing=packing)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"s\.bin holds token id -100"):
            TrainingData.open(config, seed=0, vocab_size=100).samples(0, 1)


def test_data_without_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few"):
        opened(write_documents(tmp_path / "d", (1, 1, 0, 1)), "best_fit")


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """A document index that joins sequences, as other tools write it; empty documents at the end."""
    with ShardWriter(tmp_path / "d", np.uint16) as writer:
        for start, length in ((0, 3), (3, 4), (100, 6), (200, 2), (202, 0), (202, 5)):
            writer.add(start + np.arange(length))
        writer.commit(document_starts=[np.array([0, 2, 3, 6])])
    data = opened(str(tmp_path / "d"), "document")
    (only,) = data.sources.values()
    rows = data.samples(0, only.num_chunks)
    assert sorted(pairs_of(rows.inputs, rows.labels)) == sorted(expected_pairs((7, 6, 7)))
    stream = opened(str(tmp_path / "d"), "stream").samples(0, 2)
    assert stream.documents is not None
    assert (np.diff(stream.documents) == (np.diff(stream.inputs // 100) != 0)).all()


def test_loader_gives_packed_windows_to_ranks(tmp_path: Path) -> None:
    data = opened(write_documents(tmp_path / "d"), "best_fit")
    whole = data.samples(0, 8)
    batches = BatchSchedule((BatchShape(8, 2, SEQ_LEN),))
    found = []
    for rank in range(2):
        loader = TrainingLoader(data, rank=rank, world_size=2, batches=batches)
        found += loader.next_step()
        loader.close()
    assert torch.cat([batch.labels for batch in found]).tolist() == whole.labels.tolist()
    assert [batch.inputs.shape for batch in found] == [(2, SEQ_LEN)] * 4
