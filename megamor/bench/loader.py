"""Measure how fast training data come from token shards.

examples:
  megamor bench loader --json benchmarks/results/loader_mine.json
  megamor bench loader --documents 100000000 --directory /scratch --json out.json

Writes two data sets of made-up tokens into a temporary directory: a real one, from which the loader gives batches as
fast as it can under each packing, on one thread and without reading ahead; and an index of `--documents` documents over
an empty file, to time what grows with their number. Beside the loader: copying the same windows with NumPy and nothing
else, and the arithmetic of the order of samples alone. Files are in the page cache: a disk is not what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from rich.console import Console
from rich.table import Table

from megamor.bench.origin import describe_origin
from megamor.bench.train import quartiles
from megamor.config import DataConfig, SourceConfig
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.corpus.writer import ShardWriter
from megamor.data import TokenShard, TrainingData, TrainingLoader
from megamor.data.shard import CODE_OF_DTYPE, HEADER, MAGIC, VERSION
from megamor.errors import user_errors

SCHEMA = "megamor-bench-loader/1"
VOCABULARY = 50_304
SHAPES = (BatchShape(256, 16, 2048), BatchShape(8, 4, 256))
"""A GPU's share of a large batch, and the quickstart's."""
PACKINGS = (("stream", False), ("stream", True), ("best_fit", True), ("document", True))
_WRITE_PIECE = 10_000_000


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, metavar="T", help="per case and shape (default: 3)")
    parser.add_argument(
        "--tokens", type=float, default=128e6, metavar="N", help="of the real data set (default: 128e6)"
    )
    parser.add_argument("--documents", type=int, default=1_000_000, metavar="N", help="of the index (default: 1000000)")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where temporary files go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    origin = describe_origin(torch.device("cpu"))
    with TemporaryDirectory(dir=args.directory) as folder:
        real = write_documents(Path(folder) / "real", args.tokens)
        cases = [case for shape in SHAPES for case in measure_shape(real, shape, args.seconds)]
        report = {
            "schema": SCHEMA,
            "command": shlex.join(["megamor", "bench", "loader", *(argv or ())]),
            **origin,
            "cases": cases,
            "documents": measure_documents(write_index(Path(folder) / "index", args.documents)),
        }
    print_report(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.json}")


# --- data -------------------------------------------------------------------------------------------------------------


def lengths_of(count: int, generator: np.random.Generator) -> np.ndarray:
    """Lengths of documents like those of the web: half of them under 400 tokens, 700 in the mean, long ones now and
    then."""
    return np.minimum(generator.lognormal(6.0, 1.05, count) + 1, 500_000).astype(np.int32)


def write_documents(prefix: Path, num_tokens: float) -> str:
    """A data set of random ids."""
    generator = np.random.default_rng(0)
    lengths = lengths_of(max(1, int(num_tokens / 700)), generator)
    with ShardWriter(prefix, np.uint16) as writer:
        for length in lengths.tolist():
            writer.add(generator.integers(0, VOCABULARY, length, dtype=np.uint16))
        writer.commit()
    return str(prefix)


def write_index(prefix: Path, num_documents: int) -> str:
    """An index of that many documents; its tokens are a hole in a file, all of them 0."""
    generator = np.random.default_rng(1)
    counts = [min(_WRITE_PIECE, num_documents - done) for done in range(0, num_documents, _WRITE_PIECE)]
    lengths = np.concatenate([lengths_of(count, generator) for count in counts])
    dtype = np.dtype("<u2")
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], num_documents, num_documents + 1))
        lengths.tofile(index)
        total = 0
        for start in range(0, num_documents, _WRITE_PIECE):
            ends = total + np.cumsum(lengths[start : start + _WRITE_PIECE], dtype=np.int64) * dtype.itemsize
            np.concatenate(([total], ends[:-1])).astype("<i8").tofile(index)
            total = int(ends[-1])
        for start in range(0, num_documents + 1, _WRITE_PIECE):
            np.arange(start, min(start + _WRITE_PIECE, num_documents + 1), dtype="<i8").tofile(index)
    with open(f"{prefix}.bin", "wb") as tokens:
        os.truncate(tokens.fileno(), total)
    return str(prefix)


def opened(prefix: str, packing: str, document_mask: bool, seq_len: int) -> TrainingData:
    """The data set as a run would open it."""
    config = DataConfig(
        train=(SourceConfig(prefix),),
        seq_len=seq_len,
        packing=packing,  # type: ignore[arg-type]
        document_mask=document_mask,
        prefetch_steps=0,
    )
    return TrainingData.open(config, seed=0, vocab_size=VOCABULARY)


# --- measurements -----------------------------------------------------------------------------------------------------


def measure_shape(prefix: str, shape: BatchShape, seconds: float) -> Iterator[dict[str, Any]]:
    """The cases of one batch shape: packings, and what to compare them with."""
    for packing, mask in PACKINGS:
        loader = TrainingLoader(
            opened(prefix, packing, mask, shape.seq_len), rank=0, world_size=1, batches=BatchSchedule((shape,))
        )
        label = f"{packing}, document mask" if mask else f"{packing}, no mask"
        yield case(label, shape, step_seconds(lambda number: loader.next_step(), seconds))  # noqa: B023
        loader.close()
    data = opened(prefix, "stream", False, shape.seq_len)
    order = data.order(shape.global_batch_size)
    (source,) = data.sources.values()

    def arithmetic(number: int) -> None:
        first = number * shape.global_batch_size
        _, positions = order.locate(np.arange(first, first + shape.global_batch_size))
        source.spans(positions, np.arange(shape.global_batch_size) * shape.seq_len, shape.seq_len, data.seed)

    tokens = source.shard.tokens
    windows = as_strided(
        tokens, (source.num_chunks, shape.seq_len + 1), (shape.seq_len * tokens.itemsize, tokens.itemsize)
    )
    generator = np.random.default_rng(2)

    def gather(number: int) -> None:
        windows[generator.integers(0, len(windows), shape.global_batch_size)].astype(np.int64)

    yield case("order of samples alone", shape, step_seconds(arithmetic, seconds))
    yield case("NumPy gather alone", shape, step_seconds(gather, seconds))


def case(label: str, shape: BatchShape, seconds: list[float]) -> dict[str, Any]:
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


def step_seconds(step: Callable[[int], object], seconds: float) -> list[float]:
    """Time of every call of `step` with 3, 4, 5, …; the first three don't count."""
    for number in range(3):
        step(number)
    found: list[float] = []
    started = time.perf_counter()
    while not found or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        step(3 + len(found))
        found.append(time.perf_counter() - begun)
    return found


