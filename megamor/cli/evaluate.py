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

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megamor.cli import (
    add_cache_options,
    add_exit_options,
    cache_options,
    chosen_exit,
    command_parser,
    integers,
    output_file,
)
from megamor.cli.evaluate_tasks import add_task_options, measure_tasks, read_tasks
from megamor.errors import user_errors


def show(results: Mapping[str, Mapping[str, Any]], origin: str) -> None:
    """Print a row for each data set and way of routing; fits 80 columns."""
    from rich.table import Table

    from megamor.data.dataset import short_names
    from megamor.progress import plain_console

    print(f"validation loss of {origin}")
    table = Table()
    table.add_column("data", overflow="fold")
    table.add_column("routing")
    for column in ("nats/token", "perplexity", "mean depth", "FLOPs/token", "tokens"):
        table.add_column(column, justify="right")
    for name, figures in zip(short_names([*results]), results.values(), strict=True):
        for mode, label in (("topk", "top-k"), ("causal", "causal")):
            if f"loss_{mode}" in figures:
                keys = ("loss", "perplexity", "mean_depth", "flops_per_token")
                loss, ppl, depth, flops = (figures[f"{key}_{mode}"] for key in keys)
                shown = (f"{loss:.4f}", f"{ppl:.2f}", f"{depth:.2f}", f"{flops:.3e}", f"{figures['tokens']:,.0f}")
                table.add_row(name, label, *shown)
    plain_console().print(table)
    for name, figures in results.items():
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
    budgets = "also decode with at most so many cached keys and values per layer, such as 64,128: loss against bytes"
    add("--kv-budgets", "--kv-budget", type=integers, default=[], metavar="N,N", help=budgets)
    add_cache_options(parser)
    add("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    add_exit_options(parser)
    add_task_options(parser)
    add("--json", type=output_file, metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args(argv)
    for option in ("sequences", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if not (arguments.data or arguments.tasks):
        parser.error("nothing to measure: give --data or --tasks")
    rule, kept = chosen_exit(arguments), cache_options(arguments, arguments.kv_budgets)

    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from megamor.config import ParallelConfig
    from megamor.evaluate.loss import dataset_losses
    from megamor.load import load_model
    from megamor.model import CacheBound
    from megamor.parallel import close_world, init_world
    from megamor.progress import plain_console
    from megamor.ranks import report_errors_once, run_on_all_ranks

    bounds = [CacheBound(budget, **kept) for budget in arguments.kv_budgets]
    size = {"sequences": arguments.sequences, "batch_size": arguments.batch_size}
    world = init_world(ParallelConfig())
    # On stderr, on a terminal only, and gone at the end: what remains is the table alone.
    terminal = plain_console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    silent = not (terminal.is_terminal and world.is_main)
    with report_errors_once(), Progress(*columns, console=terminal, transient=True, disable=silent) as progress:
        loaded = run_on_all_ranks(lambda: load_model(arguments.checkpoint, arguments.device or str(world.device)))
        loaded.model.set_exit(rule)
        if arguments.tasks:
            run_on_all_ranks(loaded.codec)  # a model without a tokenizer is reported before anything is loaded
            tasks = run_on_all_ranks(lambda: read_tasks(arguments))

        def losses() -> dict[str, Any]:
            # Ranks share the work of tasks only.
            prefixes = arguments.data if world.is_main else ()
            return {
                prefix: dataset_losses(loaded, prefix, **size, bounds=bounds, watch=progress.track)
                for prefix in prefixes
            }

        results = run_on_all_ranks(losses)
        if results:
            show(results, loaded.origin + (f", causal with exit {rule}" if rule else ""))
        document = results[arguments.data[0]] if len(results) == 1 else results
        if arguments.tasks:
            bars: dict[str, TaskID] = {}

            def watch(what: str, total: int, done: int) -> None:
                bars[what] = bars[what] if what in bars else progress.add_task(what, total=total)
                progress.update(bars[what], completed=done)

            document = {**document, "tasks": measure_tasks(arguments, loaded, tasks, watch, world.is_main)}
    if arguments.json and world.is_main:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    close_world()
