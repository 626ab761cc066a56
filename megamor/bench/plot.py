"""Draw what routing saves: executed FLOPs and time of a training step, relative to the vanilla model.

python -m megamor.bench.plot benchmarks/results/train_epyc2_wide.json docs/assets/training_step.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megamor.bench import train
from megamor.bench.report import Row, provenance, read_report
from megamor.errors import user_errors
from megamor.report.figures import canvas, colour, save

CASES = ("vanilla", "recursive", "mor_expert", "mor_expert_share", "mor_threshold", "mor_token")


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the first setting of a report of `megamor bench train`."""
    parser = argparse.ArgumentParser(prog="python -m megamor.bench.plot", description=__doc__)
    parser.add_argument("report", type=Path, help="written by `megamor bench train --json`")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    arguments = parser.parse_args(argv)
    draw(read_report(arguments.report, train.SCHEMA), arguments.picture)


def draw(report: Row, picture: Path) -> None:
    """A pair of bars for each model, with the quartiles of the time over all rounds."""
    setting = report["settings"][0]
    cases = [case for name in CASES for case in setting["cases"] if case["name"] == name]
    conditions = f"width {report['config']['model']['dim']}, {setting['batch_size']} × {setting['seq_len']} tokens, "
    conditions += f"{setting['precision']}\n{provenance(report, 'torch')}"
    with canvas("", f"relative to vanilla\n{conditions}", size=(5.4, 0.5 * len(cases) + 1.3)) as drawn:
        places, bars = range(len(cases)), drawn.axes.barh
        times = [case["time_ratio"] for case in cases]
        spread = [[t["median"] - t["q1"] for t in times], [t["q3"] - t["median"] for t in times]]
        flops = [case["flops_ratio"] for case in cases]
        shown = bars([i - 0.2 for i in places], flops, 0.34, color=colour(6), label="FLOPs executed")
        drawn.axes.bar_label(shown, fmt="%.2f", padding=6)
        medians, ink = [t["median"] for t in times], {"xerr": spread, "ecolor": "#66727f"}
        label = "time of a training step"
        shown = bars([i + 0.2 for i in places], medians, 0.34, color=colour(0), label=label, **ink)
        drawn.axes.bar_label(shown, fmt="%.2f", padding=6)
        drawn.axes.set_yticks(places, [case["label"] for case in cases])
        drawn.axes.set_ylim(len(cases) - 0.5, -0.5)
        drawn.axes.set_xlim(0, 1.2)
        drawn.axes.grid(visible=False, axis="y")
    save(drawn.svg, picture)


if __name__ == "__main__":
    main()
