"""Peak memory and tokens/s of every activation checkpointing policy on one GPU, beside the memory that is estimated.

examples:
  python -m megamor.bench.gpu_memory --json memory.json
  python -m megamor.bench.gpu_memory --size 135m --cases mor3_expert --policies none,block --compile --json memory.json

A policy is none, recursion, block, or selective with the operations whose results are kept: selective:sdpa+mm. Steps
are those of megamor/bench/gpu_train.py. Estimates (plan/memory.py) are of eager blocks: compiled ones keep less.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megamor.bench.gpu_cases import SIZES, Case, plan_cases
from megamor.bench.gpu_measure import release
from megamor.bench.gpu_train import run_case
from megamor.bench.origin import describe_origin
from megamor.errors import ConfigError, user_errors
from megamor.parallel import World, close_world, init_world
from megamor.plan.memory import step_memory

SCHEMA = "megamor-bench-gpu-memory/1"
POLICIES = ("none", "selective:sdpa+mm", "selective:sdpa", "recursion", "block")
GIB = 2**30


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor/bench/gpu_memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, for all cases")
    parser.add_argument("--size", choices=list(SIZES), default="360m", help="default: 360m")
    parser.add_argument("--cases", type=_names, default=["vanilla", "mor3_expert"], metavar="A,B", help="models")
    parser.add_argument("--policies", type=_names, default=list(POLICIES), metavar="A,B", help=", ".join(POLICIES))
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--micro-batch", default="auto", metavar="N", help="sequences (default: auto, by size)")
    parser.add_argument("--seconds-per-case", type=float, default=6.0, metavar="T", help="to measure (default: 6)")
    parser.add_argument("--backend", choices=["fsdp2", "single"], default="fsdp2", help="default: fsdp2, of one rank")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for testing the bench")
    args = parser.parse_intermixed_args(argv)
    args.profile = False
    return args


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if a case failed."""
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device; --device cpu tests the bench itself")
    cases = [case for name in args.cases for case in policy_cases(args, name)]
    world = init_world(cases[0][1].config(1).parallel)
    command = shlex.join(["python", "-m", "megamor.bench.gpu_memory", *(sys.argv[1:] if argv is None else argv)])
    report: dict[str, Any] = {"schema": SCHEMA, "command": command, **describe_origin(world.device), "results": []}
    try:
        for policy, case in cases:
            report["results"].append(measure_policy(args, policy, case, world))
            release(world.device)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finally:
        close_world()
    print_report(report)
    return int(any("error" in result for result in report["results"]))


def policy_cases(args: argparse.Namespace, name: str) -> list[tuple[str, Case]]:
    """One model under each policy.

    Raises:
        ConfigError: an unknown model, policy or operation.
    """
    planned = plan_cases([args.size], [name], [args.compile], args.backend, ())
    case = next(found for found in planned if found.name == name)
    cases = []
    for policy in args.policies:
        mode, _, kept = policy.partition(":")
        own = [f"train.activation_checkpointing={mode}"]
        if kept:
            own.append(f"train.selective_ops=[{kept.replace('+', ',')}]")
        made = replace(case, overrides=(*args.overrides, *own))
        made.config(1)  # says what is wrong with it before anything is measured
        cases.append((policy, made))
    return cases


def measure_policy(args: argparse.Namespace, policy: str, case: Case, world: World) -> dict[str, Any]:
    """One result, with the estimate for the micro-batch that fitted."""
    result: dict[str, Any] = {"size": case.size, "case": case.name, "policy": policy, "compiled": case.compiled}
    result |= run_case(args, case, world)
    if "micro_batch" in result:
        memory = step_memory(case.config(result["micro_batch"]), 1, on_gpu=world.device.type == "cuda")
        result["estimated_gib"] = {part: value / GIB for part, value in asdict(memory).items()}
        result["estimated_gib"]["total"] = memory.total / GIB
    print(f"{case.size} {case.name} {policy}: {result.get('error', 'done')}", file=sys.stderr, flush=True)
    return result


def print_report(report: dict[str, Any]) -> None:
    """All results in one table."""
    machine = report["machine"]
    table = Table(title=f"activation checkpointing on one {machine['accelerator'] or machine['cpu']}")
    for heading in ("model", "policy"):
        table.add_column(heading)
    for heading in ("batch", "tokens/s", "peak GiB", "estimated", "quotient"):
        table.add_column(heading, justify="right")
    for result in report["results"]:
        name = f"{result['size']} {result['case']}"
        if "error" in result:
            table.add_row(name, result["policy"], "failed")
            continue
        peak, estimated = result["peak_memory_gib"], result["estimated_gib"]["total"]
        quotient = "n/a" if machine["accelerator"] is None else f"{estimated / peak:.2f}"
        rate = f"{result['tokens_per_second']:,.0f}"
        table.add_row(
            name, result["policy"], str(result["micro_batch"]), rate, f"{peak:.2f}", f"{estimated:.2f}", quotient
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
