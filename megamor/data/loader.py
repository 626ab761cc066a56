"""Batches for the trainer and the evaluator, as torch tensors. The only file of this package that knows torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megamor.config.schema import DataConfig
from megamor.data.dataset import TrainingData, WindowedShard, tokenizer_hash
from megamor.data.phases import SampleOrder
from megamor.errors import ConfigError, DataError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class MicroBatch:
    """`inputs` [b, S] and, for each position, the token that follows: `labels` [b, S], -100 where there is none.

    `documents` [b, S] numbers the documents; None unless `data.document_mask`.
    """

    inputs: Tensor
    labels: Tensor
    documents: Tensor | None = None

    @classmethod
    def from_windows(cls, windows: NDArray[np.int64], documents: NDArray[np.int64] | None = None) -> MicroBatch:
        """Split windows [b, S + 1] into inputs and the labels one token later."""
        tokens = torch.from_numpy(windows)
        numbers = None if documents is None else torch.from_numpy(documents)
        return cls(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), numbers)


class TrainingLoader:
    """The micro-batches of one rank, step by step, prepared in a thread `data.prefetch_steps` ahead.

    Step s of a run takes the next `global_batch_size` samples; rank r of R gets the r-th of R equal contiguous slices,
    cut into micro-batches in order. So all ranks' micro-batches, rank by rank, are the global batch in order, whatever
    the number of ranks and the size of micro-batches.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        if global_batch_size % (world_size * micro_batch_size):
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of {world_size} ranks x "
                f"train.micro_batch_size {micro_batch_size}; change one of them"
            )
        self._data = data
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._slice_size = global_batch_size // world_size
        self._slice_start = rank * self._slice_size
        self._order = data.order(global_batch_size)
        self._consumed = 0
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future[list[MicroBatch]]] = deque()

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks that `next_step` has given out so far: the position in the data."""
        return self._consumed

    @property
    def order(self) -> SampleOrder:
        """The order of the run's samples, with all phases so far."""
        return self._order

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimizer step.

        Raises DataError if a token id is outside the vocabulary. An error stays: the next call raises it again.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        while len(self._pending) <= self._data.prefetch_steps:
            first = self._consumed + len(self._pending) * self._global_batch_size
            self._pending.append(self._thread.submit(self._load, first))
        batches = self._pending[0].result()
        self._pending.popleft()
        self._consumed += self._global_batch_size
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The position in the data as plain data (JSON). The same on all ranks; knows nothing of ranks."""
        return {
            "consumed_samples": self._consumed,
            "phases": self._order.to_state(),
            "fingerprints": self._data.fingerprints(),
            "run.seed": self._data.seed,
            "data.seq_len": self._data.seq_len,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved; a batch size or blend other than the last one opens a new phase there.

        Raises DataError if a data set of that name has other contents now, ConfigError for another seed or seq_len.
        """
        self._data.check_state(state)
        self.close()
        self._consumed = state["consumed_samples"]
        order = SampleOrder.from_state(state["phases"])
        self._order = order.changed_at(self._consumed, self._global_batch_size, self._data.weights)

    def close(self) -> None:
        """End the thread. `next_step` may still be called: it starts another."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._pending.clear()

    def _load(self, first_sample: int) -> list[MicroBatch]:
        first = first_sample + self._slice_start
        windows = _chunks(self._data.windows(first, self._slice_size, self._order), self._micro_batch_size)
        if not self._data.document_mask:
            return [MicroBatch.from_windows(part) for part in windows]
        documents = _chunks(self._data.documents(first, self._slice_size, self._order), self._micro_batch_size)
        return [MicroBatch.from_windows(*parts) for parts in zip(windows, documents, strict=True)]


def _chunks(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class ValidationSet:
    """A shard read in order, for evaluation. Its last window may be short; positions beyond the end have label -100."""

    def __init__(self, name: str, shard: WindowedShard, document_mask: bool = False) -> None:
        self.name = name
        self._document_mask = document_mask
        self._shard = shard
        self._tokens = shard.shard.tokens
        if len(self._tokens) < 2:
            raise DataError(f"{shard.shard.prefix} has {len(self._tokens)} tokens, too few to predict any; add data")

    @property
    def num_sequences(self) -> int:
        """Windows in the whole set, the last one possibly short: every token but the first is a target once."""
        return -(-(len(self._tokens) - 1) // self._shard.seq_len)

    def batches(
        self, rank: int, world_size: int, micro_batch_size: int, max_sequences: int | None = None
    ) -> Iterator[MicroBatch]:
        """This rank's batches [micro_batch_size, S], in the same order every time.

        With `max_sequences`, that many windows spread evenly over the set. Every rank gets the same number of batches,
        so that collectives match; rows beyond the last window are all padding (label -100).
        """
        count = min(self.num_sequences, max_sequences or self.num_sequences)
        chosen = np.arange(count) * self.num_sequences // count
        per_round = world_size * micro_batch_size
        for start in range(0, count, per_round):
            first = start + rank * micro_batch_size
            yield self._batch(chosen[first : first + micro_batch_size], micro_batch_size)

    def _batch(self, numbers: NDArray[np.int64], rows: int) -> MicroBatch:
        seq_len = self._shard.seq_len
        windows = np.full((rows, seq_len + 1), IGNORED_LABEL, np.int64)
        for row, number in enumerate(numbers):
            part = self._tokens[number * seq_len : (number + 1) * seq_len + 1]
            self._shard.check_ids(part)
            windows[row, : len(part)] = part
        documents = None
        if self._document_mask:
            documents = np.zeros((rows, seq_len), np.int64)
            documents[: len(numbers)] = self._shard.documents(numbers)
        batch = MicroBatch.from_windows(windows, documents)
        # Padding must be an id that the embedding has; which one doesn't matter, its label is ignored.
        return replace(batch, inputs=batch.inputs.clamp_min(0))


def open_validation_sets(config: DataConfig, *, vocab_size: int) -> dict[str, ValidationSet]:
    """The sets of `config.validation` by name, checked like training data."""
    tokenizer = tokenizer_hash(config)
    return {
        name: ValidationSet(
            name,
            WindowedShard.open(prefix, seq_len=config.seq_len, vocab_size=vocab_size, tokenizer_sha256=tokenizer),
            config.document_mask,
        )
        for name, prefix in config.validation.items()
    }
