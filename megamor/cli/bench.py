"""Measure on this machine: training steps, data loading, preprocessing, saving and serving.

examples:
  megamor bench train --config configs/bench/cpu.yaml --seq-len 512,1024 --baseline hf-llama --threads 2
  megamor bench train --config configs/bench/cpu.yaml --policies none,block --rounds 6
  megamor bench gpu --minutes 9 --json gpu.json
  megamor bench loader --documents 100000000 --directory /scratch
  megamor bench preprocess --input 'corpora/*.jsonl.zst' --tokenizer gpt2.json
  megamor bench save --config configs/mor_360m.yaml --directory /scratch data.seq_len=512
  megamor bench serve --config configs/bench/serve_cpu.yaml --threads 1
  megamor bench serve --checkpoint runs/x/checkpoints/latest --residents 16,64
  megamor bench serving --vanilla configs/bench/serve_360m_vanilla.yaml --peer vllm --peer-python vllm-env/bin/python
  megamor bench load --url http://localhost:8000 --rate 8 --goodput ttft:500

Every report ends as tables in the terminal and, with --json, as a file. Absolute times suffer from other load on the
machine, ratios much less, because cases take turns. docs/benchmarks.md explains each bench and the fields of its file.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

from megamor.bench.cases import BASELINES, CASES, POLICIES
from megamor.bench.load import Load
from megamor.bench.report import write_report
from megamor.cli import command_parser, integers, output_file, positive, words
from megamor.errors import user_errors
from megamor.serve.options import POLICIES as SCHEDULING

CONFIGURED = ("train", "save", "serve", "serving")
"""Subcommands that measure a configuration, which key=value arguments change."""


def token_range(text: str) -> tuple[int, int]:
    """A range such as 40-60, or one number for both ends."""
    low, _, high = text.partition("-")
    if not (low.isdigit() and (high or low).isdigit() and 0 < int(low) <= int(high or low)):
        raise argparse.ArgumentTypeError(f"{text} is not a range such as 40-60")
    return int(low), int(high or low)


def result_file(directory: str) -> Path:
    """A new file for a report in a directory, as an argument's type."""
    return output_file(str(Path(directory, f"load-{time.strftime('%Y%m%d-%H%M%S')}.json")))


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a fraction between 0 and 1")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of one subcommand."""
    parser = command_parser("bench", __doc__)
    subparsers = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, declare in SUBCOMMANDS.items():
        sub = subparsers.add_parser(what, help=declare.__doc__, description=declare.__doc__)
        declare(sub)
        sub.epilog = "`megamor bench --help` has examples."
        if what in CONFIGURED:
            sub.epilog += " Further arguments, such as model.dim=256, change settings of the configuration."
        sub.add_argument("--json", type=output_file, metavar="FILE", help="write the report to this file")
        sub.add_argument("--revision", metavar="REV", help="commit to record where there is no git checkout")
    # Subparsers can't intermix options and positional words, so the overrides are what argparse leaves over.
    args: argparse.Namespace
    args, rest = parser.parse_known_args(argv)
    args.overrides = [word for word in rest if re.match(r"\w[^\s=]*=", word)] if "config" in args else []
    unknown = [word for word in rest if word not in args.overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def train_options(parser: argparse.ArgumentParser) -> None:
    """Time, memory and FLOPs of a training step, for models or checkpointing policies."""
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a recursive model; key=value changes settings of all cases")
    add("--cases", type=words, metavar="A,B", help=f"{', '.join(CASES)} (default: all)")
    add("--policies", type=words, metavar="A,B", help=f"compare activation checkpointing: {','.join(POLICIES)}")
    add("--fill", type=fraction, metavar="F", help="windows that are F full (0.5): padding computed against left out")
    add("--baseline", action="append", default=[], choices=BASELINES, help="another implementation of vanilla")
    add("--seq-len", type=integers, metavar="N,M", help="sequence lengths (default: the configuration's)")
    add("--micro-batch", type=integers, metavar="N,M", help="sequences of a step (default: the configuration's)")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: as configured")
    add("--backend", default="single", choices=["single", "fsdp2"], help="of one rank (default: single)")
    add("--seconds", type=float, default=60.0, metavar="T", help="per sequence length (default: 60)")
    add("--rounds", type=positive, metavar="N", help="exactly so many rounds")
    add("--no-memory", action="store_true", help="skip peak memory, which takes a process per case")
    add("--threads", type=positive, metavar="N", help="threads of torch (default: torch's choice)")
    add("--device", metavar="D", help="cpu or cuda (default: cpu)")


def gpu_options(parser: argparse.ArgumentParser) -> None:
    """Training and serving of the published sizes on this GPU, decisive cases first, within a time limit."""
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, metavar="T", help="for all cases; others are skipped (default: 9)")
    add("--cases", nargs="+", metavar="CASE", help="these alone, as in `360m vanilla, eager` (default: all)")
    add("--profile", action="store_true", help="also record which kernels take most of a step")
    add("--toy", action="store_true", help="every case with a tiny model on the CPU; without a GPU always")


