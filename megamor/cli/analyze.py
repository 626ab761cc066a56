"""Show what a trained router has learned: how deep tokens go, and what depth correlates with.

examples:
  megamor analyze --checkpoint runs/quickstart --data runs/quickstart/data/stdlib_val --output analysis
  megamor analyze --checkpoint runs/seed0 --data data/val --against runs/seed1 runs/seed2 --json analysis.json

Depths are those of the causal rule; for routers that look ahead in training, those of top-k are beside them. Intervals
are at 95 %, by bootstrap over documents. --output writes analysis.json, plots (SVG) and one page (index.html).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamor.cli import add_exit_options, chosen_exit, command_parser, output_file, positive
from megamor.errors import ConfigError, user_errors


def show(figures: Mapping[str, Any]) -> None:
    """Print the correlations of each stage and the agreement."""
    for mode, of in figures["modes"].items():
        for name, stage in of["stages"].items():
            print(f"{mode}, {name}: mean depth {of_interval(stage['mean_depth'])}, loss {of['loss']:.4f} nats/token")
            for kind, rows in (("with", stage["correlations"]), *stage["classes"].items()):
                named = rows.items() if isinstance(rows, Mapping) else ((str(row["at"]), row) for row in rows)
                for label, row in named:
                    print(f"  {'Spearman ' if kind == 'with' else ''}{kind} {label}: {of_interval(row)}")
    for row in figures["agreement"]:
        print(f"agreement with {row['with']}: " + ", ".join(f"{key} {of_interval(row[key])}" for key in list(row)[1:]))
    for note in figures["notes"]:
        print(f"note: {note}")


def of_interval(row: Mapping[str, Any]) -> str:
    """`1.95 [1.81, 2.15]`."""
    return "undefined" if row["value"] is None else f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Analyse, print figures and passages, and write the files asked for."""
    parser = command_parser("analyze", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, `latest`, or the directory of a run or an export")
    add("--data", required=True, metavar="PREFIX", help="the data set: path of a .bin/.idx pair without suffix")
    add("--against", nargs="+", default=[], metavar="CHECKPOINT", help="models whose depths to compare, such as seeds")
    add("--frequencies", metavar="PREFIX", help="count tokens in this data set, such as the training data")
    add("--sequences", type=positive, default=256, help="windows, evenly spread over the data (default: %(default)s)")
    add("--batch-size", type=positive, default=16, help="windows per batch (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    add_exit_options(parser)
    add("--json", type=output_file, metavar="FILE", help="write the figures as JSON")
    add("--output", type=Path, metavar="DIR", help="write JSON, plots and an HTML page")
    arguments = parser.parse_args(argv)
    rule = chosen_exit(arguments)
    if output := arguments.output:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"can't write to --output {output}: {error.strerror}; give another directory") from error

    from megamor.analysis.analyze import analyze
    from megamor.load import load_model
    from megamor.progress import plain_console

    loaded, *against = (load_model(path, arguments.device) for path in (arguments.checkpoint, *arguments.against))
    for model in (loaded, *against):
        model.model.set_exit(rule)
    size = {"sequences": arguments.sequences, "batch_size": arguments.batch_size}
    found = analyze(loaded, arguments.data, against=against, frequencies=arguments.frequencies, **size)
    show(found.figures)
    for name, passage in found.passages.items():
        print(f"\n{name} spread of depths")
        passage.print(plain_console())
    text = json.dumps(found.figures, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")
    if output:
        from megamor.report.figures import save
        from megamor.report.router import router_page, router_plots

        (output / "analysis.json").write_text(text, encoding="utf-8")
        stages = found.figures["modes"]["causal"]["stages"]
        plots = {name: router_plots(stage) for name, stage in stages.items()}
        for name, own in plots.items():
            for plot, svg in own.items():
                save(svg, output / f"{name}_{plot.replace(' ', '_')}.svg")
        for name, passage in found.passages.items():
            passage.save_svg(output / f"passage_{name}.svg", f"{loaded.name}: {name} spread of depths")
        maps = {name: (output / f"passage_{name}.svg").read_text(encoding="utf-8") for name in found.passages}
        command = shlex.join(["megamor", "analyze", *(argv or sys.argv[2:])])
        router_page(found.figures, plots, maps, command).write(output / "index.html")
        print(f"page: {output / 'index.html'}")
