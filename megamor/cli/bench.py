"""Measure on this machine, beside what the FLOPs allow.

examples:
  megamor bench train --config configs/bench/cpu.yaml --json out.json
  megamor bench train --config configs/bench/cpu.yaml --seq-len 512,1024 --baseline hf-llama --threads 2
  megamor bench train --config configs/bench/cpu.yaml --cases vanilla,mor_token train.micro_batch_size=16 \\
      train.global_batch_size=16

`train` runs one training step (forward, backward, AdamW) of vanilla, recursive and MoR models of equal effective depth
in turns, and compares each with vanilla round by round: time, executed FLOPs, peak memory. The times of a busy machine
are off, its ratios less so. `loader` measures how fast batches come from token shards; see `bench.py loader --help`.
`save` measures what a checkpoint costs, blocking and asynchronous; see `bench.py save --help`. `preprocess` measures
how fast text becomes token shards; see `bench.py preprocess --help`. `checkpointing` measures memory and time of each
activation checkpointing policy; see `bench.py checkpointing --help`.
benchmarks/README.md explains the JSON files.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table

from megamor.bench import checkpointing as bench_checkpointing
from megamor.bench import loader as bench_loader
from megamor.bench import preprocess as bench_preprocess
from megamor.bench import save as bench_save
from megamor.bench.baselines import BASELINES
from megamor.bench.cases import CASES, make_cases
from megamor.bench.origin import describe_origin
from megamor.bench.train import Budget, bench_setting
from megamor.config import config_to_dict, load_config
from megamor.errors import ConfigError, user_errors

SCHEMA = "megamor-bench-train/1"
_FILE_WIDTH = 110


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["train", "loader", "save", "preprocess", "checkpointing"]
    parser.add_argument("what", choices=kinds, help="what to measure; each but train has its own --help")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, for all cases")
    parser.add_argument("--config", required=True, metavar="FILE", help="a recursive model, as configs/bench/cpu.yaml")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument(
        "--cases", type=_names, default=list(CASES), metavar="A,B", help=f"of {', '.join(CASES)} (default: all)"
    )
    parser.add_argument(
        "--baseline", action="append", default=[], choices=BASELINES, help="another implementation of vanilla as well"
    )
    parser.add_argument(
        "--seq-len", type=_lengths, metavar="N,M", help="sequence lengths to run (default: the configuration's)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, metavar="T", help="per sequence length (default: 60)")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="this many rounds, however long they take")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of torch (default: torch's own choice)")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, which takes a process per case")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    return parser.parse_intermixed_args(argv)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _lengths(text: str) -> list[int]:
    return [_positive(length) for length in _names(text)]


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    words = sys.argv[1:] if argv is None else list(argv)
    for what, other in (
        ("loader", bench_loader),
        ("save", bench_save),
        ("preprocess", bench_preprocess),
        ("checkpointing", bench_checkpointing),
    ):
        if words[:1] == [what]:
            other.main(words[1:])
            return
    args = parse_arguments(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: torch sees no CUDA device; leave it out or install a CUDA build")
    if args.threads:
        torch.set_num_threads(args.threads)
    report = bench_train(args)
    report = {
        "command": shlex.join(["megamor", "bench", *(sys.argv[1:] if argv is None else argv)]),
        **report,
    }
    print_report(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"schema": SCHEMA, **report}, indent=1) + "\n")
        print(f"written to {args.json}")


def bench_train(args: argparse.Namespace) -> dict[str, Any]:
    """The report, all but `schema` and `command`."""
    device, console = torch.device(args.device), Console(stderr=True)
    config = load_config(args.config, args.overrides)
    origin = describe_origin(device)
    budget, settings = Budget(args.seconds, args.rounds), []
    for seq_len in args.seq_len or [config.data.seq_len]:
        overrides = [*args.overrides, f"data.seq_len={seq_len}", f"model.max_seq_len={seq_len}"]
        cases = make_cases(args.config, overrides, args.cases, args.baseline)
        with console.status(f"sequence length {seq_len}: memory") as status:
            progress = partial(_show_round, status, seq_len)
            settings.append(bench_setting(cases, device, budget, progress, memory=not args.no_memory))
    return {**origin, "config": config_to_dict(config), "settings": settings}


def _show_round(status: Status, seq_len: int, done: int) -> None:
    status.update(f"sequence length {seq_len}: {done} rounds")


def print_report(report: dict[str, Any]) -> None:
    """One table per sequence length."""
    machine, console = report["machine"], Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    for setting in report["settings"]:
        device = f"{machine['accelerator'] or machine['cpu']}, {machine['threads']} threads"
        batch = f"batch {setting['batch_size']} × {setting['seq_len']} tokens"
        conditions = f"{batch}, {setting['precision']}, {setting['rounds']} rounds"
        table = Table(title=f"training step, {conditions}\n{device}")
        table.add_column("case")
        for heading in ("step ms", "quartiles", "time ratio", "FLOPs ratio", "time/FLOPs", "peak MB", "ratio", "depth"):
            table.add_column(heading, justify="right")
        for case in setting["cases"]:
            table.add_row(case["name"], *_cells(case))
        console.print(table)


def _cells(case: dict[str, Any]) -> list[str]:
    seconds = {name: 1e3 * value for name, value in case["step_seconds"].items()}
    memory, ratio, depth = case["peak_memory_bytes"], case["memory_ratio"], case["mean_depth"]
    return [
        f"{seconds['median']:.1f}",
        f"{seconds['q1']:.1f}–{seconds['q3']:.1f}",
        f"{case['time_ratio']['median']:.3f}",
        f"{case['flops_ratio']:.3f}",
        f"{case['time_over_flops']:.3f}",
        "n/a" if memory is None else f"{memory / 1e6:.0f}",
        "n/a" if ratio is None else f"{ratio:.2f}",
        "" if depth is None else f"{depth:.2f}",
    ]


if __name__ == "__main__":
    main()
