"""How fast batches come from token shards, on one thread and without prefetching.

Two data sets of made-up tokens are written into a temporary directory: a real one, for every packing, and an index of
many documents over an empty file, to time what grows with their number.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from megamor.bench.report import Column, Row, Table, number, provenance, quartiles, spread
from megamor.config import DataConfig, SourceConfig
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.corpus.writer import ShardWriter
from megamor.corpus.writer import write_index as complete_index
from megamor.data.dataset import TrainingData
from megamor.data.loader import TrainingLoader
from megamor.data.shard import HEADER, TokenShard

SCHEMA = "megamor-bench-loader/1"
VOCABULARY = 50_304
SHAPES = (BatchShape(256, 16, 2048), BatchShape(8, 4, 256))
"""One GPU's fraction of a large batch, and the quickstart's batch."""
PACKINGS = (("stream", False), ("stream", True), ("best_fit", True), ("document", True))
_WRITE_CHUNK = 10_000_000


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure both data sets."""
    with TemporaryDirectory(dir=args.directory) as folder:
        real = write_documents(Path(folder) / "real", args.tokens)
        report["cases"] = [case for shape in SHAPES for case in measure_shape(real, shape, args.seconds)]
        report["documents"] = measure_documents(write_index(Path(folder) / "index", args.documents))
    save()


def document_lengths(count: int, generator: np.random.Generator) -> np.ndarray:
    """Lengths like those of web pages: half are under 400 tokens, the mean is 700, a few are very long."""
    return np.minimum(generator.lognormal(6.0, 1.05, count) + 1, 500_000).astype(np.int32)


def write_documents(prefix: Path, num_tokens: float, vocab_size: int = VOCABULARY) -> str:
    """Write a data set of random ids; returns its prefix."""
    generator = np.random.default_rng(0)
    with ShardWriter(prefix, np.uint16) as writer:
        for length in document_lengths(max(1, int(num_tokens / 700)), generator).tolist():
            writer.add(generator.integers(0, vocab_size, length, dtype=np.uint16))
        writer.commit()
    return str(prefix)


def write_index(prefix: Path, num_documents: int) -> str:
    """Write an index of so many documents; its tokens are a hole in a file, all of them 0. Returns its prefix."""
    generator, dtype = np.random.default_rng(1), np.dtype("<u2")
    total = 0
    with open(f"{prefix}.idx", "w+b") as index:
        index.seek(HEADER.size)
        # In chunks: the arrays of hundreds of millions of documents would not all fit into memory.
        for done in range(0, num_documents, _WRITE_CHUNK):
            lengths = document_lengths(min(_WRITE_CHUNK, num_documents - done), generator)
            index.write(lengths.tobytes())
            total += int(lengths.sum(dtype=np.int64))
        complete_index(index, num_documents, total, dtype)
    with open(f"{prefix}.bin", "wb") as tokens:
        os.truncate(tokens.fileno(), total * dtype.itemsize)
    return str(prefix)


def open_data(prefix: str, packing: str, document_mask: bool, seq_len: int) -> TrainingData:
    """The data set as a run would open it."""
    config = DataConfig(
        train=(SourceConfig(prefix),),
        seq_len=seq_len,
        packing=packing,  # type: ignore[arg-type]
        document_mask=document_mask,
        prefetch_steps=0,
    )
    return TrainingData.open(config, seed=0, vocab_size=VOCABULARY)


def measure_shape(prefix: str, shape: BatchShape, seconds: float) -> Iterator[dict[str, Any]]:
    """The cases of one batch shape: every packing, and what to compare them with."""
    batch, schedule = shape.global_batch_size, BatchSchedule((shape,))
    for packing, mask in PACKINGS:
        loader = TrainingLoader(open_data(prefix, packing, mask, shape.seq_len), rank=0, world_size=1, batches=schedule)
        label = f"{packing}, document mask" if mask else f"{packing}, no mask"
        yield summary(label, shape, time_calls(lambda _: loader.next_step(), seconds))  # noqa: B023
        loader.close()
    data = open_data(prefix, "stream", False, shape.seq_len)
    order = data.order(batch)
    (source,) = data.sources.values()

    def arithmetic(step: int) -> None:
        _, positions = order.locate(np.arange(step * batch, (step + 1) * batch))
        source.spans(positions, np.arange(batch) * shape.seq_len, shape.seq_len, data.seed)

    tokens = source.shard.tokens
    windows = as_strided(
        tokens, (source.num_chunks, shape.seq_len + 1), (shape.seq_len * tokens.itemsize, tokens.itemsize)
    )
    generator = np.random.default_rng(2)

    def gather(_: int) -> None:
        windows[generator.integers(0, len(windows), batch)].astype(np.int64)

    yield summary("order of samples alone", shape, time_calls(arithmetic, seconds))
    yield summary("NumPy gather alone", shape, time_calls(gather, seconds))


def time_calls(step: Callable[[int], object], seconds: float) -> list[float]:
    """Seconds of each call of `step` with 3, 4, 5, …; the first three calls are a warm-up."""
    for index in range(3):
        step(index)
    found: list[float] = []
    started = time.perf_counter()
    while not found or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        step(3 + len(found))
        found.append(time.perf_counter() - begun)
    return found


def summary(label: str, shape: BatchShape, seconds: list[float]) -> dict[str, Any]:
    """One row of the report."""
    found = quartiles(seconds)
    return {
        "label": label,
        "batch_size": shape.global_batch_size,
        "seq_len": shape.seq_len,
        "steps": len(seconds),
        "step_seconds": found,
        "tokens_per_second": shape.tokens / found["median"],
    }


def measure_documents(prefix: str) -> dict[str, Any]:
    """What an index of many documents costs: seconds of each operation, and best fit's fraction of padding."""
    seq_len = SHAPES[0].seq_len
    found: dict[str, Any] = {"documents": TokenShard.open(prefix).num_documents}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = action()
        found[name] = time.perf_counter() - begun
        return result

    timed("open_index_seconds", lambda: TokenShard.open(prefix))
    stream = timed("open_stream_seconds", lambda: open_data(prefix, "stream", True, seq_len))
    timed("first_stream_batch_seconds", lambda: stream.samples(10**6, 16))
    packed = timed("open_best_fit_seconds", lambda: open_data(prefix, "best_fit", True, seq_len))
    timed("first_best_fit_batch_seconds", lambda: packed.samples(10**6, 16))
    (source,) = packed.sources.values()
    return {**found, "best_fit_padding": 1 - source.num_pairs / source.epoch_tokens}


def tables(report: Row) -> Iterator[Table]:
    """The loader's speed, and what many documents cost."""
    documents, machine = report["documents"], report["machine"]
    columns = (
        Column("batches of", lambda row: f"{row['batch_size']} × {row['seq_len']}, {row['label']}", left=True),
        Column("M tokens/s", number("tokens_per_second", ",.1f", 1e-6)),
        Column("step, ms (quartiles)", spread("step_seconds", ".2f", 1e3)),
    )
    note = (
        f"{documents['documents']:,} documents: opened in {documents['open_stream_seconds']:.2f} s as a stream, in "
        f"{documents['open_best_fit_seconds']:.1f} s with best-fit packing ({documents['best_fit_padding']:.3%} "
        f"padding); the first batch took {documents['first_stream_batch_seconds']:.3f} s and "
        f"{documents['first_best_fit_batch_seconds']:.3f} s. One thread, no prefetching; {machine['cpu']}, load "
        f"{machine['load_average']:.1f}, {provenance(report)}."
    )
    yield Table(columns, report["cases"], "Batches from the data loader.", (note,))
