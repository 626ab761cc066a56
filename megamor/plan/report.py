"""The report of `megamor plan`: every backend and checkpointing policy on one cluster, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from megamor.config import Config
from megamor.plan.estimate import USABLE, Cluster, estimate, nearest_that_fits, run_seconds, variants
from megamor.plan.memory import unit_parameters
from megamor.progress import plain_console

SCHEMA = "megamor-plan/1"
GIB = 2**30
NOTHING_FITS = "nothing fits: more GPUs, or shorter sequences"


def plan_report(
    config: Config, cluster: Cluster, *, gpu: str, mfu: float, source: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Plain data (JSON): what all variants have in common, and a row for each. Bytes and seconds.

    Args:
        config: valid on `cluster`.
        gpu: name of the cluster's GPU, and `source` the recipe that was loaded with `overrides`: for the record.
        mfu: model FLOPs utilisation at which the hours are computed.
    """
    return {
        "schema": SCHEMA,
        "config": source,
        "overrides": list(overrides),
        "gpu": {"name": gpu, **asdict(cluster.gpu)},
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "parameters": sum(unit_parameters(config).values()),
        "tokens_per_step": config.train.global_batch_size * config.data.seq_len,
        "micro_batch_size": config.train.micro_batch_size,
        "mfu": mfu,
        "usable_memory": USABLE * cluster.gpu.memory,
        "rows": [_row(name, variant, cluster, mfu) for name, variant in variants(config, cluster)],
    }


def _row(backend: str, config: Config, cluster: Cluster, mfu: float) -> dict[str, Any]:
    found = estimate(config, cluster)
    nearest = None if found.fits else nearest_that_fits(config, cluster)
    return {
        "backend": backend,
        "activation_checkpointing": config.train.activation_checkpointing,
        **asdict(found),
        "memory": {**asdict(found.memory), "total": found.memory.total},
        "traffic": {**asdict(found.traffic), "sent": found.traffic.sent},
        "instead": None if found.fits else nearest[0] if nearest else NOTHING_FITS,
        "hours": run_seconds(config, cluster, min(mfu, found.mfu_without_overlap)) / 3600,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print what all rows share, then a table of at most 80 columns, then how to make the rest fit."""
    console, rows, gpu = plain_console(), report["rows"], report["gpu"]
    hours = {round(row["hours"], 1) for row in rows}
    console.print(
        f"{report['config']}: {report['parameters'] / 1e6:,.0f}M parameters, {report['tokens_per_step']:,} tokens per "
        f"step, micro-batch size {report['micro_batch_size']}\n"
        f"{report['gpus']} x {gpu['device']} on {report['nodes']} node{'s' * (report['nodes'] > 1)}, "
        f"{report['usable_memory'] / GIB:.0f} GiB usable on each",
        soft_wrap=True,
    )
    at = f"at {report['mfu']:.0%} MFU"
    if len(hours) == 1:
        console.print(f"{hours.pop():,.1f} hours for the whole run {at}, with any of these")
        hours = set()
    else:
        console.print(f"hours for the whole run {at}, or at the lower bound of MFU where that is less")
    console.print(_table(rows, with_hours=bool(hours)))
    console.print(
        "GiB on each GPU at the busiest moment of a step: states (weights, gradients,\n"
        "optimizer, gathered weights) + activations (with the loss); ! doesn't fit.\n"
        "GB that each GPU sends in a step. Highest possible MFU with all communication\n"
        "hidden behind compute / with none. More figures: --json FILE",
        soft_wrap=True,
    )
    for change in dict.fromkeys(row["instead"] for row in rows if not row["fits"]):
        which = [f"{row['backend']} {row['activation_checkpointing']}" for row in rows if row["instead"] == change]
        console.print(f"! {', '.join(which)}: {'' if change == NOTHING_FITS else 'fits with '}{change}", soft_wrap=True)


def _table(rows: Sequence[dict[str, Any]], with_hours: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("backend", "checkpointing"):
        table.add_column(heading, no_wrap=True)
    for heading in ("states", "activ.", "GiB", "", "sent GB", "MFU at most", *(["hours"] if with_hours else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = ""
    for row in rows:
        memory = row["memory"]
        activations = memory["activations"] + memory["loss"]
        table.add_row(
            "" if row["backend"] == previous else row["backend"],
            row["activation_checkpointing"],
            f"{(memory['total'] - activations) / GIB:.1f}",
            f"{activations / GIB:.1f}",
            f"{memory['total'] / GIB:.1f}",
            "" if row["fits"] else "!",
            f"{row['traffic']['sent'] / 1e9:.2f}",
            f"{row['mfu_bound']:.0%} / {row['mfu_without_overlap']:.0%}",
            *([f"{row['hours']:,.1f}"] if with_hours else []),
        )
        previous = row["backend"]
    return table
