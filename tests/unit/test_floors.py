"""Floors are estimated on exactly what a network has read, and measured where it is measured."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamor.config import Config, SourceConfig
from megamor.config.batches import BatchSchedule
from megamor.config.schema import DataConfig, ModelConfig, RampConfig, RunConfig, TrainConfig
from megamor.data.dataset import TrainingData
from megamor.data.loader import TrainingLoader, open_validation_sets
from megamor.evaluate.floors import seen_windows, validation_windows
from megamor.evaluate.ngram import NGramModel
from tests.unit.test_data_packing import write_documents

LENGTHS = (5, 1, 9, 20, 3, 17, 2, 0, 8, 8, 33, 4, 9, 12)


def config_for(prefix: str, packing: str, ramp: tuple[RampConfig, ...] = ()) -> Config:
    data = DataConfig(train=(SourceConfig(prefix),), validation={"a": prefix}, seq_len=8, packing=packing)  # type: ignore[arg-type]
    train = TrainConfig(global_batch_size=2, micro_batch_size=1, max_steps=4, ramp=ramp)
    return Config(run=RunConfig(seed=1), model=ModelConfig(vocab_size=10_000), data=data, train=train)


def read_pairs(config: Config, steps: int) -> Counter[tuple[int, int]]:
    """(input, label) of everything that the loader of a run gives in `steps` steps."""
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    loader, found = TrainingLoader(data, rank=0, world_size=1, batches=BatchSchedule.of(config)), Counter[Any]()
    for _ in range(steps):
        for batch in loader.next_step():
            valid = batch.labels >= 0
            found.update(zip(batch.inputs[valid].tolist(), batch.labels[valid].tolist(), strict=True))
    loader.close()
    return found


RAMP = (RampConfig(until_step=2, global_batch_size=1, seq_len=4),)


@pytest.mark.parametrize("ramp", [(), RAMP], ids=["constant", "ramp"])
@pytest.mark.parametrize("packing", ["stream", "best_fit", "pad"])
def test_windows_are_what_the_run_has_read(packing: str, ramp: tuple[RampConfig, ...], tmp_path: Path) -> None:
    config = config_for(write_documents(tmp_path / "a", LENGTHS), packing, ramp)
    windows = seen_windows(config, 4)
    pairs = Counter((a, b) for row in windows.tolist() for a, b in pairwise(row) if b != -100)
    assert pairs == read_pairs(config, 4)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_windows_that_are_read_twice_count_once(packing: str, tmp_path: Path) -> None:
    config = config_for(write_documents(tmp_path / "a", LENGTHS), packing)
    pairs = read_pairs(config, 60)
    assert min(pairs.values()) > 1
    windows = seen_windows(config, 60)
    assert (windows[:, 1:] != -100).sum() == len(pairs)


def test_short_windows_count_like_whole_ones() -> None:
    """One long row, or its pieces with padding: the same counts, and the same loss of what has the same context."""
    whole = np.array([[1, 2, 1, 3, 1, 2]])
    padded = np.array([[1, 2, 1, 3, 1, 2, -100, -100]])
    for order in (1, 2, 3):
        one, other = (NGramModel.fit(windows, order, 5) for windows in (whole, padded))
        assert one.nll(whole) == other.nll(padded) == other.nll(whole)
    pieces = np.array([[1, 2, 1, 3], [3, 1, 2, -100]])  # they overlap by a token, which is a target once
    unigram = NGramModel.fit(pieces, 1, 5)
    assert unigram.probabilities(np.zeros((2, 0)), [2, 1]) == pytest.approx(
        [0.384, 0.384]
    )  # discount 0.2: 1.8 / 5 + 0.12 / 5
    assert unigram.nll(np.array([[4, 2, -100], [4, 2, 1]])) == pytest.approx(-math.log(0.384))


def test_the_short_last_window_is_measured_too(tmp_path: Path) -> None:
    config = config_for(write_documents(tmp_path / "a", (30,)), "stream")
    data = next(iter(open_validation_sets(config.data, vocab_size=10_000).values()))
    windows = validation_windows(data, data.num_sequences)
    assert windows[-1].tolist() == [24, 25, 26, 27, 28, 29, -100, -100, -100]
    assert (windows[:, 1:] != -100).sum() == 29
