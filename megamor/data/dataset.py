"""The training data of a run: its shards cut into windows, checked against the model, in the order of the run.

A window is `seq_len + 1` tokens of the stream of one source, documents one after the other; window i starts at token
i * seq_len, so neighbours share one token and every token but the first is a target exactly once per epoch. The tail
that doesn't fill a window is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from megamor.config.schema import DataConfig
from megamor.data.indexed import TokenShard
from megamor.data.meta import meta_path, read_meta, sha256_of_file
from megamor.data.order import shuffled_windows
from megamor.data.phases import SampleOrder
from megamor.errors import ConfigError, DataError

_FINGERPRINT_PROBES = 64
_PROBE_BYTES = 4096


@dataclass(frozen=True, eq=False)
class WindowedShard:
    """A shard seen as windows of `seq_len + 1` tokens. `num_windows` counts the full ones."""

    shard: TokenShard
    seq_len: int
    vocab_size: int

    @classmethod
    def open(cls, prefix: str, *, seq_len: int, vocab_size: int, tokenizer_sha256: str | None = None) -> WindowedShard:
        """Open `prefix` for a model of `vocab_size` entries, and check the side file against model and tokenizer.

        Raises DataError if the shard is damaged or was written with a larger vocabulary or with another tokenizer.
        """
        shard = TokenShard.open(prefix)
        meta = read_meta(prefix)
        if meta and meta.vocab_size and meta.vocab_size > vocab_size:
            raise DataError(
                f"{meta_path(prefix)}: the tokenizer has {meta.vocab_size} entries, more than model.vocab_size "
                f"{vocab_size}; raise model.vocab_size or preprocess with the model's tokenizer"
            )
        if meta and meta.tokenizer_sha256 and tokenizer_sha256 and meta.tokenizer_sha256 != tokenizer_sha256:
            raise DataError(
                f"{prefix} was written with tokenizer {meta.tokenizer_name} (sha256 {meta.tokenizer_sha256[:12]}…), "
                f"but data.tokenizer has sha256 {tokenizer_sha256[:12]}…; name the same tokenizer or preprocess again"
            )
        return cls(shard, seq_len, vocab_size)

    @property
    def num_windows(self) -> int:
        """Windows that are full."""
        return max(0, (self.shard.num_tokens - 1) // self.seq_len)

    def windows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the windows `numbers` [n], as [n, seq_len + 1]. Raises DataError for ids outside the vocabulary."""
        tokens = self.shard.tokens
        size = tokens.itemsize
        every = as_strided(tokens, (self.num_windows, self.seq_len + 1), (self.seq_len * size, size), writeable=False)
        picked = every[numbers]
        self.check_ids(picked)
        return picked.astype(np.int64)

    def documents(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the document of each input token of the windows `numbers` [n], as [n, seq_len]."""
        places = numbers[:, None] * self.seq_len + np.arange(self.seq_len)
        starts = self.shard.document_offsets
        return np.searchsorted(starts, places * self.shard.tokens.itemsize, side="right") - 1

    def check_ids(self, tokens: NDArray) -> None:
        """Raise DataError naming the file if an id isn't in the model's vocabulary."""
        if not tokens.size:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"{self.shard.prefix}.bin holds token id {low if low < 0 else high}, but the model's ids are 0 to "
                f"{self.vocab_size - 1} (model.vocab_size); raise it or preprocess with the model's tokenizer"
            )


def tokenizer_hash(config: DataConfig) -> str | None:
    """SHA-256 of the tokenizer file of the run, if it names one. Raises DataError if that can't be read."""
    return sha256_of_file(config.tokenizer) if config.tokenizer else None


def fingerprint(shard: TokenShard) -> str:
    """Identify the contents of a shard, wherever it lies.

    SHA-256 over the whole index, the side file (which hashes all tokens), both sizes, and blocks spread over the
    tokens, so that foreign pairs without a side file are covered too.
    """
    data = shard.tokens.view(np.uint8)
    starts = np.linspace(0, max(0, len(data) - _PROBE_BYTES), _FINGERPRINT_PROBES, dtype=np.int64)
    probes = b"".join(data[start : start + _PROBE_BYTES].tobytes() for start in starts)
    side_file = meta_path(shard.prefix)
    parts = [
        sha256_of_file(f"{shard.prefix}.idx"),
        sha256_of_file(side_file) if side_file.exists() else "no side file",
        str(os.path.getsize(f"{shard.prefix}.idx")),
        str(len(data)),
        hashlib.sha256(probes).hexdigest(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class TrainingData:
    """All training sources of a run. Sources are known by the fingerprint of their contents, so data may be moved."""

    def __init__(
        self,
        sources: Mapping[str, WindowedShard],
        weights: Mapping[str, float],
        *,
        seed: int,
        prefetch_steps: int = 2,
        document_mask: bool = False,
    ) -> None:
        self.sources = dict(sources)
        self.weights = dict(weights)
        self.seed = seed
        self.prefetch_steps = prefetch_steps
        self.document_mask = document_mask
        self.seq_len = next(iter(self.sources.values())).seq_len

    @classmethod
    def open(cls, config: DataConfig, *, seed: int, vocab_size: int) -> TrainingData:
        """Open `config.train` for a run with this seed and a model of `vocab_size` entries.

        Raises ConfigError if no source is named or one twice, DataError if one is damaged, doesn't fit the model or
        the tokenizer, or is too short for one window.
        """
        if not config.train:
            raise ConfigError("data.train names no data set; give at least one prefix")
        sources: dict[str, WindowedShard] = {}
        weights: dict[str, float] = {}
        tokenizer = tokenizer_hash(config)
        for source in config.train:
            shard = WindowedShard.open(
                source.prefix, seq_len=config.seq_len, vocab_size=vocab_size, tokenizer_sha256=tokenizer
            )
            if not shard.num_windows:
                raise DataError(
                    f"{source.prefix} has {shard.shard.num_tokens} tokens, too few for one window of data.seq_len "
                    f"{config.seq_len} and its target; shorten data.seq_len or add data"
                )
            key = fingerprint(shard.shard)
            if key in sources:
                raise ConfigError(
                    f"data.train names the same data twice: {sources[key].shard.prefix} and {source.prefix}; name it "
                    "once, with the sum of the weights"
                )
            sources[key], weights[key] = shard, source.weight
        return cls(
            sources,
            weights,
            seed=seed,
            prefetch_steps=config.prefetch_steps,
            document_mask=config.document_mask,
        )

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each source, by its prefix."""
        return {shard.shard.prefix: key for key, shard in self.sources.items()}

    def order(self, global_batch_size: int = 1) -> SampleOrder:
        """The order of a run that begins with the weights of the configuration."""
        return SampleOrder.start(global_batch_size, self.weights)

    def windows(self, first_sample: int, count: int, order: SampleOrder | None = None) -> NDArray[np.int64]:
        """Tokens of samples `first_sample` to `first_sample + count - 1`, as [count, seq_len + 1].

        `order` is that of the run's loader; without it, that of a run whose blend never changed.
        """
        result = np.empty((count, self.seq_len + 1), np.int64)
        for chosen, shard, numbers in self._located(first_sample, count, order):
            result[chosen] = shard.windows(numbers)
        return result

    def documents(self, first_sample: int, count: int, order: SampleOrder | None = None) -> NDArray[np.int64]:
        """Numbers of the documents of the same samples' input tokens, as [count, seq_len]."""
        result = np.empty((count, self.seq_len), np.int64)
        for chosen, shard, numbers in self._located(first_sample, count, order):
            result[chosen] = shard.documents(numbers)
        return result

    def _located(
        self, first_sample: int, count: int, order: SampleOrder | None
    ) -> Iterator[tuple[NDArray[np.bool_], WindowedShard, NDArray[np.int64]]]:
        """For each source in play: which of the samples are its own, the source, and the numbers of its windows."""
        order = order or self.order()
        sources, positions = order.locate(np.arange(first_sample, first_sample + count))
        for index in np.unique(sources):
            shard = self.sources.get(order.sources[index])
            if shard is None:
                raise DataError(
                    f"samples {first_sample} to {first_sample + count - 1} were partly drawn from a data set that "
                    f"data.train no longer names (fingerprint {order.sources[index][:12]}…); add it again to read them"
                )
            chosen = sources == index
            yield chosen, shard, shuffled_windows(positions[chosen], shard.num_windows, self.seed)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise an error naming the cause if `state` (of a loader) was saved with other data, seed or window length."""
        for name, value in (("data.seq_len", self.seq_len), ("run.seed", self.seed)):
            if state[name] != value:
                raise ConfigError(
                    f"the run was started with {name} {state[name]}, not {value}; the order of samples depends on it: "
                    "put the old value back or start a new run"
                )
        for prefix, current in self.fingerprints().items():
            saved = state["fingerprints"].get(prefix, current)
            if saved != current:
                raise DataError(
                    f"{prefix} isn't the data that the run was started with (fingerprint {saved[:12]}…, now "
                    f"{current[:12]}…); put the old files back, or give the new data another name"
                )
