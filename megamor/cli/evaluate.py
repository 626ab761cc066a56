"""Measure a checkpoint: its validation loss per token, and downstream tasks through lm-evaluation-harness.

examples:
  megamor evaluate --checkpoint runs/quickstart/checkpoints/latest --data runs/quickstart/data/stdlib_val
  megamor evaluate --checkpoint runs/mor_135m --tasks paper,wikitext,ptb --json figures.json
  torchrun --no-python --nproc-per-node 8 megamor evaluate --checkpoint runs/mor_135m --tasks glue --num-fewshot 5

Routers that look ahead in training get two rows. `top-k` is the routing of training: it sees later tokens, so it can't
generate text. `causal` is the inference rule, and the only figure to quote. The smaller the gap between the two, the
better the router has learned to decide without looking ahead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megamor.cli import (
    add_cache_options,
    add_exit_options,
    cache_options,
    chosen_exit,
    command_parser,
    integers,
    output_file,
    positive,
)
from megamor.cli.evaluate_tasks import add_task_options, measure_tasks, read_tasks
from megamor.errors import ConfigError, user_errors

if TYPE_CHECKING:
    from megamor.config.exits import ExitRule
    from megamor.evaluate.sweep import Setting
    from megamor.load import LoadedModel
    from megamor.model import Transformer
    from megamor.parallel import World


SCHEMA = "megamor-evaluation/1"
MEANS = ("loss", "bits_per_byte", "accuracy", "mean_depth", "flops_per_token")
ROUTINGS = (("topk", "top-k"), ("causal", "causal"))


def named_sets(prefixes: Sequence[str]) -> dict[str, str]:
    """Data sets by short names; ConfigError if one is given twice."""
    from megamor.data.dataset import short_names

    if len({Path(prefix) for prefix in prefixes}) < len(prefixes):
        raise ConfigError(f"--data names a data set twice: {' '.join(prefixes)}; name each once")
    return dict(zip(short_names(prefixes), prefixes, strict=True)) if prefixes else {}


def changed_rules(model: Transformer, arguments: argparse.Namespace) -> list[Setting]:
    """What `--max-depth`, `--fixed-depth` and `--threshold` ask for; ConfigError if it doesn't fit the model."""
    from megamor.evaluate.sweep import settings

    names = ("max_depth", "fixed_depth", "threshold")
    given: dict[str, Any] = {f"{n}s": [] if (v := getattr(arguments, n)) is None else [v] for n in names}
    chosen, left_out = settings(model, None, **given, exits={}) if any(given.values()) else ([], [])
    if left_out:
        raise ConfigError(f"--threshold {arguments.threshold:g} has no effect ({left_out[0]}): leave it out")
    return chosen


