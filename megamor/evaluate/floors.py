"""The tokens that a network has seen and those that it is measured on, for models of counts to compare it with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megamor.config import Config
from megamor.config.batches import BatchSchedule
from megamor.data.dataset import IGNORED_LABEL, TrainingData
from megamor.data.loader import TrainingLoader, ValidationSet
from megamor.data.shard import TokenShard
from megamor.errors import DataError


def seen_windows(config: Config, steps: int) -> NDArray[np.int64]:
    """Return the text that the first `steps` optimizer steps have read, each window [n, S + 1] once.

    A window has no gap, so samples that are packed from several texts are several windows; -100 follows short ones.
    """
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    loader = TrainingLoader(data, rank=0, world_size=1, batches=BatchSchedule.of(config))
    loader.skip(steps)
    order, seen = loader.order, dict[TokenShard, list[NDArray[np.int64]]]()
    starts = [phase.first_sample for phase in order.phases]
    for first, end in zip(starts, [*starts[1:], loader.consumed_samples], strict=True):
        for found in data.find(first, end - first, order.seq_len_at(first), order) if end > first else ():
            seen.setdefault(found.shard, []).append(np.stack((found.spans.starts, found.spans.lengths), 1))
    texts = [
        shard.tokens[start : start + length + 1]
        for shard, spans in seen.items()
        for start, length in np.unique(np.concatenate(spans), axis=0).tolist()
    ]
    windows = np.full((len(texts), max(map(len, texts))), IGNORED_LABEL, np.int64)
    for window, text in zip(windows, texts, strict=True):
        window[: len(text)] = text
    return windows


def validation_windows(data: ValidationSet, sequences: int) -> NDArray[np.int64]:
    """Return the windows [n, S + 1] that `megamor evaluate --sequences` measures; -100 follows a short last one.

    Raises:
        DataError: only some tokens count, and a model of counts would be measured on others than the network.
    """
    if data.shard.loss_mask is not None:
        raise DataError(f"{data.shard.prefix} has a loss mask, and n-gram floors are of all tokens: ask for no floors")
    batches = data.batches(0, 1, 1, sequences)
    return np.concatenate([np.concatenate((b.inputs[:, :1], b.labels), axis=1) for b in batches]).astype(np.int64)
