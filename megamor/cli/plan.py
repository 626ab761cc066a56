"""Plan a run on GPUs that aren't at hand: does it fit, what is sent, how fast can it be at best, how long does it take?

examples:
  megamor plan --config configs/mor_1b.yaml --gpus 64 --gpu h200
  megamor plan --config configs/mor_1b.yaml --nodes 64 --gpu h100 train.global_batch_size=2048
  megamor plan --config configs/mor_360m.yaml --gpus 8 --gpu a100-40 --json plan.json train.micro_batch_size=32

A line for each backend and activation checkpointing policy. Memory and traffic are computed as tests check them on CPUs
(docs/scaling.md); speeds are bounds from data sheets, and hours are at an MFU that you choose.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megamor.config import load_config
from megamor.errors import ConfigError, user_errors
from megamor.plan.estimate import (
    USABLE,
    Cluster,
    Estimate,
    estimate,
    nearest_that_fits,
    parameters,
    run_seconds,
    variants,
)
from megamor.plan.gpus import GPUS, find_gpu

SCHEMA = "megamor-plan/1"
GIB = 2**30
_FILE_WIDTH = 160


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"one of {', '.join(GPUS)}")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--gpus", type=_positive, metavar="N", help="GPUs in all")
    size.add_argument("--nodes", type=_positive, metavar="N", help="the same in whole nodes")
    parser.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help="default: 8")
    parser.add_argument("--mfu", type=float, default=0.35, metavar="X", help="for the hours (default: 0.35)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    return parser.parse_intermixed_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu}: give a share of the peak, above 0 and at most 1")
    report = plan(args)
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {args.json}")


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    per_node = args.gpus_per_node
    cluster = Cluster(find_gpu(args.gpu), args.gpus or args.nodes * per_node, per_node)
    config = load_config(args.config, args.overrides, world_size=cluster.gpus)
    rows = [row(estimate(name, variant, cluster), cluster, args.mfu) for name, variant in variants(config, cluster)]
    return {
        "schema": SCHEMA,
        "config": args.config,
        "overrides": args.overrides,
        "gpu": {"name": args.gpu, **asdict(cluster.gpu), "bf16_peak": cluster.gpu.peak},
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "parameters": parameters(config),
        "tokens_per_step": config.train.global_batch_size * config.data.seq_len,
        "micro_batch_size": config.train.micro_batch_size,
        "mfu": args.mfu,
        "usable_memory": USABLE * cluster.gpu.memory,
        "rows": rows,
    }


def row(found: Estimate, cluster: Cluster, mfu: float) -> dict[str, Any]:
    """One line of the report: bytes, seconds, and what to change where it doesn't fit."""
    nearest = None if found.fits else nearest_that_fits(found.config, cluster)
    return {
        "backend": found.backend,
        "activation_checkpointing": found.config.train.activation_checkpointing,
        "memory": {**asdict(found.memory), "total": found.memory.total},
        "fits": found.fits,
        "instead": None if found.fits else nearest[0] if nearest else "nothing fits: more GPUs, or shorter sequences",
        "traffic": {**asdict(found.traffic), "sent": found.traffic.sent},
        "compute_seconds": found.compute_seconds,
        "communication_seconds": found.communication_seconds,
        "update_seconds": found.update_seconds,
        "mfu_bound": found.mfu_bound,
        "mfu_without_overlap": found.mfu_without_overlap,
        "hours": run_seconds(found, cluster, mfu) / 3600,
    }


def print_report(report: dict[str, Any]) -> None:
    """One table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    gpu = report["gpu"]
    title = (
        f"{report['config']}: {report['parameters'] / 1e6:,.0f}M parameters, {report['tokens_per_step']:,} tokens a "
        f"step, micro-batch {report['micro_batch_size']}\n"
        f"{report['gpus']} x {gpu['device']} on {report['nodes']} nodes, "
        f"{report['usable_memory'] / GIB:.0f} GiB usable; hours at {report['mfu']:.0%} MFU or the bound without overlap"
    )
    table = Table(
        title=title,
        caption="GiB per GPU; GB sent by each GPU in a step; MFU at most, with all communication hidden / none",
    )
    for heading in ("backend", "checkpointing"):
        table.add_column(heading)
    for heading in ("weights", "grads", "optim", "gathered", "activ.", "loss", "total", "sent GB", "MFU ≤", "hours"):
        table.add_column(heading, justify="right")
    table.add_column("if it doesn't fit", overflow="fold")
    for line in report["rows"]:
        memory = line["memory"]
        cells = [f"{value / GIB:.1f}" for value in memory.values()]
        cells[-1] += "" if line["fits"] else " !"
        bound = f"{line['mfu_bound']:.0%} / {line['mfu_without_overlap']:.0%}"
        sent = f"{line['traffic']['sent'] / 1e9:.2f}"
        names = [line["backend"], line["activation_checkpointing"]]
        table.add_row(*names, *cells, sent, bound, f"{line['hours']:.1f}", line["instead"] or "")
    console.print(table)


if __name__ == "__main__":
    main()