def measure_documents(prefix: str) -> dict[str, Any]:
    """What an index of many documents costs, in seconds; each figure on its own."""
    seq_len = SHAPES[0].seq_len
    found: dict[str, Any] = {"documents": TokenShard.open(prefix).num_documents}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = action()
        found[name] = time.perf_counter() - begun
        return result

    timed("open_index_seconds", lambda: TokenShard.open(prefix))
    stream = timed("open_stream_seconds", lambda: opened(prefix, "stream", True, seq_len))
    timed("first_stream_batch_seconds", lambda: stream.samples(10**6, 16))
    packed = timed("open_best_fit_seconds", lambda: opened(prefix, "best_fit", True, seq_len))
    timed("first_best_fit_batch_seconds", lambda: packed.samples(10**6, 16))
    (source,) = packed.sources.values()
    return {**found, "best_fit_padding": 1 - source.num_pairs / source.epoch_tokens}


def print_report(report: dict[str, Any]) -> None:
    """Two tables."""
    machine, console = report["machine"], Console()
    console = console if console.is_terminal else Console(width=110)
    table = Table(title=f"loader, one thread\n{machine['cpu']}")
    for heading in ("case", "batch", "step ms", "quartiles", "M tokens/s"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in report["cases"]:
        seconds = {name: 1e3 * value for name, value in row["step_seconds"].items()}
        table.add_row(
            row["label"],
            f"{row['batch_size']} × {row['seq_len']}",
            f"{seconds['median']:.3f}",
            f"{seconds['q1']:.3f}–{seconds['q3']:.3f}",
            f"{row['tokens_per_second'] / 1e6:,.1f}",
        )
    console.print(table)
    for name, value in report["documents"].items():
        console.print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.6f}")


if __name__ == "__main__":
    main()
