"""Where the samples of a step come from: documents and token ranges, without reading any other step.

The order of a run's samples is a pure function of its seed, its data and the phases that its checkpoints record, so
any step can be looked up, while the run trains and after it ended.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megamor.analysis.statistics import Array
from megamor.checkpoint import TrainerState, open_checkpoint
from megamor.checkpoint.layout import TOKENIZER_FILE
from megamor.codec import TextCodec, read_end_of_text
from megamor.config import config_from_yaml, expand_paths
from megamor.config.batches import BatchSchedule
from megamor.data.dataset import ShardSpans, TrainingData
from megamor.data.loader import TrainingLoader
from megamor.data.meta import read_meta
from megamor.data.order import SampleOrder
from megamor.errors import CheckpointError, ConfigError
from megamor.metrics.sinks import read_jsonl

SCHEMA = "megamor-trace/1"
SHOWN_TOKENS = 24


def trace(run: str | Path, step: int, sample: int | None = None) -> dict[str, Any]:
    """The samples of optimizer step `step` (from 1) of a run, or only the one with number `sample` (over all steps).

    Each sample has `pieces` in reading order, one for each document: `prefix` and `source` of the data set, `document`
    (from 0), `tokens` [first, end) of the document that are inputs, `column` in the sample, `line` of the document at
    which it begins and its first `text` (None without a tokenizer); where the side file records the texts, `file` and
    `document_of_file`, which counts the documents of that file in this data set. `trained`: whether the run has got
    there. `left_out`: samples that rollbacks have skipped.

    Raises:
        CheckpointError: the run has no checkpoint.
        ConfigError, DataError: there is no such step or sample; the data isn't there, or isn't what the run read.
    """
    checkpoint = open_checkpoint(run)
    if step < 1:
        raise ConfigError(f"step {step}: steps are counted from 1")
    state = TrainerState.read(checkpoint.directory)
    if not state.data:
        raise CheckpointError(f"{checkpoint.directory} holds weights only: give a run that was trained here")
    config = expand_paths(config_from_yaml(checkpoint.config_yaml, str(checkpoint.directory)))
    opened = TrainingData.open(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    loader = TrainingLoader(opened, rank=0, world_size=1, batches=BatchSchedule.of(config))
    loader.load_state_dict(state.data)
    # Beyond the checkpoint, the run continues by its configuration.
    loader.skip(max(0, step - state.step))
    left_out = [(first, end) for first, end in state.components.get("guard", {}).get("left_out", [])]
    samples = samples_of(loader.order, left_out, step)
    if sample is not None and sample not in samples:
        raise ConfigError(f"step {step} has the samples {samples[0]} to {samples[-1]}, and {sample} is none of them")
    metrics = checkpoint.directory.parents[1] / "metrics.jsonl"
    logged = [record.get("step", 0) for record in read_jsonl(metrics)] if metrics.is_file() else []
    data, seq_len = opened.resumed(state.data), loader.order.seq_len_at(samples[0])
    chosen = samples if sample is None else range(sample, sample + 1)
    pieces: list[list[dict[str, Any]]] = [[] for _ in chosen]
    codec, tokenizer = None, checkpoint.directory / TOKENIZER_FILE
    if tokenizer.is_file():
        codec = TextCodec.load(tokenizer, record=read_end_of_text(checkpoint.directory))
    for found in data.find(chosen[0], len(chosen), seq_len, loader.order):
        for slot, piece in pieces_of(found, codec):
            name = next(name for key, name in data.names.items() if data.sources[key].shard is found.shard)
            pieces[slot // seq_len].append({"source": name, "column": slot % seq_len, **piece})
    return {
        "schema": SCHEMA,
        "run": config.run.name,
        "step": step,
        "trained": step <= max([state.step, *logged]),
        "seq_len": seq_len,
        "left_out": left_out,
        "samples": [{"sample": number, "pieces": found} for number, found in zip(chosen, pieces, strict=True)],
    }


def samples_of(order: SampleOrder, left_out: Sequence[tuple[int, int]], step: int) -> range:
    """Numbers of the samples of step `step` (from 1), given those [first, end) that rollbacks left out."""
    # A rollback takes the run back to an earlier step and on to the samples after those that it had read. So the steps
    # take what is not left out, in order, each as many as its phase says.
    before, ends = step - 1, [phase.first_sample for phase in order.phases[1:]]
    for phase, end in zip(order.phases, [*ends, sys.maxsize], strict=True):
        size, first = phase.global_batch_size, phase.first_sample
        for gap, resumed in sorted([*left_out, (end, end)]):
            steps = max(0, min(gap, end) - first) // size
            if before < steps:
                return range(first + before * size, first + (before + 1) * size)
            before, first = before - steps, max(first, resumed)
    raise ConfigError(f"step {step} is beyond all that can be counted")


def pieces_of(found: ShardSpans, codec: TextCodec | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """For each document in the spans: the slot at which it begins, and what `trace` says about it."""
    shard = found.shard
    meta = read_meta(shard.prefix)
    files = meta.sources if meta and not any(source.get("scattered") for source in meta.sources) else ()
    ends = list(accumulate(int(source.get("documents", 0)) for source in files))
    files = files if ends[-1:] == [shard.num_documents] else ()
    spans = (found.spans.slots.tolist(), found.spans.starts.tolist(), found.spans.lengths.tolist())
    for slot, start, length in zip(*spans, strict=True):
        first, last = shard.documents_at(np.array([start, start + length - 1])).tolist()
        for document in range(first, last + 1):
            begin, end = shard.starts_of(np.array([document, document + 1])).tolist()
            low, high = max(begin, start), min(end, start + length)
            if low >= high:  # a document without tokens
                continue
            piece = {"prefix": shard.prefix, "document": document, "tokens": [low - begin, high - begin]}
            piece |= {"document_tokens": end - begin, "line": None, "text": None}
            if codec is not None:
                piece["line"] = 1 + line_breaks(codec, shard.tokens[begin:low])
                piece["text"] = codec.decode(shard.tokens[low : min(high, low + SHOWN_TOKENS)].tolist(), False)
            if files:
                file = int(np.searchsorted(ends, document, side="right"))
                piece |= {"file": files[file]["name"], "document_of_file": document - [0, *ends][file]}
            yield slot + low - start, piece


def line_breaks(codec: TextCodec, tokens: Array) -> int:
    """Line breaks in the text of `tokens`."""
    ids, counts = np.unique(tokens, return_counts=True)
    return sum(n * codec.name(token).count("\n") for token, n in zip(ids.tolist(), counts.tolist(), strict=True))
