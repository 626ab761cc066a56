"""The training data of a run: sources checked against the model and each other, and batches filled from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamor.config.batches import BatchSchedule
from megamor.config.schema import DataConfig
from megamor.data.meta import ShardMeta, contents_shared, fingerprint, meta_path, read_meta, sha256_of_tokenizer
from megamor.data.order import SampleOrder
from megamor.data.packing import ranges
from megamor.data.shard import TokenShard
from megamor.data.source import PackedSource, Source, Spans, StreamSource
from megamor.errors import ConfigError, DataError

IGNORED_LABEL = -100


def open_shards(prefixes: Mapping[str, str], config: DataConfig, *, vocab_size: int) -> dict[str, TokenShard]:
    """Open the shards of `prefixes`, keyed alike, and check their side files against model, tokenizer and each other.

    Raises DataError if a shard is damaged, was written with a larger vocabulary than the model's or with another
    tokenizer than `config.tokenizer`, or if two shards were written with different tokenizers.
    """
    tokenizer = sha256_of_tokenizer(config.tokenizer) if config.tokenizer else None
    shards: dict[str, TokenShard] = {}
    first: tuple[str, ShardMeta] | None = None
    for key, prefix in prefixes.items():
        shards[key], meta = TokenShard.open(prefix), read_meta(prefix)
        if meta and meta.vocab_size and meta.vocab_size > vocab_size:
            raise DataError(
                f"{meta_path(prefix)}: the tokenizer has {meta.vocab_size} entries, more than model.vocab_size "
                f"{vocab_size}; raise model.vocab_size or preprocess with the model's tokenizer"
            )
        if not meta or not meta.tokenizer_sha256:  # other projects don't record the tokenizer
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


def announce_shared_data(config: DataConfig) -> list[str]:
    """A warning for each validation set that is trained on, and for each source that another source contains."""
    prefixes = [source.prefix for source in config.train]
    found = []
    for name, prefix in config.validation.items():
        for other in contents_shared(prefix, prefixes):
            what = f"validation set {name} ({prefix}) is training data" + (f" ({other})" if other != prefix else "")
            found.append(f"{what}: its loss says nothing about unseen text")
    for index, prefix in enumerate(prefixes):
        for other in contents_shared(prefix, prefixes[:index] + prefixes[index + 1 :]):
            found.append(f"data.train: {prefix} is contained in {other}, so its texts have both weights")
    return found


def _tokenizer(meta: ShardMeta) -> str:
    return f"{meta.tokenizer_name} (sha256 {(meta.tokenizer_sha256 or '')[:12]}…)"


def make_source(shard: TokenShard, packing: str, chunk_len: int) -> Source:
    """The shard in chunks of `chunk_len` pairs, packed as `data.packing` says. Raises DataError if there are none."""
    if packing == "stream":
        source: Source = StreamSource(shard, chunk_len)
    else:
        source = PackedSource(shard, chunk_len, join=packing == "best_fit")
    # The first condition spares the pass over all documents that num_chunks of a packed source needs.
    if shard.num_tokens < 2 or not source.num_chunks:
        raise DataError(
            f"{shard.prefix} has {shard.num_tokens} tokens, too few for one window of {chunk_len} tokens and its last "
            "label; shorten data.seq_len (or data.chunk_len) or add data"
        )
    return source


@dataclass(frozen=True)
class BatchArrays:
    """Arrays of a batch, [n, seq_len] int64 and contiguous: `inputs`, the token after each (`labels`), `documents`.

    Equal document numbers in a row mean the same document; numbers ascend through the rows and have no other meaning.
    `lengths` [n] are the real tokens of each row. Padding follows them: input 0, label -100, a document number of its
    own. Labels that the shard's loss mask leaves out are -100 too: the lengths alone tell padding from such tokens.
    """

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    documents: NDArray[np.int64] | None = None
    lengths: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class ShardSpans:
    """The spans of a batch that come from one shard. `inside_documents`: no span crosses into another document."""

    shard: TokenShard
    spans: Spans
    inside_documents: bool


@dataclass(frozen=True)
class TrainingData:
    """All training sources of a run, keyed by the fingerprint of their contents, so that data may be moved.

    `weights` are their fractions of the samples up to a common factor, `names` what metrics call them.
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

        Raises ConfigError if no source is named or one is named twice, DataError if one is damaged, doesn't fit the
        model or the tokenizer, or is too short for one chunk, or if sources don't fit each other.
        """
        if not config.train:
            raise ConfigError("data.train names no data set; give at least one prefix")
        prefixes = [source.prefix for source in config.train]
        # Validation sets are opened only to be checked along with the training data, before anything is computed.
        opened = open_shards({p: p for p in (*prefixes, *config.validation.values())}, config, vocab_size=vocab_size)
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
        weights = source_weights(config, [shard.num_tokens for shard in shards.values()])
        by_key, names = dict(zip(shards, weights, strict=True)), dict(zip(shards, short_names(prefixes), strict=True))
        return cls(config, sources, by_key, names, seed, vocab_size)

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

    def samples(self, first_sample: int, count: int, order: SampleOrder | None = None) -> BatchArrays:
        """Samples `first_sample` to `first_sample + count - 1`, all of one sequence length.

        `order` is that of the run's loader; None stands for a run whose settings never changed.
        """
        order = order or self.order()
        shape = (3 if self.config.document_mask else 2, count, order.seq_len_at(first_sample))
        batch = BatchArrays(*np.empty(shape, np.int64))
        batch = replace(batch, lengths=np.empty(count, np.int64))
        self.fill(batch, first_sample, order)
        return batch

    def fill(self, batch: BatchArrays, first_sample: int, order: SampleOrder) -> None:
        """Write the samples from `first_sample` on into `batch`.

        Raises DataError for a token id outside the vocabulary, and what `find` raises.
        """
        count, seq_len = batch.inputs.shape
        fill_batch(batch, self.find(first_sample, count, seq_len, order), self.vocab_size)

    def find(self, first_sample: int, count: int, seq_len: int, order: SampleOrder) -> list[ShardSpans]:
        """Where `count` samples of `seq_len` pairs are. Slots count through the rows of a batch that they fill.

        Raises DataError for samples of a data set that isn't listed any more.
        """
        samples = np.arange(first_sample, first_sample + count)
        indices, positions = order.locate(samples)
        found = []
        for index in np.unique(indices):
            source = self.sources.get(order.sources[index])
            if source is None:
                raise DataError(
                    f"samples {first_sample} to {first_sample + count - 1} were partly drawn from a data set that "
                    f"data.train no longer names (fingerprint {order.sources[index][:12]}…); add it again to read them"
                )
            chosen = np.flatnonzero(indices == index)
            spans = source.spans(positions[chosen], chosen * seq_len, seq_len, self.seed)
            found.append(ShardSpans(source.shard, _without_gaps(spans, seq_len), source.inside_documents))
        return found

    def resumed(self, state: Mapping[str, Any]) -> TrainingData:
        """The same data in the chunks of the run whose loader saved `state`.

        Raises ConfigError or DataError if that run has other data, another seed, packing or chunk length.
        """
        for name, value in (
            ("run.seed", self.seed),
            ("data.packing", self.config.packing),
            ("data.chunk_len", self.config.chunk_len or state["data.chunk_len"]),
        ):
            if state[name] != value:
                raise ConfigError(
                    f"the run was started with {name} {state[name]}, not {value}; the order of samples depends on it: "
                    "restore the old value or start a new run"
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
    """The last components of paths, as few as are needed to tell all of them apart."""
    longest = max(len(Path(prefix).parts) for prefix in prefixes)
    for length in range(1, longest):
        names = ["/".join(Path(prefix).parts[-length:]) for prefix in prefixes]
        if len(set(names)) == len(names):
            return names
    return list(prefixes)


def source_weights(config: DataConfig, sizes: Sequence[int]) -> list[float]:
    """Weight of each source of `config.train`, of `sizes` tokens: its fraction of the samples, up to a common factor.

    Token budgets serve as weights unchanged. A temperature T multiplies weights by size^(1/T): with T = 1 sources of
    equal weight are read equally often, with a larger T their fractions become more equal.
    """
    weights = [source.weight if source.tokens is None else source.tokens for source in config.train]
    if config.blend_temperature is None:
        return weights
    return [weight * size ** (1 / config.blend_temperature) for weight, size in zip(weights, sizes, strict=True)]


def fill_batch(batch: BatchArrays, found: Sequence[ShardSpans], vocab_size: int) -> None:
    """Copy the spans of `found` into `batch`, one after the other in each row, and fill its rest with padding.

    Raises DataError naming the file if a token id isn't in the model's vocabulary.
    """
    inputs, labels = batch.inputs.ravel(), batch.labels.ravel()
    if not inputs.size:
        return
    seq_len = batch.inputs.shape[1]
    lengths = np.zeros(len(batch.inputs), np.int64)
    for each in found:
        np.add.at(lengths, each.spans.slots // seq_len, each.spans.lengths)
    for each in found:
        for slot, start, length in each.spans.rows():
            inputs[slot : slot + length] = each.shard.tokens[start : start + length]
            labels[slot : slot + length] = each.shard.tokens[start + 1 : start + length + 1]
    # 0 is a valid id for the check below, whatever the vocabulary.
    short = [(row, int(lengths[row])) for row in np.flatnonzero(lengths < seq_len)]
    for row, length in short:
        batch.inputs[row, length:] = batch.labels[row, length:] = 0
    _check_batch_ids(batch, found, vocab_size)
    # Only now, since -100 is no token id.
    for row, length in short:
        batch.labels[row, length:] = IGNORED_LABEL
    for each in found:
        if (mask := each.shard.loss_mask) is not None:
            for slot, start, length in each.spans.rows():
                labels[slot : slot + length][mask[start + 1 : start + length + 1] == 0] = IGNORED_LABEL
    if batch.documents is not None:
        _number_documents(batch.documents, found)
    if batch.lengths is not None:
        batch.lengths[:] = lengths


def _without_gaps(spans: Spans, seq_len: int) -> Spans:
    """`spans` moved to the left of their rows: a row joined from several padded chunks has gaps between them."""
    rows, before = spans.slots // seq_len, np.cumsum(spans.lengths) - spans.lengths
    return replace(spans, slots=rows * seq_len + before - before[np.searchsorted(rows, rows)])


def _check_batch_ids(batch: BatchArrays, found: Sequence[ShardSpans], vocab_size: int) -> None:
    if all(each.shard.dtype.kind == "u" and np.iinfo(each.shard.dtype).max < vocab_size for each in found):
        return
    # One pass for the usual case that all is well: negative ids are huge as unsigned ones, and an input is also the
    # label before it, except for the first one of a span.
    highest = int(batch.labels.view(np.uint64).max())
    for each in found:
        highest = max(highest, int(batch.inputs.ravel()[each.spans.slots].view(np.uint64).max(initial=0)))
    if highest < vocab_size:
        return
    for each in found:
        for start, length in zip(each.spans.starts, each.spans.lengths, strict=True):
            tokens = each.shard.tokens[start : start + length + 1]
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= vocab_size:
                raise DataError(
                    f"{each.shard.prefix}.bin holds token id {low if low < 0 else high}, but the model's ids are 0 to "
                    f"{vocab_size - 1} (model.vocab_size); raise it or preprocess with the model's tokenizer"
                )


def _number_documents(documents: NDArray[np.int64], found: Sequence[ShardSpans]) -> None:
    """Mark every slot at which another document (or span, or padding) begins, and count the marks."""
    begins = documents.ravel()
    begins[:] = 0
    documents[:, 0] = 1
    for each in found:
        spans = each.spans
        ends = spans.slots + spans.lengths
        begins[spans.slots] = 1
        begins[ends[ends < len(begins)]] = 1
        if not each.inside_documents:
            begins[_document_begins(each.shard, spans)] = 1
    np.cumsum(begins, out=begins)


def _document_begins(shard: TokenShard, spans: Spans) -> NDArray[np.int64]:
    """Slots inside `spans` at which a document begins."""
    both = shard.documents_at(np.concatenate((spans.starts, spans.starts + spans.lengths - 1)))
    first, last = both[: len(spans.starts)], both[len(spans.starts) :]
    documents, _ = ranges(first + 1, last - first)
    shift = np.repeat(spans.slots - spans.starts, last - first)
    return shard.starts_of(documents) + shift


@dataclass(frozen=True)
class SourceUse:
    """What a run reads from one source. `repeats_in_step` is the first step (from 1) that needs a second epoch."""

    key: str
    fraction: float
    tokens: int
    epochs: float
    repeats_in_step: int | None


def forecast(
    data: TrainingData, order: SampleOrder, batches: BatchSchedule, *, step: int, sample: int, total_steps: int
) -> list[SourceUse]:
    """The use of each source of `data` by the end of a run that is at `step` and `sample`.

    Pure arithmetic: a few evaluations of the blend for each range of steps with equal batches.
    """
    weights, epoch_tokens = data.weights, {key: source.epoch_tokens for key, source in data.sources.items()}
    repeats: dict[str, int] = {}
    order = order.changed_at(sample, batches.at(step).global_batch_size, batches.at(step).seq_len, weights)
    for first, end, shape in batches.stages(step, total_steps):
        order = order.changed_at(sample, shape.global_batch_size, shape.seq_len, weights)
        after = order.consumed_at(sample + (end - first) * shape.global_batch_size)
        for key in weights.keys() - repeats.keys():
            if after[key] > epoch_tokens[key]:
                # Bisection: after `high` steps the source is used up, after `low` it is not.
                low, high = first, end
                while high - low > 1:
                    middle = (low + high) // 2
                    used = order.consumed_at(sample + (middle - first) * shape.global_batch_size)[key]
                    low, high = (low, middle) if used > epoch_tokens[key] else (middle, high)
                repeats[key] = high
        sample += (end - first) * shape.global_batch_size
    tokens = order.consumed_at(sample)
    total = sum(weights.values())
    return [
        SourceUse(key, weights[key] / total, tokens[key], tokens[key] / epoch_tokens[key], repeats.get(key))
        for key in weights
    ]


def describe_use(uses: Sequence[SourceUse], data: TrainingData) -> list[str]:
    """What a run will read, a line for each source, and a warning for each that is used up before the end."""
    lines, warnings = [], []
    width = max(map(len, data.names.values()))
    for use in uses:
        source, name = data.sources[use.key], data.names[use.key]
        packed = data.config.packing != "stream"
        padding = f", {1 - source.num_pairs / source.epoch_tokens:.2%} padding" if packed else ""
        lines.append(
            f"data  {name:<{width}}  {use.fraction:7.2%} of the samples, {use.tokens:,} tokens, {use.epochs:.2f} "
            f"epochs of {source.epoch_tokens:,}{padding}"
        )
        if use.repeats_in_step is not None and data.config.on_exhausted == "repeat":
            warnings.append(
                f"warning: {name} is used up in step {use.repeats_in_step:,} and then read again, {use.epochs:.2f} "
                "times in the whole run (data.on_exhausted: stop ends the run there)"
            )
        elif use.repeats_in_step is not None:
            last = use.repeats_in_step - 1
            warnings.append(
                f"warning: the run ends early, after step {last:,}, because {name} is used up (data.on_exhausted: "
                f"stop; all steps would read it {use.epochs:.2f} times). The learning rate won't have finished its "
                f"schedule by then unless train.max_steps is {last}"
            )
        if source.shard.loss_mask is not None and not packed:
            warnings.append(
                f"warning: {name} has a loss mask, and data.packing: stream cuts documents anywhere, so that answers "
                "may be in another window than their prompts; best_fit and document keep them together"
            )
    return lines + warnings