def loader_options(parser: argparse.ArgumentParser) -> None:
    """How fast batches come from token shards."""
    add = parser.add_argument
    add("--seconds", type=float, default=3.0, metavar="T", help="per case and batch shape (default: 3)")
    add("--tokens", type=float, default=128e6, metavar="N", help="of the real data set (default: 128e6)")
    add("--documents", type=positive, default=1_000_000, metavar="N", help="of the index (default: 1000000)")
    add("--directory", type=Path, metavar="DIR", help="for temporary files")


def preprocess_options(parser: argparse.ArgumentParser) -> None:
    """How fast text becomes token shards, and how much memory that takes."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="texts, as for megamor preprocess")
    add("--tokenizer", required=True, metavar="FILE", help="tokenizer.json")
    add("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="threads (default: all cores)")
    add("--rounds", type=positive, default=3, metavar="N", help="runs of each case (default: 3)")
    add("--slow-megabytes", type=float, default=8.0, metavar="M", help="text for the slow cases (default: 8)")
    add("--copies", type=positive, default=6, metavar="N", help="of the input, to measure memory on (default: 6)")
    add("--memory-workers", type=positive, default=8, metavar="N", help="threads there (default: 8)")
    add("--directory", type=Path, metavar="DIR", help="for temporary files")


def save_options(parser: argparse.ArgumentParser) -> None:
    """What saving a checkpoint costs a training run, blocking and asynchronous."""
    add = parser.add_argument
    add("--config", default="configs/vanilla_135m.yaml", metavar="FILE", help="model (default: %(default)s)")
    add("--steps", type=int, default=8, metavar="N", help="with each kind of save in a round (default: 8)")
    add("--rounds", type=int, default=3, metavar="N", help="default: 3")
    add("--directory", type=Path, metavar="DIR", help="for checkpoints (default: the system's temporary one)")
    add("--device", metavar="D", help="cpu or cuda (default: cpu, with one sequence of 128 tokens a step)")


def serve_options(parser: argparse.ArgumentParser) -> None:
    """The serving engine alone: scheduling policies on the same requests."""
    add, models = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--config", metavar="FILE", help="a model with random weights; key=value changes its settings")
    models.add_argument("--checkpoint", help="a checkpoint, `latest`, the directory of a run or of an export")
    add("--vanilla", metavar="FILE", help="configuration of a model without recursions, to compare with")
    add("--policies", type=words, default=list(SCHEDULING), metavar="A,B", help=f"default: {','.join(SCHEDULING)}")
    add("--kv-policies", type=words, metavar="A,B", help="with --config: recursion_wise, share_first … in turn")
    add("--residents", type=integers, default=[32], metavar="N,M", help="sequences at work at once (default: 32)")
    add("--turns", type=positive, default=30, metavar="N", help="of each engine (default: 30)")
    add("--prompt-tokens", type=positive, default=4, metavar="N", help="of each request (default: 4)")
    add("--new-tokens", type=token_range, default=(40, 60), metavar="A-B", help="of each request (default: 40-60)")
    hold = "core batches to a boundary, depthwise; 0: the best for the measured costs (default: 1)"
    add("--hold", type=int, default=1, metavar="N", help=hold)
    add("--page-size", type=positive, default=16, metavar="N", help="tokens of a page (default: 16)")
    add("--no-cuda-graphs", action="store_true", help="launch every kernel separately")
    add("--threads", type=positive, metavar="N", help="threads of torch (default: torch's choice)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")


def load_options(parser: argparse.ArgumentParser) -> None:
    """Send requests to a running server and measure what its users would experience."""
    add = parser.add_argument
    add("--url", "--base-url", help="of a running server (default: that of --host and --port)")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", type=positive, default=8000, metavar="N", help="default: 8000")
    add("--model", metavar="NAME", help="stop if the server has another model (default: any)")
    known = {"--backend": ("openai", "vllm"), "--dataset-name": ("random",), "--endpoint": ("/v1/completions",)}
    for option, only in known.items():
        add(option, choices=only, help="as in `vllm bench serve`; changes nothing")
    add("--save-result", action="store_true", help="write the report to a new file in --result-dir")
    add("--result-dir", type=result_file, dest="json", metavar="DIR", help="default: the working directory")
    counts = {
        ("--num-prompts", "--num-requests"): "how many requests",
        ("--random-input-len", "--input-tokens"): "of a prompt of random tokens",
        ("--random-output-len", "--output-tokens"): "of an answer",
        ("--vocab-size",): "prompts are ids below this",
    }
    for options, meaning in counts.items():
        name = options[-1][2:].replace("-", "_")
        default, told = getattr(Load, name), name == "vocab_size"
        shown = f"{meaning} (default: {'what the server says' if told else default})"
        add(*options, dest=name, type=positive, default=None if told else default, metavar="N", help=shown)
    rate = "mean arrivals per second (default: all at once)"
    add("--request-rate", "--rate", dest="rate", type=float, default=Load.rate, metavar="R", help=rate)
    add("--max-concurrency", type=positive, metavar="N", help="requests under way at once (default: no limit)")
    add("--seed", type=int, metavar="N", help="of prompts and arrivals (default: another one each time)")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="always as long as asked for")
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits, such as ttft:500 tpot:50")
    add("--api-key", help="sent as a bearer token; never written to the report")


def serving_options(parser: argparse.ArgumentParser) -> None:
    """Our server beside another engine's: the same dense model and requests, in turns, over HTTP."""
    add = parser.add_argument
    add("--peer", choices=("vllm",), default="vllm", help="the other engine (default: vllm)")
    add("--peer-python", metavar="FILE", help="Python of its own environment; without it: how to make one")
    add("--vanilla", metavar="FILE", required=True, help="the dense model, with random weights, that both serve")
    add("--config", metavar="FILE", help="a recursive model of the same effective depth, that ours serves too")
    add("--dtypes", type=words, default=["fp32", "bf16"], metavar="A,B", help="default: fp32,bf16")
    add("--concurrency", type=integers, default=[1, 8, 32], metavar="N,M", help="requests at once (default: 1,8,32)")
    add("--tokens", type=positive, default=64, metavar="N", help="of each prompt and of each answer (default: 64)")
    add("--waves", type=positive, default=4, metavar="N", help="requests for each that runs at a time (default: 4)")
    add("--rounds", type=positive, default=3, metavar="N", help="turns of each server (default: 3)")
    add("--cores", default=f"0-{(os.cpu_count() or 1) - 1}", metavar="N-M", help="of each server (default: all)")
    add("--directory", type=Path, metavar="DIR", help="for the models (default: the system's temporary one)")


