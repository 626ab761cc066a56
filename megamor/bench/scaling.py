"""The computed tables of docs/scaling.md: one recipe on more and more GPUs, backends, checkpointing policies."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megamor.bench.cases import case_of_size
from megamor.bench.report import Column, Table, number, text
from megamor.config import Config, load_config
from megamor.metrics.gpus import GPUS
from megamor.plan import mfu
from megamor.plan.estimate import Cluster, estimate, variants

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NODES = (1, 2, 4, 8, 16, 32, 64)
GPU, PER_NODE = "h100", 8
GIB = 2**30


def planned(recipe: str, nodes: int, backend: str, policy: str = "none") -> dict[str, Any]:
    """One row: a recipe on so many nodes, its global batch divided into micro-batches of up to 8 sequences."""
    cluster = Cluster(GPUS[GPU], nodes * PER_NODE, PER_NODE)
    config = load_config(CONFIGS / f"{recipe}.yaml")
    micro_batch = min(8, config.train.global_batch_size // cluster.gpus)
    config = replace(config, train=replace(config.train, micro_batch_size=micro_batch))
    # The planner names the ways to run, so that the page and `megamor plan` can't differ.
    (variant,) = (
        variant
        for name, variant in variants(config, cluster)
        if (name, variant.train.activation_checkpointing) == (backend, policy)
    )
    return {
        "nodes": nodes,
        "gpus": cluster.gpus,
        "backend": backend,
        "policy": f"`{policy}`",
        "batch": f"{micro_batch} × {config.train.global_batch_size // (micro_batch * cluster.gpus)}",
        **vars(estimate(variant, cluster)),
    }


MEMORY = Column("GiB per GPU", lambda row: f"{row['memory'].total / GIB:.1f}")
SENT = Column("GB sent per GPU and step", lambda row: f"{row['traffic'].sent / 1e9:.2f}")
COMMUNICATION = Column("communication, ms", number("communication_seconds", ".0f", 1e3))
BOUNDS = Column("MFU at most", lambda row: f"{row['mfu_bound']:.0%} / {row['mfu_without_overlap']:.0%}")


def strong_scaling(recipe: str) -> Table:
    """One recipe with its global batch on more and more nodes."""
    columns = (
        Column("nodes", text("nodes")),
        Column("GPUs", text("gpus")),
        Column("micro-batch × accumulation", text("batch")),
        MEMORY,
        SENT,
        Column("step at peak, ms", number("compute_seconds", ".0f", 1e3)),
        COMMUNICATION,
        BOUNDS,
    )
    return Table(columns, [planned(recipe, nodes, "hsdp, kept" if nodes > 1 else "fsdp2, kept") for nodes in NODES])


def backends(recipe: str) -> Table:
    """Every backend on the largest cluster."""
    names = ("ddp", "fsdp2", "fsdp2, kept", "hsdp", "hsdp, kept", "zero1", "zero2", "zero3")
    columns = (Column("backend", text("backend"), left=True), MEMORY, SENT, COMMUNICATION, BOUNDS)
    return Table(columns, [planned(recipe, NODES[-1], name) for name in names])


def policies(recipe: str) -> Table:
    """Activation checkpointing policies on one node."""
    columns = (
        Column("checkpointing", text("policy"), left=True),
        Column("activations, GiB", lambda row: f"{row['memory'].activations / GIB:.1f}"),
        Column("step, GiB per GPU", MEMORY.cell),
        Column("MFU at most", number("mfu_bound", ".0%")),
    )
    return Table(columns, [planned(recipe, 1, "fsdp2", name) for name in ("none", "selective", "recursion", "block")])


MICRO_BATCHES = {"135m": 32, "360m": 16, "1.7b": 8}


def estimated_case(size: str, name: str) -> Config:
    """A case of `megamor bench gpu`: vanilla has the effective depth of MoR-3."""
    depth = case_of_size(size, "mor3_expert").config().model.num_layers
    return case_of_size(size, name, [f"model.num_layers={depth}"]).config(MICRO_BATCHES[size])


def expected_mfu(name: str) -> Table:
    """MFU of vanilla in each way to run it, and tokens/s of the case `name` over vanilla's."""
    rows = []
    for way in mfu.WAYS:
        row = {"way": way.name}
        for size, batch in MICRO_BATCHES.items():
            (found, tokens), (_, other) = (
                mfu.expected(estimated_case(size, case), way, batch) for case in ("vanilla", name)
            )
            row |= {f"{size} MFU": f"{found:.0%}", f"{size} MoR-3 / vanilla": f"{other / tokens:.2f}"}
        rows.append(row)
    # A column is looked up by its header, which may have a dot: `text` would take that for a path.
    headers = [f"{size} {figure}" for figure in ("MFU", "MoR-3 / vanilla") for size in MICRO_BATCHES]
    shown = [Column(header, partial(str.format, "{0[" + header + "]}")) for header in headers]
    return Table((Column("", text("way"), left=True), *shown), rows)


def milliseconds(name: str) -> Table:
    """Milliseconds of a micro-batch by operation, in the fastest way and (in parentheses) as in the first."""
    columns, rows = [Column("operation", text("operation"), left=True)], dict[str, dict[str, Any]]()
    for size, batch in MICRO_BATCHES.items():
        config = estimated_case(size, name)
        last, first = (mfu.seconds(config, mfu.WAYS[index], batch, accumulation=4) for index in (-1, 0))
        last["all"], first["all"] = sum(last.values()), sum(first.values())
        for operation, value in last.items():
            cell = f"{value / 4 * 1e3:.1f} ({first[operation] / 4 * 1e3:.1f})"
            rows.setdefault(operation, {"operation": operation})[size] = cell
        columns.append(Column(f"{size}, {batch} sequences", partial(str.format, "{0[" + size + "]}")))
    return Table(columns, [*rows.values()])
