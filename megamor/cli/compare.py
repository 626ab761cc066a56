"""Compare runs in a table, and say by what they are matched and which differences are resolved.

examples:
  megamor compare runs/mor runs/vanilla
  megamor compare runs/mor_seed* runs/vanilla_seed* --match executed_flops
  megamor compare runs/studies/routing --metric bits_per_byte

Runs are an arm's seeds if they are named <arm>_seed<k>, or if their settings are equal but for run.seed. Differences
are paired by seed, with 95 % intervals; one seed allows none. With --match, runs that aren't matched are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser
from megamor.errors import ConfigError, user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and what it allows to say."""
    parser = command_parser("compare", __doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|STUDY", help="a study, runs or directories of runs")
    choices, text = ("tokens", "executed_flops", "parameters"), "refuse runs that differ by more than 2 %% in this"
    parser.add_argument("--match", choices=choices, help=text)
    parser.add_argument("--metric", help="what is compared (default: loss); tasks/<name>, too")
    arguments = parser.parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from megamor.report.content import compact_table, matching, statements
    from megamor.report.runs import read_results

    results = read_results(arguments.paths)
    if arguments.match and (reasons := matching(results, arguments.match)[1]):
        raise ConfigError(f"the runs are not matched by --match {arguments.match}: {reasons[0]}")
    metric = arguments.metric or results.metrics()[0]
    headers, rows = compact_table(results, metric)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    for line in statements(results, metric):
        console.print(line)
