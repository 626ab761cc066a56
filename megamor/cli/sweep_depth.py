"""Measure a trained model at other depths than its own: loss against executed FLOPs, as a table, JSON and a plot.

examples:
  megamor sweep-depth --checkpoint runs/x --data runs/x/data/val --json sweep.json --plot sweep.svg
  megamor sweep-depth --checkpoint runs/x --data runs/x/data/val --max-depths none --exits entropy:0.5,1,2 kl:0.01,0.1

Each row is the model under one rule: at most or exactly so many recursions for every token (of each stage), another
threshold of the router, or an exit once the model is confident. By default these are all depths, and a handful of
thresholds of the router and of each exit rule. All figures are causal; FLOPs include what an exit rule costs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamor.cli import command_parser, integers, positive
from megamor.errors import user_errors

if TYPE_CHECKING:
    from megamor.data.loader import MicroBatch
    from megamor.evaluate.sweep import Setting

SCHEMA = "megamor-sweep/1"
LABELS = {
    "own": "own rule",
    "max_depth": "at most n recursions",
    "fixed_depth": "exactly n recursions",
    "shift": "scores shifted",
}


def numbers(text: str) -> list[float]:
    """Numbers with commas between them, as an argument's type."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers with commas between them") from error


def or_none(kind: Callable[[str], list[Any]]) -> Callable[[str], list[Any]]:
    """An argument's type that also takes the word `none`, for an empty list."""
    return lambda text: [] if text == "none" else kind(text)


def exit_values(text: str) -> tuple[str, list[float]]:
    """`entropy:0.1,0.5`, as an argument's type; `none` for no rule."""
    name, _, values = text.partition(":")
    if text != "none" and not values:
        raise argparse.ArgumentTypeError(f"{text!r}: write a rule and thresholds, such as entropy:0.5,1, or none")
    return name, [] if text == "none" else numbers(values)


def label(rule: str) -> str:
    """What a rule is called in the table and the plot."""
    from megamor.config.exits import EXITS

    return f"exit: {rule}" if rule in EXITS else LABELS.get(rule, f"router.{rule}")


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each setting."""
    from rich.table import Table

    from megamor.progress import format_count, plain_console

    table = Table(padding=(0, 0, 0, 1))
    table.add_column("rule")
    for column in ("value", "nats/\ntoken", "top-1", "mean\ndepth", "FLOPs/\ntoken", "of own"):
        table.add_column(column, justify="right")
    own = entries[0]["flops_per_token"]
    for row in entries:
        flops, value = row["flops_per_token"], "" if row["value"] is None else f"{row['value']:g}"
        figures = f"{row['loss']:.4f}", f"{row['accuracy']:.1%}", f"{row['mean_depth']:.2f}"
        table.add_row(label(row["rule"]), value, *figures, format_count(flops), f"{flops / own:.0%}")
    plain_console().print(table)


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against executed FLOPs, a curve for each rule and a star for the model's own."""
    from megamor.report.figures import COLOURS, canvas, look, save

    own, *others = entries
    rules = dict.fromkeys(row["rule"] for row in others)
    with canvas("Loss against compute", "executed FLOPs per token of a forward pass", "loss (nats per token)") as drawn:
        for style, rule in enumerate(rules):
            points = sorted((row["flops_per_token"], row["loss"]) for row in others if row["rule"] == rule)
            drawn.axes.plot(*zip(*points, strict=True), label=label(rule), **look(style))
        mark: Any = {"linestyle": "", "marker": "*", "markersize": 13, "color": COLOURS["ink"][0], "zorder": 5}
        drawn.axes.plot([own["flops_per_token"]], [own["loss"]], label="the model's own rule", **mark)
    save(drawn.svg, path)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure every setting, print the table, and write the files asked for."""
    parser = command_parser("sweep-depth", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, `latest`, or the directory of a run or an export")
    add("--data", required=True, nargs="+", metavar="PREFIX", help="data sets: paths of .bin/.idx pairs without suffix")
    add("--max-depths", type=or_none(integers), metavar="N,N", help="most recursions of a token (default: 1 to all)")
    add("--fixed-depths", type=or_none(integers), metavar="N,N", help="recursions of every token (default: 1 to all)")
    text = "thresholds of the router at inference: its setting, or, where that is learned, numbers added to the scores"
    add("--thresholds", type=or_none(numbers), metavar="X,X", help=text)
    text = "exit rules and their thresholds, such as entropy:0.5,1; `none` leaves a kind out, here and above"
    add("--exits", type=exit_values, nargs="+", metavar="RULE:X,X", help=text)
    add("--sequences", type=positive, default=128, help="sequences of each set, evenly spread (default: %(default)s)")
    add("--batch-size", type=positive, default=16, help="sequences per batch (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    add("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    add("--plot", type=Path, metavar="FILE.svg", help="also draw them")
    arguments = parser.parse_args(argv)
    if arguments.plot and arguments.plot.suffix != ".svg":
        parser.error(f"--plot {arguments.plot}: give a name that ends in .svg")

    from megamor.cli.evaluate import named_sets
    from megamor.evaluate.loss import open_validation_set
    from megamor.evaluate.sweep import deepest, settings, sweep
    from megamor.load import load_model
    from megamor.origin import describe_origin
    from megamor.progress import ProgressDisplay

    exits = None if arguments.exits is None else dict(arguments.exits)
    data, size = named_sets(arguments.data), {"sequences": arguments.sequences, "batch_size": arguments.batch_size}
    loaded = load_model(arguments.checkpoint, arguments.device)
    deepest(loaded.model)
    batches = [next(iter(open_validation_set(loaded, prefix).batches(0, 1, 4))) for prefix in data.values()]
    given = {name: getattr(arguments, name) for name in ("max_depths", "fixed_depths", "thresholds")}
    chosen, left_out = settings(loaded.model, batches[0], **given, exits=exits)
    with ProgressDisplay("sweep", total=len(chosen), unit="settings") as progress:

        def watch(setting: Setting, batches: Iterable[MicroBatch], total: int) -> Iterable[MicroBatch]:
            for batch in batches:
                yield batch
                shown = label(setting.rule) + ("" if setting.value is None else f" {setting.value:g}")
                progress.advance(1 / total / len(data), {"rule": shown})

        entries, ignored = sweep(loaded, data, chosen, **size, watch=watch)
    print(f"loss of {loaded.origin} on {', '.join(data)}, causal rule")
    show(entries)
    for sentence in (*left_out, *ignored):
        print(f"left out: {sentence}")
    if arguments.json:
        document = {
            "schema": SCHEMA,
            "checkpoint": str(loaded.directory),
            "step": loaded.step,
            "origin": describe_origin(loaded.device),
            "data": data,
            **size,
            "entries": entries,
            "left_out": [*left_out, *ignored],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(entries, arguments.plot)
