"""Measure the server or the engine alone: `python -m megamor.bench.serving --url … | --offline …`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megamor.bench.load import Load, parse_limits, send, served_model, summarise
from megamor.bench.origin import describe_origin
from megamor.bench.serving_offline import Workload, measure
from megamor.config import config_to_dict, load_config
from megamor.errors import ConfigError, user_errors
from megamor.load import load_model
from megamor.model import Transformer, build_model
from megamor.serve.options import POLICIES

EXAMPLE = """\
examples:
  python -m megamor.bench.serving --url http://localhost:8000 --rate 8 --num-requests 200 --goodput ttft:500
  python -m megamor.bench.serving --offline --checkpoint runs/x/checkpoints/latest --policies full,shrink,depthwise
  python -m megamor.bench.serving --offline --config configs/bench/serve_cpu.yaml --threads 1 --json out.json

--url sends requests to a running server and reports what users feel. --offline runs the engine by itself, the policies
in turns on the same requests, beside the speed that the measured costs of launches predict; --config takes random
weights, with key=value to change settings. benchmarks/README.md explains the figures.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor.bench.serving",
        description="Measure serving.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--url", help="a running server")
    what.add_argument("--offline", action="store_true", help="the engine alone, in this process")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change in --config, --vanilla")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")

    load = parser.add_argument_group("with --url")
    load.add_argument("--num-requests", type=int, default=200, help="how many (default: 200)")
    load.add_argument("--rate", type=float, default=math.inf, help="mean arrivals a second (default: all at once)")
    load.add_argument("--max-concurrency", type=int, help="at most so many at a time")
    load.add_argument("--input-tokens", type=int, default=64, help="of a prompt (default: 64)")
    load.add_argument("--output-tokens", type=int, default=64, help="of an answer (default: 64)")
    load.add_argument("--vocab-size", type=int, default=256, help="prompts are ids below this (default: 256)")
    load.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits, e.g. ttft:500 tpot:50")
    load.add_argument("--api-key", help="sent as a bearer token")

    offline = parser.add_argument_group("with --offline")
    source = offline.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", help="a checkpoint, `latest`, a run's or an export's directory")
    source.add_argument("--config", metavar="FILE", help="a configuration, for random weights")
    offline.add_argument("--vanilla", metavar="FILE", help="configuration of a model without recursions beside it")
    offline.add_argument("--policies", type=_policies, default=list(POLICIES), metavar="A,B", help="default: all")
    offline.add_argument("--residents", type=int, default=32, help="sequences at work at once (default: 32)")
    offline.add_argument("--turns", type=int, default=30, help="of each policy (default: 30)")
    offline.add_argument("--prompt-tokens", type=int, default=4, help="of each request (default: 4)")
    offline.add_argument("--new-tokens", type=_range, default=(40, 60), metavar="A-B", help="default: 40-60")
    offline.add_argument("--hold", type=int, default=1, help="core launches to a boundary, depthwise (default: 1)")
    offline.add_argument("--threads", type=int, help="of torch on a CPU (default: torch's choice)")
    offline.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    arguments = parser.parse_args(argv)
    if arguments.offline and not (arguments.checkpoint or arguments.config):
        parser.error("--offline needs --checkpoint or --config")
    return arguments


def _policies(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(POLICIES)}")
    return names


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (low.isdigit() and (high or low).isdigit() and 0 < int(low) <= int(high or low)):
        raise argparse.ArgumentTypeError(f"{text} is not a range such as 40-60")
    return int(low), int(high or low)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = parse_arguments(argv)
    # Before quoting, which may change how the key is spelt.
    words = [word.replace(arguments.api_key or "\0", "KEY") for word in argv or sys.argv[1:]]
    report: dict[str, Any] = {"command": shlex.join(["python", "-m", "megamor.bench.serving", *words])}
    if arguments.offline:
        report = {"schema": "megamor-bench-serve-offline/1"} | report | bench_offline(arguments)
        print_offline(report)
    else:
        report = {"schema": "megamor-bench-serve-load/1"} | report | bench_url(arguments)
        Console().print_json(json.dumps(report["result"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def bench_url(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send requests to a server."""
    limits = parse_limits(arguments.goodput)
    load = Load(
        arguments.url,
        arguments.num_requests,
        arguments.rate,
        arguments.max_concurrency,
        arguments.input_tokens,
        arguments.output_tokens,
        arguments.vocab_size,
        api_key=arguments.api_key,
    )
    origin = {**describe_origin(torch.device("cpu")), "served_model": asyncio.run(served_model(load))}
    result = summarise(asyncio.run(send(load)), limits)
    return {**origin, "load": asdict(load) | {"api_key": None}, "result": result}


def bench_offline(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the engine under each policy."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build(arguments)
    vanilla = build_random(arguments.vanilla, arguments) if arguments.vanilla else None
    work = Workload(arguments.residents, arguments.turns, arguments.prompt_tokens, arguments.new_tokens, arguments.hold)
    if work.longest > min(other.config.model.max_seq_len for other in (model, vanilla or model)):
        raise ConfigError(
            f"--prompt-tokens {work.prompt_tokens} and --new-tokens up to {work.new_tokens[1]} don't fit into the "
            f"model's context of {model.config.model.max_seq_len}"
        )
    origin = describe_origin(model.embed.weight.device)
    return {**origin, "config": config_to_dict(model.config), **measure(model, arguments.policies, work, vanilla)}


def build(arguments: argparse.Namespace) -> Transformer:
    """The model of a checkpoint, or with random weights."""
    if arguments.checkpoint:
        if arguments.overrides:
            raise ConfigError(f"{arguments.overrides[0]}: a checkpoint has its settings; key=value is for --config")
        return load_model(arguments.checkpoint, arguments.device).model
    return build_random(arguments.config, arguments)


def build_random(config: str, arguments: argparse.Namespace) -> Transformer:
    """The model of a configuration, with random weights."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return build_model(load_config(config, arguments.overrides), device=device).eval()


def print_offline(report: dict[str, Any]) -> None:
    """Prediction beside measurement."""
    table = Table(title="tokens/s, prediction beside measurement")
    table.add_column("policy", min_width=14)
    for column in ("residents", "depth", "width", "mixed", "sched.", "tokens/s", "pred.", "of it"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("over full", "pred.", "over shrink", "pred.", "over vanilla"):
        table.add_column(column, justify="right", no_wrap=True)
    for case in report["cases"]:
        names = ("over_full", "predicted_over_full", "over_shrink", "predicted_over_shrink", "over_vanilla")
        scheduling, of_it = case["scheduler_over_core"], case["of_prediction"]
        over = [f"{case[name]:.2f}×" if name in case else "–" for name in names]
        table.add_row(
            case["case"],
            str(case["residents"]),
            f"{case['mean_depth']:.2f}",
            f"{case['core_width']:.1f}",
            f"{case['mixed_launches']:.0%}",
            "–" if scheduling is None else f"{scheduling:.1%}",
            f"{case['tokens_per_second']:.0f}",
            f"{case['predicted_tokens_per_second']:.0f}" if of_it else "–",
            f"{of_it:.0%}" if of_it else "–",
            *over,
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    (fixed, row), x = report["costs"]["core"], report["costs"]["boundary_over_core"]
    console.print(f"core launch {1e3 * fixed:.2f} ms + {1e3 * row:.3f} ms a row; boundary over core x = {x:.2f}")


if __name__ == "__main__":
    main()
