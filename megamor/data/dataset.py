"""The training data of a run: its sources, checked against the model and each other, in the order of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megamor.config.schema import DataConfig
from megamor.data.epochs import shares
from megamor.data.fingerprint import fingerprint
from megamor.data.meta import ShardMeta, meta_path, read_meta, sha256_of_file
from megamor.data.phases import SampleOrder
from megamor.data.rows import Filling, Rows, fill_rows
from megamor.data.shard import TokenShard
from megamor.data.source import PackedSource, Source, StreamSource
from megamor.errors import ConfigError, DataError


def open_shards(prefixes: Mapping[str, str], config: DataConfig, *, vocab_size: int) -> dict[str, TokenShard]:
    """Open the shards of `prefixes`, keyed alike, and check their side files against model, tokenizer and each other.

    Raises DataError if a shard is damaged, was written with a larger vocabulary, with another tokenizer than
    `config.tokenizer`, or if two were written with different ones.
    """
    tokenizer = sha256_of_file(config.tokenizer) if config.tokenizer else None
    shards: dict[str, TokenShard] = {}
    first: tuple[str, ShardMeta] | None = None
    for key, prefix in prefixes.items():
        shards[key], meta = TokenShard.open(prefix), read_meta(prefix)
        if meta is None:  # of other projects, which don't say
            continue
        if meta.vocab_size and meta.vocab_size > vocab_size:
            raise DataError(
                f"{meta_path(prefix)}: the tokenizer has {meta.vocab_size} entries, more than model.vocab_size "
                f"{vocab_size}; raise model.vocab_size or preprocess with the model's tokenizer"
            )
        if not meta.tokenizer_sha256:
            continue
        if tokenizer and meta.tokenizer_sha256 != tokenizer:
            raise DataError(
                f"{prefix} was written with tokenizer {_tokenizer(meta)}, but data.tokenizer has sha256 "
                f"{tokenizer[:12]}…; name the same tokenizer or preprocess again"
            )
        first = first or (prefix, meta)
        if meta.tokenizer_sha256 != first[1].tokenizer_sha256:
            raise DataError(
                f"the data sets were written with different tokenizers: {first[0]} with {_tokenizer(first[1])}, "
                f"{prefix} with {_tokenizer(meta)}; preprocess one of them again with the other's"
            )
    return shards


def _tokenizer(meta: ShardMeta) -> str:
    return f"{meta.tokenizer_name} (sha256 {(meta.tokenizer_sha256 or '')[:12]}…)"


def make_source(shard: TokenShard, packing: str, chunk_len: int) -> Source:
    """The shard in chunks of `chunk_len` pairs, packed as `data.packing` says. Raises DataError if there are none."""
    if packing == "stream":
        source: Source = StreamSource(shard, chunk_len)
        few = shard.num_tokens <= chunk_len
    else:
        source = PackedSource(shard, chunk_len, join=packing == "best_fit")
        few = shard.num_tokens < 2
    if few or not source.num_chunks:
        raise DataError(
            f"{shard.prefix} has {shard.num_tokens} tokens, too few for one window of {chunk_len} tokens and its last "
            "label; shorten data.seq_len (or data.chunk_len) or add data"
        )
    return source


@dataclass(frozen=True)
class TrainingData:
    """All training sources of a run. Sources are known by the fingerprint of their contents, so data may be moved.

    `weights` are their shares of the samples up to a factor, `names` what metrics call them.
    """

    config: DataConfig
    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    names: Mapping[str, str]
    seed: int
    vocab_size: int

    @classmethod
    def open(cls, config: DataConfig, *, seed: int, vocab_size: int) -> TrainingData:
        """Open `config.train` for a run with this seed and a model of `vocab_size` entries.

        Raises ConfigError if no source is named or one twice, DataError if one is damaged, doesn't fit the model or
        the tokenizer, or is too short for one chunk, or if sources don't fit each other.
        """
        if not config.train:
            raise ConfigError("data.train names no data set; give at least one prefix")
        prefixes = [source.prefix for source in config.train]
        opened = open_shards(
            {**{prefix: prefix for prefix in prefixes}, **{p: p for p in config.validation.values()}},
            config,
            vocab_size=vocab_size,
        )
        shards: dict[str, TokenShard] = {}
        for prefix in prefixes:
            key = fingerprint(opened[prefix])
            if key in shards:
                raise ConfigError(
                    f"data.train names the same data twice: {shards[key].prefix} and {prefix}; name it once, with the "
                    "sum of the weights"
                )
            shards[key] = opened[prefix]
        chunk_len = config.chunk_len or config.seq_len
        sources = {key: make_source(shard, config.packing, chunk_len) for key, shard in shards.items()}
        weights = shares(config, [shard.num_tokens for shard in shards.values()])
        return cls(
            config,
            sources,
            dict(zip(shards, weights, strict=True)),
            dict(zip(shards, short_names(prefixes), strict=True)),
            seed,
            vocab_size,
        )

    @property
    def chunk_len(self) -> int:
        """Pairs in a chunk; the same for all sources."""
        return next(iter(self.sources.values())).chunk_len

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each source, by its prefix."""
        return {source.shard.prefix: key for key, source in self.sources.items()}

    def order(self, global_batch_size: int = 1) -> SampleOrder:
        """The order of a run that begins with the sequence length and the weights of the configuration."""
        return SampleOrder.start(global_batch_size, self.config.seq_len, self.weights)

    def samples(self, first_sample: int, count: int, order: SampleOrder | None = None) -> Rows:
        """Samples `first_sample` to `first_sample + count - 1`, all of one sequence length.

        `order` is that of the run's loader; without it, that of a run in which nothing ever changed.
        """
        order = order or self.order()
        rows = Rows.empty(count, order.seq_len_at(first_sample), documents=self.config.document_mask)
        self.fill(rows, first_sample, order)
        return rows

    def fill(self, rows: Rows, first_sample: int, order: SampleOrder) -> None:
        """Write the samples from `first_sample` on into `rows`.

        Raises DataError if a token id is outside the vocabulary, or a source of that time isn't named any more.
        """
        count, seq_len = rows.inputs.shape
        samples = np.arange(first_sample, first_sample + count)
        indices, positions = order.locate(samples)
        fillings = []
        for index in np.unique(indices):
            source = self.sources.get(order.sources[index])
            if source is None:
                raise DataError(
                    f"samples {first_sample} to {first_sample + count - 1} were partly drawn from a data set that "
                    f"data.train no longer names (fingerprint {order.sources[index][:12]}…); add it again to read them"
                )
            chosen = np.flatnonzero(indices == index)
            pieces = source.pieces(positions[chosen], chosen * seq_len, seq_len, self.seed)
            fillings.append(Filling(source.shard, pieces, source.inside_documents))
        fill_rows(rows, fillings, self.vocab_size)

    def resumed(self, state: Mapping[str, Any]) -> TrainingData:
        """The same data in the chunks of the run whose loader gave `state`.

        Raises an error naming the cause if that run has other data, another seed, packing or chunk length.
        """
        for name, value in (
            ("run.seed", self.seed),
            ("data.packing", self.config.packing),
            ("data.chunk_len", self.config.chunk_len or state["data.chunk_len"]),
        ):
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
        if state["data.chunk_len"] == self.chunk_len:
            return self
        sources = {
            key: make_source(source.shard, self.config.packing, state["data.chunk_len"])
            for key, source in self.sources.items()
        }
        return replace(self, sources=sources)


def short_names(prefixes: Sequence[str]) -> list[str]:
    """The last parts of paths, as many of them as are needed to tell all of them apart."""
    longest = max(len(Path(prefix).parts) for prefix in prefixes)
    for length in range(1, longest):
        names = ["/".join(Path(prefix).parts[-length:]) for prefix in prefixes]
        if len(set(names)) == len(names):
            return names
    return list(prefixes)