def document(loaded: LoadedModel, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the JSON file says of data sets, by name; `mean` has the plain means over the sets."""
    from megamor.origin import describe_origin

    return {
        "schema": SCHEMA,
        "checkpoint": str(loaded.directory),
        "step": loaded.step,
        "exit": str(loaded.model.exit) if loaded.model.exit else None,
        "origin": describe_origin(loaded.device),
        "sets": sets,
        "mean": means(sets),
    }


def means(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over the sets of the figures `MEANS` that they have; None where one set has none."""
    names = [f"{name}_{mode}" for name in MEANS for mode, _ in ROUTINGS]
    values = {name: [figures[name] for figures in sets.values() if name in figures] for name in names}
    return {name: None if None in found else fmean(found) for name, found in values.items() if found}


def show(results: Mapping[str, Mapping[str, Any]], origin: str) -> None:
    """Print a row for each data set, source and way of routing, and the mean of several sets; fits 80 columns."""
    from rich.table import Table

    from megamor.evaluate.loss import perplexity
    from megamor.progress import format_count, plain_console

    print(f"validation loss of {origin}")
    table = Table(padding=(0, 0, 0, 1))
    table.add_column("data", overflow="fold")
    table.add_column("routing")
    for column in ("nats/\ntoken", "perplexity", "bits/\nbyte", "top-1", "mean\ndepth", "FLOPs/\ntoken", "tokens"):
        table.add_column(column, justify="right")

    def add(name: str, routing: str, row: Mapping[str, Any]) -> None:
        loss, byte, right, flops = (row.get(key) for key in MEANS if key != "mean_depth")
        known = f"{byte:.3f}" if byte else "", "" if right is None else f"{right:.1%}", f"{row['mean_depth']:.2f}"
        counts = format_count(flops) if flops else "", f"{row['tokens']:,.0f}" if "tokens" in row else ""
        table.add_row(name, routing, f"{loss:.4f}", f"{perplexity(row['loss']):.2f}", *known, *counts)

    mean = {"mean of the sets": means(results)} if len(results) > 1 else {}
    for name, figures in [*results.items(), *mean.items()]:
        for mode, label in ROUTINGS:
            if f"loss_{mode}" in figures:
                own = {key: figures[f"{key}_{mode}"] for key in MEANS if f"{key}_{mode}" in figures}
                add(name, label, {**own, **({"tokens": figures["tokens"]} if "tokens" in figures else {})})
                for row in figures.get(f"by_source_{mode}", ()):
                    add(f"  {row['source']}", label, row)
    plain_console().print(table)
    for name, figures in results.items():
        for row in figures.get("by_position_causal", ()):
            places = f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}–{row['last']}"
            print(
                f"{name}: positions {places:>9}: {row['loss']:.4f} nats/token, top-1 {row['accuracy']:.1%}, depth "
                f"{row['mean_depth']:.2f}"
            )
        for row in figures.get("kv_curve", ()):
            entries = "all keys" if row["budget"] is None else f"{row['budget']} keys"
            print(f"{name}: {entries}, {row['kv_bytes'] / 1e3:,.1f} kB a document: {row['loss']:.4f} nats/token")


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure every data set, print the table, and write the JSON file if asked to."""
    parser = command_parser("evaluate", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, `latest`, or the directory of a run or an export")
    add("--data", default=[], nargs="+", metavar="PREFIX", help="data sets: paths of .bin/.idx pairs without suffix")
    add("--sequences", type=int, help="how many sequences of each set to measure (default: all)")
    add("--batch-size", type=int, default=16, help="sequences per batch (default: %(default)s)")
    text = "also means over positions 0, 1, 2–3, 4–7, … of the window or document"
    add("--by-position", action="store_true", help=text)
    add("--by-source", action="store_true", help="also means over the sources that the side file of each set lists")
    budgets = "also decode with at most so many cached keys and values per layer, such as 64,128: loss against bytes"
    add("--kv-budgets", "--kv-budget", type=integers, default=[], metavar="N,N", help=budgets)
    add_cache_options(parser)
    add("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    add_exit_options(parser)
    add("--max-depth", type=positive, metavar="N", help="at most N recursions of each stage for a token")
    add("--fixed-depth", type=positive, metavar="N", help="exactly N recursions, whatever the router says")
    add("--threshold", type=float, metavar="X", help="another threshold of the router, as in `megamor sweep-depth`")
    add_task_options(parser)
    add("--json", type=output_file, metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args(argv)
    for option in ("sequences", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if not (arguments.data or arguments.tasks):
        parser.error("nothing to measure: give --data or --tasks")
    changes = [name for name in ("max_depth", "fixed_depth", "threshold") if getattr(arguments, name) is not None]
    if arguments.max_depth and arguments.fixed_depth:
        parser.error("--max-depth and --fixed-depth exclude each other: give one")
    if changes and arguments.tasks and arguments.routing == "topk":
        parser.error(f"--{changes[0].replace('_', '-')} changes the inference rule: leave out --routing topk")
    rule, names = chosen_exit(arguments), named_sets(arguments.data)
    cache_options(arguments, arguments.kv_budgets)  # wrong ones are reported before torch is imported

    from megamor.config import ParallelConfig
    from megamor.parallel import joined_world

    with joined_world(ParallelConfig(), arguments.device) as world:
        measure(arguments, rule, changes, names, world)


def measure(
    arguments: argparse.Namespace, rule: ExitRule | None, changes: list[str], names: dict[str, str], world: World
) -> None:
    """Do what the options ask for. Collective: ranks share the work of tasks; the first does all the rest."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from megamor.evaluate.loss import dataset_losses
    from megamor.load import load_model
    from megamor.model import CacheBound
    from megamor.progress import plain_console
    from megamor.ranks import run_on_all_ranks

    kept = cache_options(arguments, arguments.kv_budgets)
    bounds = [CacheBound(budget, **kept) for budget in arguments.kv_budgets]
    by: list[Any] = [what for what in ("position", "source") if getattr(arguments, f"by_{what}")]
    size = {"sequences": arguments.sequences, "batch_size": arguments.batch_size}
    loaded = run_on_all_ranks(lambda: load_model(arguments.checkpoint, arguments.device or str(world.device)))
    loaded.model.set_exit(rule)
    if arguments.tasks:
        run_on_all_ranks(loaded.codec)  # a model without a tokenizer is reported before anything is loaded
        tasks = run_on_all_ranks(lambda: read_tasks(arguments))
    # On stderr, on a terminal only, and gone at the end: what remains is the table alone.
    terminal = plain_console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=terminal, transient=True, disable=not (terminal.is_terminal and world.is_main))
    with bar as progress, ExitStack() as stack:
        for setting in run_on_all_ranks(lambda: changed_rules(loaded.model, arguments)):
            stack.enter_context(setting.on(loaded.model))

        def losses() -> dict[str, Any]:
            options: dict[str, Any] = {**size, "bounds": bounds, "by": by, "watch": progress.track}
            sets = names.items() if world.is_main else ()
            return {name: {"data": prefix, **dataset_losses(loaded, prefix, **options)} for name, prefix in sets}

        results = run_on_all_ranks(losses)
        if results:
            told = [f"exit {rule}"] * (rule is not None) + [f"{name} {getattr(arguments, name):g}" for name in changes]
            show(results, loaded.origin + (f", causal with {', '.join(told)}" if told else ""))
        report = document(loaded, results) | {name: getattr(arguments, name) for name in changes}
        if arguments.tasks:
            report["tasks"] = measure_tasks(arguments, loaded, tasks, progress, world.is_main)
    if arguments.json and world.is_main:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
