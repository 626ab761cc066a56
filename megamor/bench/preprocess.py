"""How fast `megamor preprocess` turns text into token shards, and how much memory it takes.

Cases run in turns, each in a fresh process, and count from when everything is imported. Cases without gigatoken are
slow and get the first documents of each file only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil

from megamor.bench.report import Column, Row, Table, number, provenance, quartiles, rotated, spread, text
from megamor.corpus.documents import parse_chunk
from megamor.corpus.text import find_files
from megamor.errors import DataError

SCHEMA = "megamor-bench-preprocess/1"
ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_SECONDS = 0.02
_LIBRARIES = ("tokenizers", "gigatoken", "msgspec", "zstandard")

# The programs of the cases. The last line that each prints has its seconds and its processor seconds, without imports
# and preparations.
_CLOCK = """
import os, sys, time
def clock(): return time.perf_counter(), sum(os.times()[:4])  # child processes that have ended included
def show(begun): print(*(end - start for start, end in zip(begun, clock())))
"""
_COMMAND = f"""{_CLOCK}
import awkward, gigatoken, megamor.corpus.array, megamor.corpus.dedup, megamor.corpus.preprocess, megamor.progress
from megamor.cli.preprocess import main
begun = clock()
main(sys.argv[1:])
show(begun)
"""
_READ = f"""{_CLOCK}
import json
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
"""
_TOKENIZERS = f"""{_READ}
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
begun = clock()
for first in range(0, len(texts), 64):
    tokenizer.encode_batch_fast(texts[first : first + 64], add_special_tokens=False)
show(begun)
"""
_GIGATOKEN = f"""{_READ}
import awkward, gigatoken
tokenizer = gigatoken.Tokenizer(sys.argv[2])
begun = clock()
tokenizer.encode_batch(texts)
show(begun)
"""
# What Megatron-LM's preprocess_data_fast does: the library reads and encodes the whole file in one call. The ids stay
# in memory, nothing is checked, hashed or synced.
_WHOLE_FILE = f"""{_CLOCK}
import awkward, gigatoken, numpy
begun = clock()
tokenizer = gigatoken.Tokenizer(sys.argv[2])
ids = tokenizer.encode_files(gigatoken.JsonlFileSource([sys.argv[1]]))
ids = awkward.concatenate([ids, awkward.unflatten(numpy.full(len(ids), 0, numpy.uint32), 1)], axis=1)
dtype = numpy.uint16 if tokenizer.vocab_size < 65500 else numpy.int32
awkward.to_numpy(awkward.flatten(ids)).astype(dtype).tofile(sys.argv[3] + ".bin")
numpy.cumsum(awkward.to_numpy(awkward.num(ids))).tofile(sys.argv[3] + ".idx")
show(begun)
"""


class Program(NamedTuple):
    """A case: its Python program, the arguments, and the bytes of text that it reads."""

    label: str
    code: str
    arguments: list[str]
    text_bytes: int


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Time every case, then measure the memory of the command on several copies of the input, with many threads.

    Raises:
        DataError: a case failed.
    """
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            report["versions"][library] = metadata.version(library)
    with TemporaryDirectory(dir=args.directory) as name:
        folder, tokenizer, workers = Path(name), args.tokenizer, args.memory_workers
        paths = [path for path, *_ in find_files(args.input).identity]
        plain, num_bytes = write_plain(folder / "all.jsonl", paths, float("inf"))
        some, some_bytes = write_plain(folder / "some.jsonl", paths, args.slow_megabytes * 1e6 / len(paths))
        copies = [
            str(shutil.copy(path, folder / f"{index}-{Path(path).name}"))
            for index in range(args.copies)
            for path in paths
        ]
        cases = [
            command(args, folder, "gigatoken", paths, num_bytes, args.workers),
            command(
                args, folder, "gigatoken", copies, args.copies * num_bytes, args.workers, f", {args.copies} copies"
            ),
            command(args, folder, "gigatoken", [plain], num_bytes, args.workers, ", plain lines"),
            Program(
                "whole file at once, plain lines", _WHOLE_FILE, [plain, tokenizer, str(folder / "whole")], num_bytes
            ),
            Program("gigatoken alone", _GIGATOKEN, [plain, tokenizer], num_bytes),
            command(args, folder, "none", [some], some_bytes, args.workers),
            Program("tokenizers alone (encode_batch_fast)", _TOKENIZERS, [some, tokenizer], some_bytes),
        ]
        times: dict[str, list[list[float]]] = {program.label: [] for program in cases}
        for index in range(args.rounds):
            for program in rotated(cases, index):
                output, _ = execute(program, args.workers, watch=False)
                times[program.label].append([float(word) for word in output.splitlines()[-1].split()])
        watched = [
            command(args, folder, "gigatoken", copies, args.copies * num_bytes, workers),
            command(args, folder, "none", [some], some_bytes, workers),
        ]
        peaks = [execute(program, args.workers, watch=True)[1] for program in watched]
    report |= {
        "tokenizer": Path(tokenizer).name,
        "input": [Path(path).name for path in paths],
        "workers": args.workers,
        "cases": [timing(program, times[program.label]) for program in cases],
        "memory": [
            {"label": program.label, "workers": workers, "text_bytes": program.text_bytes, "peak_bytes": peak}
            for program, peak in zip(watched, peaks, strict=True)
        ],
    }
    save()


