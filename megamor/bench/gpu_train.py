"""Training speed on one GPU: tokens/s, MFU, HFU and peak memory of vanilla, recursive and MoR models.

examples:
  python -m megamor.bench.gpu_train --json out.json
  python -m megamor.bench.gpu_train --sizes 360m --cases vanilla,mor3_expert --compile --profile --json out.json
  python -m megamor.bench.gpu_train --sizes 1.7b --no-compile --micro-batch 4 --json out.json \\
      train.activation_checkpointing=block

A step is forward, backward, clipping and AdamW of one micro-batch of random tokens in bf16, through the backend that
training uses. Cases come in order of importance and the file is written after each, so a run that is cut short still
says something. Vanilla is measured before and after the others of its size. docs/gpu.md explains the file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megamor.bench.gpu_cases import CASES, REFERENCE, SIZES, Case, plan_cases
from megamor.bench.gpu_measure import measure, measure_within_memory, release
from megamor.bench.origin import describe_origin
from megamor.errors import ConfigError, user_errors
from megamor.parallel import World, close_world, init_world

SCHEMA = "megamor-bench-gpu-train/1"
_FILE_WIDTH = 150


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor/bench/gpu_train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, for all cases")
    parser.add_argument("--sizes", type=_names, default=list(SIZES), metavar="A,B", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--cases", type=_names, default=list(CASES)[:7], metavar="A,B", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the blocks or not (default: first so, then)"
    )
    parser.add_argument(
        "--static-shapes", action="store_true", help="compile for each number of tokens anew: expert-choice only"
    )
    parser.add_argument("--micro-batch", default="auto", metavar="N", help="sequences (default: auto, by size)")
    parser.add_argument("--seconds-per-case", type=float, default=9.0, metavar="T", help="to measure (default: 9)")
    parser.add_argument("--time-limit", type=float, default=560.0, metavar="T", help="begin no case that ends later")
    parser.add_argument("--backend", choices=["fsdp2", "single"], default="fsdp2", help="default: fsdp2, of one rank")
    parser.add_argument("--profile", action="store_true", help="also list the kernels that take most time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument("--revision", metavar="REV", help="to record as the commit, where there is no git checkout")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for testing the bench")
    args = parser.parse_intermixed_args(argv)
    if args.micro_batch != "auto" and not (args.micro_batch.isdecimal() and int(args.micro_batch)):
        parser.error(f"--micro-batch {args.micro_batch}: give a positive number or auto")
    return args


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if a case failed."""
    started = time.perf_counter()
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device; --device cpu tests the bench itself")
    if args.static_shapes:
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 64
    modes = [True, False] if args.compile is None else [args.compile]
    cases = plan_cases(args.sizes, args.cases, modes, args.backend, args.overrides)
    world = init_world(cases[0].config(1).parallel)
    try:
        command = shlex.join(["python", "megamor/bench/gpu_train.py", *(sys.argv[1:] if argv is None else argv)])
        report = run_cases(args, cases, world, command, started)
    finally:
        close_world()
    print_report(report)
    return int(any("error" in result for result in report["results"]))


def run_cases(
    args: argparse.Namespace, cases: list[Case], world: World, command: str, started: float
) -> dict[str, Any]:
    """Measure case by case, keeping `args.json` up to date."""
    origin = describe_origin(world.device)
    if args.revision:
        origin["commit"] = {"revision": args.revision, "dirty": None}
    report: dict[str, Any] = {"schema": SCHEMA, "command": command, **origin, "cuda": torch.version.cuda, "results": []}
    results: list[dict[str, Any]] = report["results"]
    for number, case in enumerate(cases, start=1):
        begun = time.perf_counter()
        label = {"size": case.size, "case": case.name, "compiled": case.compiled, "backend": case.backend}
        expected = max((result.get("wall_seconds", 0) for result in results), default=0)
        if begun - started + expected > args.time_limit:
            results.append({**label, "skipped": f"{args.time_limit:.0f} s would not have sufficed"})
        else:
            results.append({**label, **run_case(args, case, world), "wall_seconds": time.perf_counter() - begun})
            release(world.device)
        compare(results)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"[{number}/{len(cases)}] {describe(results[-1])}", file=sys.stderr, flush=True)
    return report


def run_case(args: argparse.Namespace, case: Case, world: World) -> dict[str, Any]:
    """Fields of one result. A failure is recorded, so that it doesn't take the other cases with it."""
    micro_batch = SIZES[case.size].micro_batch if args.micro_batch == "auto" else int(args.micro_batch)
    try:
        return measure_within_memory(
            case, world, micro_batch, lambda size: measure(case, world, size, args.seconds_per_case, args.profile)
        )
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def compare(results: list[dict[str, Any]]) -> None:
    """Add to each result its speed-up over vanilla of the same size and mode, and the one that FLOPs imply."""
    for result in results:
        group = [
            other
            for other in results
            if "tokens_per_second" in other
            and other["case"] == REFERENCE
            and (other["size"], other["compiled"]) == (result["size"], result["compiled"])
        ]
        if "tokens_per_second" not in result or not group:
            continue
        seconds_per_token = statistics.mean(1 / other["tokens_per_second"] for other in group)
        speedup = result["tokens_per_second"] * seconds_per_token
        implied = group[0]["flops_per_token"] / result["flops_per_token"]
        result.update(speedup=speedup, implied_speedup=implied, speedup_over_implied=speedup / implied)


def describe(result: dict[str, Any]) -> str:
    """One line about a result."""
    name = f"{result['size']} {result['case']} {'compiled' if result['compiled'] else 'eager'}"
    if "tokens_per_second" not in result:
        return f"{name}: {result.get('skipped') or result['error'].splitlines()[0]}"
    return f"{name}: {result['tokens_per_second']:,.0f} tokens/s, MFU {percent(result['mfu'])}"


def percent(share: float | None) -> str:
    """A share of peak, n/a where the peak is unknown."""
    return "n/a" if share is None else f"{100 * share:.1f} %"


def print_report(report: dict[str, Any]) -> None:
    """All results in one table."""
    console, machine = Console(), report["machine"]
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    table = Table(title=f"training on one {machine['accelerator'] or machine['cpu']}")
    headings = (
        "batch",
        "tokens/s",
        "step ms",
        "MFU",
        "HFU",
        "GiB",
        "depth",
        "recompiled",
        "speed-up",
        "implied",
        "ratio",
    )
    for heading in ("size", "case", "mode"):
        table.add_column(heading)
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in report["results"]:
        label = (result["size"], result["case"], "compiled" if result["compiled"] else "eager")
        if "tokens_per_second" in result:
            table.add_row(*label, *_cells(result))
        else:
            table.add_row(*label, "skipped" if "skipped" in result else "failed")
    console.print(table)


def _cells(result: dict[str, Any]) -> list[str]:
    ratios = [result.get(name) for name in ("speedup", "implied_speedup", "speedup_over_implied")]
    depth, memory = result["mean_depth"], result["peak_memory_gib"]
    recompiled = str(result["recompilations_after_warmup"]) + ("!" if result["recompile_limit_hit"] else "")
    return [
        str(result["micro_batch"]),
        f"{result['tokens_per_second']:,.0f}",
        f"{1e3 * result['step_seconds']:.1f}",
        percent(result["mfu"]),
        percent(result["hfu"]),
        "n/a" if memory is None else f"{memory:.1f}",
        "" if depth is None else f"{depth:.2f}",
        recompiled if result["compiled"] else "",
        *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
    ]


if __name__ == "__main__":
    sys.exit(main())
