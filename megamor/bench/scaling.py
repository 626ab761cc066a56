"""The computed tables of docs/scaling.md: one recipe on more and more GPUs, backends, checkpointing policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megamor.bench.report import Column, Table, number, text
from megamor.config import load_config
from megamor.metrics.gpus import GPUS
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
