"""Print the generated tables of docs/scaling.md, or update them in the page.

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
    """A recipe on `nodes` nodes with its own global batch, in micro-batches of up to 8 sequences."""
    cluster = Cluster(GPUS[GPU], nodes * PER_NODE, PER_NODE)
    config = load_config(ROOT / "configs" / f"{recipe}.yaml")
    micro_batch = min(8, config.train.global_batch_size // cluster.gpus)
    return replace(config, train=replace(config.train, micro_batch_size=micro_batch)), cluster


def found(recipe: str, nodes: int, backend: str, policy: str = "none") -> tuple[Estimate, Cluster]:
    """The estimate of one backend and checkpointing policy, and its cluster."""
    config, cluster = at_scale(recipe, nodes)
    for name, variant in variants(config, cluster):
        if (name, variant.train.activation_checkpointing) == (backend, policy):
            return estimate(name, variant, cluster), cluster
    raise AssertionError(f"{backend} on {nodes} nodes isn't planned")


def heading(names: str) -> Iterator[str]:
    """The head of a Markdown table, from the names of its columns separated by |."""
    yield f"| {names} |"
    yield "|---" * len(names.split("|")) + "|"


def strong_scaling(recipe: str) -> Iterator[str]:
    """Table: one recipe with its global batch unchanged, on 1 to 64 nodes."""
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
    """Table: every backend on 64 nodes."""
    yield from heading("backend | GiB per GPU | GB sent per GPU and step | communication, ms | MFU at most")
    for backend in ("ddp", "fsdp2", "fsdp2, kept", "hsdp", "zero1", "zero2", "zero3"):
        result, _ = found(recipe, NODES[-1], backend)
        yield (
            f"| {backend} | {result.memory.total / GIB:.1f} | {result.traffic.sent / 1e9:.2f} "
            f"| {1e3 * result.communication_seconds:.0f} | {result.mfu_bound:.0%} / {result.mfu_without_overlap:.0%} |"
        )


def policies(recipe: str) -> Iterator[str]:
    """Table: checkpointing policies on one node."""
    yield from heading("checkpointing | activations, GiB | step, GiB per GPU | MFU at most")
    for policy in ("none", "selective", "recursion", "block"):
        result, _ = found(recipe, 1, "fsdp2", policy)
        memory = result.memory
        yield f"| `{policy}` | {memory.activations / GIB:.1f} | {memory.total / GIB:.1f} | {result.mfu_bound:.0%} |"


def measured_policies() -> Iterator[str]:
    """Tables: policies as `megamor bench checkpointing` measured them on a CPU, one table for each model size."""
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
        # Reports from before the commands were united name a script that is gone.
        yield f"`{report['command'].replace('python tools/bench.py', 'megamor bench')}`"
        yield ""


def tables() -> dict[str, list[str]]:
    """The lines of all tables by the name of their block in the page."""
    made = {f"scaling-{recipe}": list(strong_scaling(recipe)) for recipe in RECIPES}
    made["backends"] = list(backends_at_the_top("mor_1b"))
    made["policies"] = list(policies("mor_1b"))
    made["measured-policies"] = list(measured_policies())[:-1]
    return made


def updated(page: str) -> str:
    """`page` with the contents of its generated blocks replaced."""
    for name, lines in tables().items():
        block = f"<!-- generated: {name} -->\n\n" + "\n".join(lines) + "\n\n<!-- /generated -->"
        page, count = re.subn(rf"<!-- generated: {name} -->.*?<!-- /generated -->", lambda _: block, page, flags=re.S)  # noqa: B023
        assert count == 1, name
    return page


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or with --write update the page."""
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
