"""The tokens that a network has seen and those that it is measured on, for models of counts to compare it with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megamor.config import Config
from megamor.data.dataset import TrainingData
from megamor.data.loader import ValidationSet


def seen_windows(config: Config, steps: int) -> NDArray[np.int64]:
    """Return the training windows [n, S + 1] of the first `steps` optimizer steps."""
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    rows = data.samples(0, steps * config.train.global_batch_size)
    return np.concatenate((rows.inputs[:, :1], rows.labels), axis=1)


def validation_windows(data: ValidationSet, sequences: int) -> NDArray[np.int64]:
    """Return the windows [n, S + 1] that `megamor evaluate --sequences` measures."""
    batches = data.batches(0, 1, 1, sequences)
    windows = np.concatenate([np.concatenate((b.inputs[:, :1], b.labels), axis=1) for b in batches])
    # A short last window is padded with -100, which the n-gram models don't know.
    return windows[(windows >= 0).all(1)]
