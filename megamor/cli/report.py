"""Write one HTML page about a study or runs: losses, tables, differences with intervals, depths, settings.

examples:
  megamor report runs/studies/routing                        # writes runs/studies/routing/report.html
  megamor report runs/a_seed0 runs/a_seed1 runs/b_seed0 runs/b_seed1 --output ab.html
  megamor report runs/a sweep.json analysis/analysis.json    # with files of megamor sweep-depth and megamor analyze

The page has no scripts and needs no network. Runs may still be going on. Runs are an arm's seeds if they are named
<arm>_seed<k>, or if their settings are equal but for run.seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser
from megamor.errors import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = command_parser("report", __doc__)
    text = "a study, runs or directories of runs, and files of sweeps and analyses"
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|STUDY|FILE.json", help=text)
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="default: report.html in the first directory")
    parser.add_argument("--metric", help="what is ranked and compared (default: loss); tasks/<name>, too")
    arguments = parser.parse_args(argv)
    from megamor.files import read_json
    from megamor.report.build import build_page
    from megamor.report.runs import read_results
    from megamor.study.collect import SCHEMA

    known = {path: read_json(path) for path in arguments.paths if path.suffix == ".json"}
    extras = {path: read for path, read in known.items() if read.get("schema") != SCHEMA}
    results = read_results([path for path in arguments.paths if path not in extras])
    page = build_page(results, arguments.metric, list(extras.values()))
    first = arguments.paths[0]
    output = arguments.output or (first if first.is_dir() else first.parent) / "report.html"
    page.write(output)
    print(f"wrote {output}")
