"""Measure how fast tools/preprocess.py turns text into token shards, and how much memory it takes.

examples:
  megamor bench preprocess --input 'corpora/*.jsonl.zst' --tokenizer gpt2.json --json out.json
  megamor bench preprocess --input 'corpora/*.jsonl.zst' --tokenizer gpt2.json --rounds 5 --slow-megabytes 20

Cases run in turns, each in a fresh process, and count from when everything is imported: the whole tool, from compressed
files to finished shards, with gigatoken and without, and beside it the libraries alone, on texts that are in memory
already. What goes without gigatoken is slow and gets the first documents of each file only. --megatron adds the tools
of a Megatron-LM checkout, unmodified, on plain JSON lines, if this Python has what they import (triton, for one).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megamor.bench.origin import describe_origin
from megamor.bench.train import quartiles
from megamor.corpus.documents import parse_chunk
from megamor.corpus.text import find_files
from megamor.errors import DataError, user_errors

SCHEMA = "megamor-bench-preprocess/1"
ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_SECONDS = 0.02
_LIBRARIES = ("tokenizers", "gigatoken", "msgspec", "zstandard")

# Programs of the cases. Each prints on its last line the seconds, and those of processors, that it took: imports and
# preparations left out.
_CLOCK = """
import os, sys, time
def clock(): return time.perf_counter(), sum(os.times()[:4])  # those of processes that have ended, too
def show(begun): print(*(end - start for start, end in zip(begun, clock())))
"""
_TOOL = f"""{_CLOCK}
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench preprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="texts, as of tools/preprocess.py")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads of each case")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each case (default: 3)")
    parser.add_argument("--slow-megabytes", type=float, default=8.0, metavar="M", help="text for the slow cases")
    parser.add_argument("--copies", type=int, default=6, metavar="N", help="the input, so often, to measure memory on")
    parser.add_argument("--memory-workers", type=int, default=8, metavar="N", help="threads there (default: 8)")
    parser.add_argument("--megatron", type=Path, metavar="DIR", help="a checkout of Megatron-LM, to run its tools too")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where temporary files go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    origin = describe_origin(torch.device("cpu"))
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            origin["versions"][library] = metadata.version(library)
    with TemporaryDirectory(dir=args.directory) as folder:
        bench = Bench(args, Path(folder))
        report = {
            "schema": SCHEMA,
            "command": shlex.join(["megamor", "bench", "preprocess", *(argv or ())]),
            **origin,
            "tokenizer": Path(args.tokenizer).name,
            "input": [Path(path).name for path in bench.paths],
            "workers": args.workers,
            "cases": bench.run(),
            "memory": list(bench.memory()),
        }
    print_report(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.json}")