def command(
    args: argparse.Namespace,
    folder: Path,
    accelerator: str,
    paths: Sequence[str],
    text_bytes: int,
    workers: int,
    form: str = "",
) -> Program:
    """`megamor preprocess` on `paths`, which writes its shards into `folder`. `form` of the input is for the label."""
    arguments = ["--input", *paths, "--tokenizer", args.tokenizer, "--append-eod", "--workers", str(workers)]
    arguments += ["--output-prefix", str(folder / "out"), "--accelerator", accelerator]
    label = f"megamor preprocess, {'tokenizers' if accelerator == 'none' else accelerator}{form}"
    return Program(label, _COMMAND, arguments, text_bytes)


def write_plain(path: Path, sources: Sequence[str], limit: float) -> tuple[str, int]:
    """Write the texts as one plain file of JSON lines, at most about `limit` bytes of each source.

    Returns the path and the bytes of text.
    """
    sizes = dict.fromkeys(range(len(sources)), 0)
    with path.open("w", encoding="utf-8") as file:
        for chunk in find_files(sources).chunks():
            documents = parse_chunk(chunk, "text")
            for document, data in zip(documents.texts, documents.encoded, strict=True):
                if sizes[chunk.id.source] < limit:
                    sizes[chunk.id.source] += len(data)
                    file.write(json.dumps({"text": document}) + "\n")
    return str(path), sum(sizes.values())


def execute(program: Program, threads: int, *, watch: bool) -> tuple[str, int]:
    """Run a program; returns its output and, if it is watched (which slows it down), its peak memory in bytes.

    Raises:
        DataError: it failed.
    """
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", program.code, *program.arguments]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    peak = 0
    # getrusage's peak would count pages of shared libraries in every process, and mapped files.
    while watch and process.poll() is None:
        peak = max(peak, proportional_bytes(process.pid))
        time.sleep(_SAMPLE_SECONDS)
    output, errors = process.communicate()
    if process.returncode:
        raise DataError(f"the case {program.label!r} failed: {errors}")
    return output, peak


def timing(program: Program, times: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One row of the report."""
    seconds, processor_seconds = (quartiles(values) for values in zip(*times, strict=True))
    return {
        "label": program.label,
        "text_bytes": program.text_bytes,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "bytes_per_second": program.text_bytes / seconds["median"],
    }


def proportional_bytes(pid: int) -> int:
    """Memory of a process and its children, with shared pages counted once; 0 where the system doesn't say."""
    try:
        root = psutil.Process(pid)
        return sum(process.memory_full_info().pss for process in (root, *root.children(recursive=True)))
    except (psutil.Error, AttributeError):  # a process has ended, or this isn't Linux
        return 0


def tables(report: Row) -> Iterator[Table]:
    """Speed, and below it memory."""
    columns = (
        Column("text to tokens", text("label"), left=True),
        Column("MB/s", number("bytes_per_second", ",.1f", 1e-6)),
        Column("MB of text", number("text_bytes", ",.1f", 1e-6)),
        Column("seconds (quartiles)", spread("seconds", ".2f")),
        Column("processor seconds", number("processor_seconds.median", ".2f")),
        Column("peak MB", number("peak_bytes", ",.0f", 1e-6)),
        Column("workers", text("workers")),
    )
    machine, inputs = report["machine"], ", ".join(report["input"])
    title = (
        f"Text to token shards, {report['workers']} threads, {report['tokenizer']}, {inputs}; {machine['cpu']}, load "
        f"{machine['load_average']:.1f}; {provenance(report, 'tokenizers', 'gigatoken')}."
    )
    yield Table(columns, report["cases"], title)
    yield Table(columns, report["memory"], "Peak memory:")
