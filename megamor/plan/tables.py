"""The tables of docs/scaling.md, one after the other on standard output, or compared with the file.

examples:
  python -m megamor.plan.tables            # print the tables
  python -m megamor.plan.tables --write    # put them into docs/scaling.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megamor.config import Config, load_config
from megamor.errors import user_errors
from megamor.metrics.gpus import GPUS
from megamor.plan.estimate import Cluster, Estimate, estimate, variants

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = ("mor_1b", "vanilla_1b")
NODES = (1, 2, 4, 8, 16, 32, 64)
GPU, PER_NODE = "h100", 8
GIB = 2**30


def at_scale(recipe: str, nodes: int) -> tuple[Config, Cluster]:
    """A recipe on so many nodes, its global batch shared out: up to 8 sequences a micro-batch."""
    cluster = Cluster(GPUS[GPU], nodes * PER_NODE, PER_NODE)
    config = load_config(ROOT / "configs" / f"{recipe}.yaml")
    micro_batch = min(8, config.train.global_batch_size // cluster.gpus)
    return replace(config, train=replace(config.train, micro_batch_size=micro_batch)), cluster


def found(recipe: str, nodes: int, backend: str, policy: str = "none") -> tuple[Estimate, Cluster]:
    """The estimate for one backend and policy."""
    config, cluster = at_scale(recipe, nodes)
    for name, variant in variants(config, cluster):
        if (name, variant.train.activation_checkpointing) == (backend, policy):
            return estimate(name, variant, cluster), cluster
    raise AssertionError(f"{backend} on {nodes} nodes isn't planned")


def heading(names: str) -> Iterator[str]:
    """The first lines of a table, from the names of its columns."""
    yield f"| {names} |"
    yield "|---" * len(names.split("|")) + "|"


def strong_scaling(recipe: str) -> Iterator[str]:
    """One recipe with its global batch on more and more nodes."""
    yield from heading(
        "nodes | GPUs | micro-batch × accumulation | GiB per GPU | GB sent per GPU and step | step at peak, ms "
        "| communication, ms | MFU at most"
    )
    for nodes in NODES:
        backend = "fsdp2, kept"
        result, cluster = found(recipe, nodes, backend)
        train = result.config.train
        micro_batches = train.global_batch_size // (train.micro_batch_size * cluster.gpus)
        yield (
            f"| {nodes} | {cluster.gpus} | {train.micro_batch_size} × {micro_batches} "
            f"| {result.memory.total / GIB:.1f} | {result.traffic.sent / 1e9:.2f} "
            f"| {1e3 * result.compute_seconds:.0f} | {1e3 * result.communication_seconds:.0f} "
            f"| {result.mfu_bound:.0%} / {result.mfu_without_overlap:.0%} |"
        )


def backends_at_the_top(recipe: str) -> Iterator[str]:
    """Every backend on the largest cluster."""
    yield from heading("backend | GiB per GPU | GB sent per GPU and step | communication, ms | MFU at most")
    for backend in ("ddp", "fsdp2", "fsdp2, kept", "hsdp", "zero1", "zero2", "zero3"):
        result, _ = found(recipe, NODES[-1], backend)
        yield (
            f"| {backend} | {result.memory.total / GIB:.1f} | {result.traffic.sent / 1e9:.2f} "
            f"| {1e3 * result.communication_seconds:.0f} | {result.mfu_bound:.0%} / {result.mfu_without_overlap:.0%} |"
        )


def policies(recipe: str) -> Iterator[str]:
    """Checkpointing policies on one node."""
    yield from heading("checkpointing | activations, GiB | step, GiB per GPU | MFU at most")
    for policy in ("none", "selective", "recursion", "block"):
        result, _ = found(recipe, 1, "fsdp2", policy)
        memory = result.memory
        yield f"| `{policy}` | {memory.activations / GIB:.1f} | {memory.total / GIB:.1f} | {result.mfu_bound:.0%} |"


def measured_policies() -> Iterator[str]:
    """Policies as `bench.py checkpointing` measured them: memory and time of a step on a CPU, at each size."""
    for path in sorted(RESULTS.glob("checkpointing_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        model, train, machine = report["config"]["model"], report["config"]["train"], report["machine"]
        yield (
            f"{model['num_layers']} effective layers, width {model['dim']}, vocabulary {model['vocab_size']:,}, "
            f"{train['micro_batch_size']} × {report['config']['data']['seq_len']} tokens, {train['precision']}; "
            f"{machine['cpu']}, {machine['threads']} threads; {report['rounds']} rounds, {report['date'][:10]}, "
            f"revision {report['commit']['revision']}:"
        )
        yield ""
        yield from heading("policy | time / none | more FLOPs | peak MB | estimated MB | quotient")
        for found in report["policies"]:
            peak, estimated = found["peak_memory_bytes"], found["estimated_memory_bytes"]
            yield (
                f"| `{found['policy']}` | {found['time_ratio']['median']:.2f} | {found['recomputed_flops_ratio']:.1%} "
                f"| {peak / 1e6:.0f} | {estimated / 1e6:.0f} | {estimated / peak:.2f} |"
            )
        yield ""
        yield f"`{report['command']}`"
        yield ""


def tables() -> dict[str, list[str]]:
    """All tables by the name of their block."""
    made = {f"scaling-{recipe}": list(strong_scaling(recipe)) for recipe in RECIPES}
    made["backends"] = list(backends_at_the_top("mor_1b"))
    made["policies"] = list(policies("mor_1b"))
    made["measured-policies"] = list(measured_policies())[:-1]
    return made


def updated(page: str) -> str:
    """The page with the inside of its generated blocks replaced."""
    for name, lines in tables().items():
        block = f"<!-- generated: {name} -->\n\n" + "\n".join(lines) + "\n\n<!-- /generated -->"
        page, count = re.subn(rf"<!-- generated: {name} -->.*?<!-- /generated -->", lambda _: block, page, flags=re.S)  # noqa: B023
        assert count == 1, name
    return page


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m megamor.plan.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update docs/scaling.md")
    if parser.parse_args(argv).write:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, lines in tables().items():
        print("\n".join([name, *lines, ""]))


if __name__ == "__main__":
    main()
