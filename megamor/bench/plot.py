"""Draw what routing saves: executed FLOPs and time of a training step, relative to the vanilla model.

python -m megamor.bench.plot benchmarks/results/train_epyc2_wide.json docs/assets/training_step.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamor.bench import train
from megamor.bench.report import Row, provenance, read_report
from megamor.errors import user_errors

FLOPS_COLOUR, TIME_COLOUR = "#a9cfe0", "#225ea8"
CASES = ("vanilla", "recursive", "mor_expert", "mor_expert_share", "mor_threshold", "mor_token")


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the first setting of a report of `megamor bench train`."""
    parser = argparse.ArgumentParser(prog="python -m megamor.bench.plot", description=__doc__)
    parser.add_argument("report", type=Path, help="written by `megamor bench train --json`")
    parser.add_argument("picture", type=Path, help="SVG, PNG or PDF file to write")
    arguments = parser.parse_args(argv)
    draw(read_report(arguments.report, train.SCHEMA, train.OLD_SCHEMA), arguments.picture)


def draw(report: Row, picture: Path) -> None:
    """A pair of bars for each model, with the quartiles of the time over all rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    setting = report["settings"][0]
    cases = [case for name in CASES for case in setting["cases"] if case["name"] == name]
    # Text stays text, so that a browser uses its own fonts and the file doesn't depend on ours.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "megamor", "font.family": "sans-serif", "font.size": 10}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7.4, 0.5 * len(cases) + 1.4), layout="constrained")
        for index, case in enumerate(cases):
            time = case["time_ratio"]
            spread = [[time["median"] - time["q1"]], [time["q3"] - time["median"]]]
            axes.barh(index - 0.19, case["flops_ratio"], 0.36, color=FLOPS_COLOUR)
            axes.barh(index + 0.19, time["median"], 0.36, color=TIME_COLOUR, xerr=spread, ecolor="#888888")
            axes.text(1.07, index - 0.19, f"{case['flops_ratio']:.2f}", va="center", color="#4a7f96")
            axes.text(1.07, index + 0.19, f"{time['median']:.2f}", va="center", color=TIME_COLOUR)
        axes.set_yticks(range(len(cases)), [case["label"] for case in cases])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.17)
        axes.set_xlabel("relative to vanilla")
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(1, color="#888888", linewidth=0.8, linestyle=":")
        handles = [Patch(color=colour) for colour in (FLOPS_COLOUR, TIME_COLOUR)]
        figure.legend(handles, ["FLOPs executed", "time of a training step"], loc="outside upper right", ncols=2)
        figure.supxlabel(
            f"width {report['config']['model']['dim']}, {setting['batch_size']} × {setting['seq_len']} tokens, "
            f"{setting['precision']}; {provenance(report, 'torch')}",
            fontsize=8,
            color="#666666",
        )
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
