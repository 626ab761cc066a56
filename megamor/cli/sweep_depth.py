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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megamor.cli import command_parser, output_file, positive
from megamor.cli.evaluate_tasks import add_task_options, read_tasks
from megamor.errors import ConfigError, user_errors

if TYPE_CHECKING:
    from megamor.data.loader import MicroBatch
    from megamor.evaluate.sweep import Setting
    from megamor.load import LoadedModel

SCHEMA = "megamor-sweep/1"


def comma_separated(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argument's type: values with commas between them, or `none`."""

    def numbers(text: str) -> list[Any]:
        return [] if text == "none" else [kind(number) for number in text.split(",")]

    return numbers


def rule_and_thresholds(text: str) -> tuple[str, list[float]]:
    """`entropy:0.1,0.5`, as an argument's type; `none` for no rule."""
    name, _, values = text.partition(":")
    return name, comma_separated(float)(values if name != "none" else name)


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each setting."""
    from rich.table import Table

    from megamor.progress import format_count, plain_console

    table, own = Table("rule", padding=(0, 0, 0, 1)), entries[0]
    tasks = [name.replace(" ", "\n") for name in own.get("tasks", ())]
    for column in ("value", "nats/\ntoken", "top-1", "mean\ndepth", "FLOPs/\ntoken", "of own", *tasks):
        table.add_column(column, justify="right")
    for row in entries:
        flops, value = row["flops_per_token"], "" if row["value"] is None else f"{row['value']:g}"
        figures = f"{row['loss']:.4f}", f"{row['accuracy']:.1%}", f"{row['mean_depth']:.2f}"
        scores = (f"{score:.4f}" for score in row.get("tasks", {}).values())
        share = f"{flops / own['flops_per_token']:.0%}"
        table.add_row(row["label"], value, *figures, format_count(flops), share, *scores)
    plain_console().print(table)


def scorer(arguments: argparse.Namespace, loaded: LoadedModel) -> Callable[[], dict[str, float]] | None:
    """What measures the first metric of each of `--tasks`, by `task metric`; None without any."""
    if not arguments.tasks:
        return None
    from megamor.evaluate.scoring import Scorer
    from megamor.evaluate.tasks import run_tasks

    tasks, codec, dtype = read_tasks(arguments), loaded.codec(), loaded.model.embed.weight.dtype
    model = Scorer(loaded.model, loaded.device, loaded.model, batch_size=arguments.batch_size, dtype=dtype)

    def score() -> dict[str, float]:
        found: dict[str, float] = {}
        for task, metrics in run_tasks(model, codec, tasks)["results"].items():
            names = [name for name, value in metrics.items() if isinstance(value, float) and "_stderr" not in name]
            found |= {f"{task} {name.removesuffix(',none')}": metrics[name] for name in names[:1]}
        return found

    return score


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure every setting, print the table, and write the files asked for."""
    parser = command_parser("sweep-depth", __doc__)
    add, floats, depths = parser.add_argument, comma_separated(float), comma_separated(int)
    add("--checkpoint", required=True, help="a checkpoint, `latest`, or the directory of a run or an export")
    add("--data", required=True, nargs="+", metavar="PREFIX", help="data sets: paths of .bin/.idx pairs without suffix")
    add("--max-depths", type=depths, metavar="N,N", help="most recursions of a token (default: 1 to all)")
    add("--fixed-depths", type=depths, metavar="N,N", help="recursions of every token (default: 1 to all)")
    text = "thresholds of the router at inference: its setting, or, where that is learned, numbers added to the scores"
    add("--thresholds", type=floats, metavar="X,X", help=text)
    text = "exit rules and their thresholds, such as entropy:0.5,1; `none` leaves a kind out, here and above"
    add("--exits", type=rule_and_thresholds, nargs="+", metavar="RULE:X,X", help=text)
    add("--sequences", type=positive, default=128, help="sequences of each set, evenly spread (default: %(default)s)")
    add("--batch-size", type=positive, default=16, help="sequences per batch (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    add_task_options(parser)
    add("--json", type=output_file, metavar="FILE", help="also write the figures as JSON")
    add("--plot", type=output_file, metavar="FILE.svg", help="also draw them; scores of tasks in FILE_<task>.svg")
    arguments = parser.parse_args(argv)
    if arguments.routing == "topk":
        parser.error("--routing topk sees later tokens, and the sweep is of inference rules: leave it out")
    if arguments.plot and arguments.plot.suffix != ".svg":
        parser.error(f"--plot {arguments.plot}: give a name that ends in .svg")

    from megamor.cli.evaluate import named_sets
    from megamor.evaluate.loss import open_validation_set
    from megamor.evaluate.sweep import measure, settings
    from megamor.load import load_model
    from megamor.origin import describe_origin
    from megamor.progress import ProgressDisplay
    from megamor.report.figures import save
    from megamor.report.router import sweep_figure

    data, size = named_sets(arguments.data), {"sequences": arguments.sequences, "batch_size": arguments.batch_size}
    loaded = load_model(arguments.checkpoint, arguments.device)
    first, *_ = [next(iter(open_validation_set(loaded, prefix).batches(0, 1, 4))) for prefix in data.values()]
    given = {name: getattr(arguments, name) for name in ("max_depths", "fixed_depths", "thresholds")}
    chosen, left_out = settings(loaded.model, first, **given, exits=arguments.exits and dict(arguments.exits))
    score, entries = scorer(arguments, loaded), []
    with ProgressDisplay("sweep", total=len(chosen), unit="settings") as progress:

        def watch(setting: Setting, batches: Any, total: int, description: str) -> Iterator[MicroBatch]:
            for batch in batches:
                yield batch
                progress.advance(1 / total / len(data), {"rule": f"{setting.label} {setting.value:g}"})

        for setting in chosen:
            try:
                entries.append(measure(loaded, data, setting, score, **size, watch=partial(watch, setting)))
            except ConfigError as error:
                left_out.append(str(error))
    print(f"loss of {loaded.origin} on {', '.join(data)}, causal rule")
    show(entries)
    for sentence in left_out:
        print(f"left out: {sentence}")
    document: dict[str, Any] = {"schema": SCHEMA, "checkpoint": str(loaded.directory), "step": loaded.step}
    document |= {"origin": describe_origin(loaded.device), "data": data, **size}
    if arguments.json:
        text = json.dumps({**document, "entries": entries, "left_out": left_out}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        save(sweep_figure(entries), arguments.plot)
        for task in entries[0].get("tasks", ()):
            save(sweep_figure(entries, task), arguments.plot.with_stem(f"{arguments.plot.stem}_{task.split()[0]}"))


if __name__ == "__main__":
    main()
