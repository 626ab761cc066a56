"""Batches as torch tensors, for training and validation. The only module of `megamor.data` that imports torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megamor.config.batches import BatchSchedule, BatchShape
from megamor.config.schema import DataConfig
from megamor.data.dataset import (
    BatchArrays,
    ShardSpans,
    SourceUse,
    TrainingData,
    describe_use,
    fill_batch,
    forecast,
    open_shards,
)
from megamor.data.order import SampleOrder
from megamor.data.shard import TokenShard
from megamor.data.source import Spans
from megamor.errors import DataError


@dataclass(frozen=True)
class MicroBatch:
    """`inputs` [b, S] and, for each position, the token that follows: `labels` [b, S], -100 where there is none.

    `documents` [b, S] numbers the documents; None unless `data.document_mask`. All are int64, and in pinned memory if
    the loader has `pinned`. `lengths` [b] are the real tokens of each sequence, which padding follows; None means that
    there is no padding.
    """

    inputs: Tensor
    labels: Tensor
    documents: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, seq_len: int, *, documents: bool, pinned: bool = False) -> MicroBatch:
        """Uninitialised tensors."""
        shape = (3 if documents else 2, rows, seq_len)
        if pinned:
            block = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        else:
            # NumPy asks for huge pages. With small ones, the page faults of a fresh block cost more than filling it.
            block = torch.from_numpy(np.empty(shape, np.int64))
        return cls(block[0], block[1], block[2] if documents else None, torch.full((rows,), seq_len))

    def arrays(self) -> BatchArrays:
        """The same memory as NumPy arrays."""
        documents, lengths = (None if x is None else x.numpy() for x in (self.documents, self.lengths))
        return BatchArrays(self.inputs.numpy(), self.labels.numpy(), documents, lengths)

    @property
    def num_tokens(self) -> int:
        """Real tokens, with or without a label."""
        return self.inputs.numel() if self.lengths is None else int(self.lengths.sum())

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """What a model's forward pass takes, on `device`; copies don't wait. Lengths stay on the host."""
        tensors = {"inputs": self.inputs, "labels": self.labels, "documents": self.documents}
        moved: dict[str, Any] = {
            name: None if x is None else x.to(device, non_blocking=True) for name, x in tensors.items()
        }
        if (ids := self.documents) is not None:
            # Counted here because only the device would know later. Neighbouring sequences may have equal ids.
            moved["num_documents"] = len(ids) + int((ids[:, 1:] != ids[:, :-1]).sum())
        # Without padding no lengths are given: all shapes are then static.
        padded = self.num_tokens < self.inputs.numel()
        return moved | {"lengths": tuple(self.lengths.tolist()) if padded and self.lengths is not None else None}

    def split(self, size: int) -> list[MicroBatch]:
        """Micro-batches of `size` rows each, views of the same memory."""
        tensors = (self.inputs, self.labels, self.documents, self.lengths)
        parts = ([None] * len(self.inputs) if x is None else torch.split(x, size) for x in tensors)
        return [MicroBatch(*part) for part in zip(*parts, strict=False)]


@dataclass(frozen=True)
class _Position:
    """Progress of a run through the data: steps done, samples they used, phases so far."""

    step: int
    sample: int
    order: SampleOrder


class TrainingLoader:
    """The micro-batches of one rank, step by step, prepared in a thread `data.prefetch_steps` ahead.

    Each step takes the next `global_batch_size` samples. Rank r of R gets the r-th of R equal contiguous slices, cut
    into micro-batches in order. All ranks' micro-batches, rank by rank, are therefore the global batch in order,
    whatever the number of ranks and the micro-batch size. A new phase starts wherever the blend, or the global batch
    size or sequence length that `batches` gives for a step, differs from the previous step, also when a run resumes.

    `pinned` puts batches into page-locked memory, from which they are copied to a GPU while it computes.
    """

    def __init__(
        self, data: TrainingData, *, rank: int, world_size: int, batches: BatchSchedule, pinned: bool = False
    ) -> None:
        for shape in batches.shapes:
            assert shape.global_batch_size % (world_size * shape.micro_batch_size) == 0, "validate() checks the batch"
        self._data = data
        self._rank, self._world_size = rank, world_size
        self._batches = batches
        self._pinned = pinned
        order = SampleOrder.start(batches.at(0).global_batch_size, batches.at(0).seq_len, data.weights)
        self._given = self._before = _Position(0, 0, order)
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[Future[list[MicroBatch]], _Position]] = deque()

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks that `next_step` has returned so far: the position in the data."""
        return self._given.sample

    @property
    def order(self) -> SampleOrder:
        """The order of the run's samples, with all phases so far."""
        return self._given.order

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimizer step.

        Raises DataError if a token id is outside the vocabulary. So does every later call: the position stays at the
        step that failed.
        """
        # Not in the constructor: `load_state_dict` may still change the position.
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        # The order is extended here, in the caller's thread: only filling the tensors is left to the other one.
        while len(self._pending) <= self._data.config.prefetch_steps:
            at = self._pending[-1][1] if self._pending else self._given
            shape = self._batches.at(at.step)
            order = self._order_at(at, shape)
            future = self._thread.submit(self._load, at.sample, shape, order)
            self._pending.append((future, _Position(at.step + 1, at.sample + shape.global_batch_size, order)))
        batches = self._pending[0][0].result()
        self._before, self._given = self._given, self._pending.popleft()[1]
        return batches

    def skip(self, steps: int) -> None:
        """Continue as if `steps` steps had been returned already. Only before the first `next_step`."""
        for _ in range(steps):
            at, shape = self._given, self._batches.at(self._given.step)
            self._given = _Position(at.step + 1, at.sample + shape.global_batch_size, self._order_at(at, shape))

    def take_back(self) -> None:
        """Undo the last `next_step`: its batches weren't trained on, and the next call will give them again."""
        self.close()
        self._given = self._before

    def epochs(self) -> dict[str, float]:
        """How often each source has been read so far, by its short name."""
        consumed = self._given.order.consumed_at(self._given.sample)
        return {
            self._data.names[key]: consumed.get(key, 0) / source.epoch_tokens
            for key, source in self._data.sources.items()
        }

    def forecast(self, total_steps: int) -> list[SourceUse]:
        """What the run will have read from each source after `total_steps`, counted from the current position."""
        at = self._given
        return forecast(self._data, at.order, self._batches, step=at.step, sample=at.sample, total_steps=total_steps)

    def describe(self, total_steps: int) -> list[str]:
        """Lines on what the run will have read after `total_steps`, followed by warnings."""
        lines = describe_use(self.forecast(total_steps), self._data)
        longest = max(shape.seq_len for shape in self._batches.shapes)
        if longest > self._data.chunk_len:
            lines.append(
                f"warning: the run was started with chunks of {self._data.chunk_len} tokens, so sequences of {longest} "
                "are joined from several unrelated chunks (set data.chunk_len when starting a run to avoid this)"
            )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """The position in the data as plain data (JSON). The same on all ranks, and valid for any number of them."""
        return {
            "steps": self._given.step,
            "consumed_samples": self._given.sample,
            "phases": self._given.order.to_state(),
            "fingerprints": self._data.fingerprints(),
            "run.seed": self._data.seed,
            "data.packing": self._data.config.packing,
            "data.chunk_len": self._data.chunk_len,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was saved; another batch size, sequence length or blend starts a new phase there.

        Raises DataError if a data set has the same prefix but other contents, ConfigError for another seed, packing or
        chunk length.
        """
        self._data = self._data.resumed(state)
        self.close()
        saved = _Position(state["steps"], state["consumed_samples"], SampleOrder.from_state(state["phases"]))
        self._given = replace(saved, order=self._order_at(saved, self._batches.at(saved.step)))

    def close(self) -> None:
        """Stop the thread and drop prefetched batches. A later `next_step` starts another thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._pending.clear()

    def _order_at(self, at: _Position, shape: BatchShape) -> SampleOrder:
        return at.order.changed_at(at.sample, shape.global_batch_size, shape.seq_len, self._data.weights)

    def _load(self, first_sample: int, shape: BatchShape, order: SampleOrder) -> list[MicroBatch]:
        num_rows = shape.global_batch_size // self._world_size
        batch = MicroBatch.empty(
            num_rows, shape.seq_len, documents=self._data.config.document_mask, pinned=self._pinned
        )
        self._data.fill(batch.arrays(), first_sample + self._rank * num_rows, order)
        return batch.split(shape.micro_batch_size)


class ValidationSet:
    """A shard read in order in windows of `seq_len`, for evaluation. Every token but the first is a label once.

    Packing doesn't apply. The last window may be short; padding follows it. Where the shard has a loss mask, only the
    tokens that count are labels; `all_tokens` is the same set without the mask.
    """

    def __init__(
        self, name: str, shard: TokenShard, *, seq_len: int, vocab_size: int, document_mask: bool = False
    ) -> None:
        self.name = name
        self.shard = shard
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self._document_mask = document_mask
        if shard.num_tokens < 2:
            raise DataError(f"{shard.prefix} has {shard.num_tokens} tokens, too few to predict any; add data")

    @property
    def all_tokens(self) -> ValidationSet:
        found = copy(self)
        found.shard = replace(self.shard, loss_mask=None)
        return found

    @property
    def num_sequences(self) -> int:
        """Windows in the whole set, the last one possibly short."""
        return -(-(self.shard.num_tokens - 1) // self._seq_len)

    def starts(self, max_sequences: int | None = None) -> NDArray[np.int64]:
        """Tokens of the shard at which the windows begin, or `max_sequences` of them spread evenly over the set."""
        count = min(self.num_sequences, max_sequences or self.num_sequences)
        # Evenly spread instead of the first ones: the beginning of a data set is often of one source.
        return np.arange(count) * self.num_sequences // count * self._seq_len

    def batches(
        self, rank: int, world_size: int, micro_batch_size: int, max_sequences: int | None = None
    ) -> Iterator[MicroBatch]:
        """This rank's batches [micro_batch_size, S], in the same order every time.

        With `max_sequences`, that many windows spread evenly over the set. Every rank gets the same number of batches,
        so that collectives match; rows beyond the last window are padding (length 0).
        """
        all_starts, per_round = self.starts(max_sequences), world_size * micro_batch_size
        for start in range(0, len(all_starts), per_round):
            first = start + rank * micro_batch_size
            starts = all_starts[first : first + micro_batch_size]
            lengths = np.minimum(self.shard.num_tokens - 1 - starts, self._seq_len)
            spans = Spans(np.arange(len(starts)) * self._seq_len, starts, lengths)
            batch = MicroBatch.empty(micro_batch_size, self._seq_len, documents=self._document_mask)
            fill_batch(batch.arrays(), [ShardSpans(self.shard, spans, inside_documents=False)], self._vocab_size)
            yield batch


def open_validation_sets(config: DataConfig, *, vocab_size: int) -> dict[str, ValidationSet]:
    """The sets of `config.validation` by name. Raises DataError as `open_shards` does."""
    shards = open_shards(config.validation, config, vocab_size=vocab_size)
    return {
        name: ValidationSet(
            name, shard, seq_len=config.seq_len, vocab_size=vocab_size, document_mask=config.document_mask
        )
        for name, shard in shards.items()
    }
