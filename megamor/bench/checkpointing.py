"""Measure what activation checkpointing saves and costs: memory and time of a training step under each policy.

examples:
  megamor bench checkpointing --config configs/bench/cpu.yaml --rounds 8 --json out.json
  megamor bench checkpointing --config configs/bench/cpu_wide.yaml --policies none,block --threads 2

A policy is none, recursion, block, or selective with the operations whose results are kept: selective:sdpa+mm. Steps of
all policies are run in turns on the same batches. Peak memory is measured as by `bench.py train`, and stands beside the
estimate of megamor/plan/memory.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megamor.bench.cases import Case
from megamor.bench.memory import step_memory
from megamor.bench.origin import describe_origin
from megamor.bench.train import Budget, Measurements, measure_rounds, quartiles
from megamor.config import config_to_dict, load_config
from megamor.errors import ConfigError, user_errors
from megamor.model.flops import nominal_flops
from megamor.plan.memory import step_memory as estimated_memory

SCHEMA = "megamor-bench-checkpointing/1"
POLICIES = ("none", "selective:sdpa+mm", "selective:sdpa", "recursion", "block")
_FILE_WIDTH = 110


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench checkpointing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, for all policies")
    parser.add_argument("--config", required=True, metavar="FILE", help="the model, as configs/bench/cpu.yaml")
    parser.add_argument("--policies", default=",".join(POLICIES), metavar="A,B", help=f"default: {','.join(POLICIES)}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each policy (default: 5)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    return parser.parse_intermixed_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: torch sees no CUDA device; leave it out or install a CUDA build")
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: give 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [policy_case(args.config, args.overrides, policy) for policy in args.policies.split(",")]
    origin = describe_origin(device)
    threads = torch.get_num_threads()
    peaks = {case.name: step_memory(case, device, threads) for case in cases}
    measured = measure_rounds(cases, device, Budget(0.0, args.rounds), lambda _: None)
    report = {
        "schema": SCHEMA,
        "command": shlex.join(["megamor", "bench", "checkpointing", *(argv or ())]),
        **origin,
        "config": config_to_dict(cases[0].config),
        "rounds": args.rounds,
        "policies": [
            summary(case, measured[case.name], measured[cases[0].name], peaks[case.name], device) for case in cases
        ],
    }
    print_report(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {args.json}")


def policy_case(path: str, overrides: Sequence[str], policy: str) -> Case:
    """The configuration under one policy, attention without documents: the batches are random tokens.

    Raises:
        ConfigError: an unknown policy or operation.
    """
    mode, _, kept = policy.partition(":")
    own = [f"train.activation_checkpointing={mode}", "data.document_mask=false"]
    if kept:
        own.append(f"train.selective_ops=[{kept.replace('+', ',')}]")
    return Case(policy, policy, tuple(own), load_config(path, [*overrides, *own]))


def summary(
    case: Case, measured: Measurements, reference: Measurements, peak: int | None, device: torch.device
) -> dict[str, Any]:
    """One policy; ratios are to the first. Memory is what training adds to the built model."""
    estimate = estimated_memory(case.config, 1, on_gpu=device.type == "cuda")
    flops = nominal_flops(case.config, case.config.train.micro_batch_size)
    ratios = [mine / other for mine, other in zip(measured.seconds, reference.seconds, strict=True)]
    return {
        "policy": case.name,
        "step_seconds": quartiles(measured.seconds),
        "time_ratio": quartiles(ratios),
        "recomputed_flops_ratio": flops.recomputed(case.config.train) / flops.training,
        "peak_memory_bytes": peak,
        "estimated_memory_bytes": round(estimate.total - 4 * measured.parameters),
        "training_flops": statistics.mean(measured.flops),
        "round_seconds": measured.seconds,
    }


def print_report(report: dict[str, Any]) -> None:
    """One table."""
    console, machine = Console(), report["machine"]
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    table = Table(title=f"activation checkpointing, {machine['accelerator'] or machine['cpu']}")
    table.add_column("policy")
    for heading in ("step ms", "quartiles", "time ratio", "more FLOPs", "peak MB", "estimated", "quotient"):
        table.add_column(heading, justify="right")
    for found in report["policies"]:
        seconds = {name: f"{1e3 * value:.0f}" for name, value in found["step_seconds"].items()}
        peak, estimated = found["peak_memory_bytes"], found["estimated_memory_bytes"]
        table.add_row(
            found["policy"],
            seconds["median"],
            f"{seconds['q1']}–{seconds['q3']}",
            f"{found['time_ratio']['median']:.3f}",
            f"{found['recomputed_flops_ratio']:.1%}",
            "n/a" if peak is None else f"{peak / 1e6:.0f}",
            f"{estimated / 1e6:.0f}",
            "n/a" if peak is None else f"{estimated / peak:.2f}",
        )
    console.print(table)