# The docstring of each is the summary that --help shows.
DECLARE = (
    train_options,
    gpu_options,
    loader_options,
    preprocess_options,
    save_options,
    serve_options,
    load_options,
    serving_options,
)
SUBCOMMANDS = {declare.__name__.removesuffix("_options"): declare for declare in DECLARE}


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run one bench, print its tables and write its report.

    Raises:
        SystemExit: status 1 if a case failed, 2 for a mistake in the arguments.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(given)
    if args.what == "load":
        args.url = args.url or f"http://{args.host}:{args.port}"
        args.json = args.json or (result_file("") if args.save_result else None)
    import torch

    from megamor.devices import check_computes, usable_device
    from megamor.origin import describe_origin

    device = usable_device(getattr(args, "device", None) or ("auto" if args.what == "serve" else "cpu"))
    check_computes(device)
    args.device = str(device)
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    bench = import_module(f"megamor.bench.{args.what}")
    # The key is replaced before quoting, which may change how it is spelt.
    shown = [word.replace(getattr(args, "api_key", None) or "\0", "KEY") for word in given]
    report = {"schema": bench.SCHEMA, "command": shlex.join(["megamor", "bench", *shown])}
    report |= describe_origin(device)
    if args.revision:
        report["commit"] = {"revision": args.revision, "dirty": None}
    bench.run(args, report, partial(write_report, args.json, report) if args.json else lambda: None)
    for table in bench.tables(report):
        table.show()
    if args.json:
        print(f"written to {args.json}")
    if any("error" in case for setting in report.get("settings", ()) for case in setting["cases"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