class Bench:
    """The cases, on files in `folder`: everything, and a little of everything for what is slow."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self.paths = list(find_files(args.input).paths)
        self._all, self._all_bytes = self._write("all", float("inf"))
        self._few, self._few_bytes = self._write("few", args.slow_megabytes * 1e6 / len(self.paths))

    def run(self) -> list[dict[str, Any]]:
        """Every case once a round, beginning with another one each round."""
        tokenizer, workers = self._args.tokenizer, str(self._args.workers)
        common = ["--tokenizer", tokenizer, "--append-eod", "--workers", workers, "--output-prefix"]
        out = str(self._folder / "out")
        fast = ["--input", *self.paths, *common, out, "--accelerator", "gigatoken"]
        slow = ["--input", str(self._few), *common, out, "--accelerator", "none"]
        cases: list[tuple[str, str, list[str], int]] = [
            ("tools/preprocess.py, gigatoken", _TOOL, fast, self._all_bytes),
            ("gigatoken alone", _GIGATOKEN, [str(self._all), tokenizer], self._all_bytes),
            ("tools/preprocess.py, tokenizers", _TOOL, slow, self._few_bytes),
            ("tokenizers alone (encode_batch_fast)", _TOKENIZERS, [str(self._few), tokenizer], self._few_bytes),
        ]
        if self._args.megatron:
            cases += self._megatron_cases()
        times: dict[str, list[tuple[float, ...]]] = {label: [] for label, *_ in cases}
        for number in range(self._args.rounds):
            shift = number % len(cases)
            for label, program, arguments, _ in cases[shift:] + cases[:shift]:
                *_, last = self._run(program, arguments).splitlines()
                times[label].append(tuple(map(float, last.split())))
        return [_summary(label, size, times[label]) for label, _, _, size in cases]

    def _megatron_cases(self) -> list[tuple[str, str, list[str], int]]:
        """Their ordinary tool, and the one that holds everything in memory."""
        directory = self._folder / "tokenizer"
        directory.mkdir(exist_ok=True)
        shutil.copy(self._args.tokenizer, directory / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        checkout, out = str(self._args.megatron), str(self._folder / "megatron")
        common = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(directory), "--append-eod"]
        slow = ["--input", str(self._few), "--output-prefix", out, "--workers", str(self._args.workers)]
        fast = ["--input", str(self._all), "--output-prefix", out, "--use-gigatoken"]
        return [
            ("Megatron-LM preprocess_data", _MEGATRON, [checkout, "preprocess_data", *slow, *common], self._few_bytes),
            (
                "Megatron-LM preprocess_data_fast, gigatoken",
                _MEGATRON,
                [checkout, "preprocess_data_fast", *fast, *common],
                self._all_bytes,
            ),
        ]

    def memory(self) -> Iterator[dict[str, Any]]:
        """Peak memory of the process (proportional set size) on several copies of the input, with many threads."""
        paths = [
            str(shutil.copy(path, self._folder / f"{number}-{Path(path).name}"))
            for number in range(self._args.copies)
            for path in self.paths
        ]
        common = ["--tokenizer", self._args.tokenizer, "--workers", str(self._args.memory_workers), "--append-eod"]
        cases = []
        for accelerator, files, size in (
            ("gigatoken", paths, self._args.copies * self._all_bytes),
            ("none", [str(self._few)], self._few_bytes),
        ):
            arguments = ["--input", *files, *common, "--output-prefix", str(self._folder / "memory")]
            label = f"tools/preprocess.py, {'tokenizers' if accelerator == 'none' else accelerator}"
            cases.append((label, _TOOL, [*arguments, "--accelerator", accelerator], size))
        if self._args.megatron:
            cases.append(self._megatron_cases()[-1])
        for label, program, arguments, size in cases:
            process = self._start(program, arguments)
            peak = 0
            while process.poll() is None:
                peak = max(peak, proportional_bytes(process.pid))
                time.sleep(_SAMPLE_SECONDS)
            if process.returncode:
                raise DataError(f"{label} failed: {process.communicate()[1]}")
            yield {
                "label": label,
                "workers": self._args.memory_workers if program is _TOOL else None,
                "text_bytes": size,
                "peak_bytes": peak,
            }

    def _write(self, name: str, limit: float) -> tuple[Path, int]:
        """The texts as one plain file of JSON lines, at most about `limit` bytes of each source; and their size."""
        path, sizes = self._folder / f"{name}.jsonl", dict.fromkeys(range(len(self.paths)), 0)
        with path.open("w", encoding="utf-8") as file:
            for chunk in find_files(self.paths).chunks():
                documents = parse_chunk(chunk, "text")
                for text, data in zip(documents.texts, documents.encoded, strict=True):
                    if sizes[chunk.id.source] < limit:
                        sizes[chunk.id.source] += len(data)
                        file.write(json.dumps({"text": text}) + "\n")
        return path, sum(sizes.values())

    def _run(self, program: str, arguments: Sequence[str]) -> str:
        process = self._start(program, arguments)
        out, errors = process.communicate()
        if process.returncode:
            raise DataError(f"a case failed: {errors}")
        return out

    def _start(self, program: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
        environment = {**os.environ, "RAYON_NUM_THREADS": str(self._args.workers), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _summary(label: str, text_bytes: int, times: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    seconds, processor_seconds = (quartiles(values) for values in zip(*times, strict=True))
    return {
        "label": label,
        "text_bytes": text_bytes,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "bytes_per_second": text_bytes / seconds["median"],
    }


def proportional_bytes(pid: int) -> int:
    """Memory of a process and its children, what they share counted once; 0 where the system doesn't say."""
    try:
        own = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return (int(own[1]) * 1024 if own else 0) + sum(proportional_bytes(int(child)) for child in children)


def print_report(report: dict[str, Any]) -> None:
    """A table, and a line on memory."""
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    table = Table(title=f"text to tokens, {report['workers']} threads\n{report['machine']['cpu']}")
    for heading in ("case", "MB of text", "seconds", "quartiles", "processor s", "MB/s"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in report["cases"]:
        seconds = case["seconds"]
        table.add_row(
            case["label"],
            f"{case['text_bytes'] / 1e6:.1f}",
            f"{seconds['median']:.2f}",
            f"{seconds['q1']:.2f}–{seconds['q3']:.2f}",
            f"{case['processor_seconds']['median']:.2f}",
            f"{case['bytes_per_second'] / 1e6:.2f}",
        )
    console.print(table)
    for memory in report["memory"]:
        console.print(
            f"peak memory of {memory['label']}{f' with {n} workers' if (n := memory['workers']) else ''}, "
            f"{memory['text_bytes'] / 1e6:,.0f} MB of text: {memory['peak_bytes'] / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main()
