"""How fast `megamor preprocess` turns text into token shards, and how much memory it takes.

Cases run in turns, each in a fresh process, and count from when everything is imported: the whole command, from
compressed files to finished shards, with gigatoken and without; and the libraries alone, on texts that are in memory
already. Cases without gigatoken are slow and get the first documents of each file only. Optionally the tools of a
Megatron-LM checkout run too, unmodified, on plain JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
_MEGATRON = f"""{_CLOCK}
import importlib
checkout, tool, *arguments = sys.argv[1:]
sys.path.insert(0, checkout)
module = importlib.import_module("tools." + tool)
sys.argv = [tool, *arguments]
begun = clock()
module.main()
show(begun)
"""


class Program(NamedTuple):
    """A case: its Python program, the arguments, and the bytes of text that it reads."""

    label: str
    code: str
    arguments: list[str]
    text_bytes: int


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Time every case, then measure memory.

    Raises:
        DataError: a case failed.
    """
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            report["versions"][library] = metadata.version(library)
    with TemporaryDirectory(dir=args.directory) as folder:
        runner = CaseRunner(args, Path(folder))
        report |= {
            "tokenizer": Path(args.tokenizer).name,
            "input": [Path(path).name for path in runner.paths],
            "workers": args.workers,
            "cases": runner.times(),
            "memory": list(runner.memory()),
        }
    save()


class CaseRunner:
    """The cases, on files in `folder`: all the text, and some of it for what is slow."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        self.paths = [path for path, *_ in find_files(args.input).identity]
        self._all = self._write_plain("all", float("inf"))
        self._some = self._write_plain("some", args.slow_megabytes * 1e6 / len(self.paths))

    def times(self) -> list[dict[str, Any]]:
        """Every case once a round, each round beginning with another one."""
        (all_file, all_bytes), (some_file, some_bytes) = self._all, self._some
        tokenizer = self._args.tokenizer
        programs = [
            self._command("gigatoken", self.paths, all_bytes, self._args.workers),
            Program("gigatoken alone", _GIGATOKEN, [all_file, tokenizer], all_bytes),
            self._command("none", [some_file], some_bytes, self._args.workers),
            Program("tokenizers alone (encode_batch_fast)", _TOKENIZERS, [some_file, tokenizer], some_bytes),
            *self._megatron(),
        ]
        found: dict[str, list[list[float]]] = {program.label: [] for program in programs}
        for index in range(self._args.rounds):
            for program in rotated(programs, index):
                output, _ = self._run(program, watch=False)
                found[program.label].append([float(word) for word in output.splitlines()[-1].split()])
        return [timing(program, found[program.label]) for program in programs]

    def memory(self) -> Iterator[dict[str, Any]]:
        """Peak memory of a process on several copies of the input, with many threads."""
        copies, workers = self._args.copies, self._args.memory_workers
        paths = [
            str(shutil.copy(path, self._folder / f"{index}-{Path(path).name}"))
            for index in range(copies)
            for path in self.paths
        ]
        programs = [
            self._command("gigatoken", paths, copies * self._all[1], workers),
            self._command("none", [self._some[0]], self._some[1], workers),
            *self._megatron()[1:],
        ]
        for program in programs:
            yield {
                "label": program.label,
                "workers": workers if program.code is _COMMAND else None,
                "text_bytes": program.text_bytes,
                "peak_bytes": self._run(program, watch=True)[1],
            }

    def _command(self, accelerator: str, paths: Sequence[str], text_bytes: int, workers: int) -> Program:
        arguments = ["--input", *paths, "--tokenizer", self._args.tokenizer, "--append-eod", "--workers", str(workers)]
        arguments += ["--output-prefix", str(self._folder / "out"), "--accelerator", accelerator]
        label = f"megamor preprocess, {'tokenizers' if accelerator == 'none' else accelerator}"
        return Program(label, _COMMAND, arguments, text_bytes)

    def _megatron(self) -> list[Program]:
        """Their ordinary tool, and the one that holds everything in memory."""
        if not self._args.megatron:
            return []
        directory = self._folder / "tokenizer"
        directory.mkdir(exist_ok=True)
        shutil.copy(self._args.tokenizer, directory / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        common = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(directory), "--append-eod"]
        common += ["--output-prefix", str(self._folder / "megatron"), "--input"]
        checkout = str(self._args.megatron)
        slow = [checkout, "preprocess_data", *common, self._some[0], "--workers", str(self._args.workers)]
        fast = [checkout, "preprocess_data_fast", *common, self._all[0], "--use-gigatoken"]
        return [
            Program("Megatron-LM preprocess_data", _MEGATRON, slow, self._some[1]),
            Program("Megatron-LM preprocess_data_fast, gigatoken", _MEGATRON, fast, self._all[1]),
        ]

    def _write_plain(self, name: str, limit: float) -> tuple[str, int]:
        """Write the texts as one plain file of JSON lines, at most about `limit` bytes of each source.

        Returns the path and the bytes of text.
        """
        path, sizes = self._folder / f"{name}.jsonl", dict.fromkeys(range(len(self.paths)), 0)
        with path.open("w", encoding="utf-8") as file:
            for chunk in find_files(self.paths).chunks():
                documents = parse_chunk(chunk, "text")
                for document, data in zip(documents.texts, documents.encoded, strict=True):
                    if sizes[chunk.id.source] < limit:
                        sizes[chunk.id.source] += len(data)
                        file.write(json.dumps({"text": document}) + "\n")
        return str(path), sum(sizes.values())

    def _run(self, program: Program, *, watch: bool) -> tuple[str, int]:
        """Run a program; returns its output and, if it is watched (which slows it down), its peak memory in bytes.

        Raises:
            DataError: it failed.
        """
        environment = {**os.environ, "RAYON_NUM_THREADS": str(self._args.workers), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program.code, *program.arguments]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
        own = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # the process has ended, or this isn't Linux
        return 0
    return (int(own[1]) * 1024 if own else 0) + sum(proportional_bytes(int(child)) for child in children)


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
