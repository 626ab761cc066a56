"""Compare models: train every arm of a study with tuned learning rates and paired seeds, and report with intervals.

examples:
  megamor study run studies/routing.yaml                       # results in runs/studies/routing
  megamor study run mine.yaml --seeds 5 --jobs 2               # two runs at a time
  megamor study run studies/paper_360m.yaml --dry-run          # arms, parameters, runs and FLOPs; trains nothing
  megamor study run studies/paper_360m.yaml --slurm --sbatch '--gpus-per-node=8 --time=24:00:00'
  megamor study report studies/routing.yaml                    # results and page again, from finished runs

A fair comparison of three models on a text of your own is four lines (docs/studies.md):
  base: quickstart
  data: {text: [my_book.txt]}
  arms: [vanilla, recursive, mor]
  budget: {flops: 1e13}

Ctrl-C saves all runs; rerun the same command to resume.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamor.cli import command_parser, positive
from megamor.errors import EXIT_INTERRUPTED, ConfigError, MegamorError, user_errors

if TYPE_CHECKING:
    from megamor.study import Study


def show_plan(study: Study) -> None:
    """Print the arms, what they are matched by, and what the study costs."""
    from rich.table import Table

    from megamor.model.flops import nominal_flops
    from megamor.progress import plain_console
    from megamor.study.jobs import expected_flops, jobs_of

    table = Table()
    for column in ("arm", "parameters", "no embedding", "FLOPs/token", "learning rates"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in study.arms:
        with_embedding, without = arm.parameters
        flops = nominal_flops(arm.config).training / arm.config.data.seq_len
        rates = "those of " + arm.of if arm.of else ", ".join(f"{rate:g}" for rate in arm.rates)
        table.add_row(arm.name, f"{with_embedding:,}", f"{without:,}", f"{flops:.3g}", rates)
    plain_console().print(table)
    jobs = jobs_of(study)
    total = sum(expected_flops(study, job) for job in jobs)
    budgets = ", ".join(f"{budget:.3g}" for budget in study.budgets) if study.budgets != (0,) else "each arm's own"
    print(f"matched by {study.match}, budget {budgets}; {study.seeds} seeds; {len(jobs)} jobs, about {total:.2e} FLOPs")


def show_results(results: dict[str, Any]) -> None:
    """Print means over the seeds, and the statements."""
    from rich.table import Table

    from megamor.progress import plain_console
    from megamor.study.collect import table_rows

    table = Table(title=results["name"])
    columns = ("arm", "loss", "accuracy", "depth", "FLOPs/token", "tokens", "FLOPs", "lr")
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in table_rows(results):
        table.add_row(*(row.get(column, "") for column in columns))
    plain_console().print(table)
    for statement in results["statements"]:
        print(f"- {statement}")


def run(study: Study, root: Path, at_once: int, threads: int | None) -> None:
    """Run everything that isn't finished. Raises SystemExit (75) if a signal ended it."""
    from megamor.study.run import StudyRunner, set_up

    set_up(study, root)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runner = StudyRunner(study, root, at_once, threads or max(1, cores // at_once))
    if not runner.run():
        print("stopped on request: rerun the same command to resume")
        raise SystemExit(EXIT_INTERRUPTED)


def finish(study: Study, root: Path) -> None:
    """Write and print the results."""
    from megamor.report.build import build_page
    from megamor.report.runs import read_results
    from megamor.study.collect import collect

    show_results(collect(study, root))
    build_page(read_results([root])).write(root / "report.html")
    print(f"results: {root / 'results.json'}, page: {root / 'report.html'}")


def run_single_job(study: Study, root: Path, name: str) -> None:
    """Do one job in the processes of this launch. Raises SystemExit (75) if a signal ended it."""
    from difflib import get_close_matches

    from megamor.parallel import joined_world
    from megamor.study.jobs import Interrupted, jobs_of, run_job

    jobs = {job.name: job for job in jobs_of(study)}
    if name not in jobs:
        near = get_close_matches(name, jobs, n=3)
        raise ConfigError(f"{study.file} has no job {name!r}; near ones: {', '.join(near) or ', '.join(jobs)}")
    config = jobs[name].arm.config
    with joined_world(config.parallel, config.run.device) as world:
        try:
            run_job(study, jobs[name], root, world)
        except Interrupted:
            raise SystemExit(EXIT_INTERRUPTED) from None


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run, plan or report a study."""
    parser = command_parser("study", __doc__)
    parser.add_argument("action", choices=("run", "report", "job"), help="`job` does one job, under any launcher")
    parser.add_argument("file", type=Path, help="the study, a YAML file")
    parser.add_argument("job", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="results go to OUT/NAME (%(default)s)")
    parser.add_argument("--seeds", type=positive, metavar="N", help="runs of each arm (default: the file's, or 3)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time; on GPUs, one each (1)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of each run (default: cores / jobs)")
    parser.add_argument("--dry-run", action="store_true", help="show arms, runs and cost, and stop")
    parser.add_argument("--slurm", action="store_true", help="submit arrays of jobs instead of running here")
    parser.add_argument("--sbatch", default="", metavar="OPTIONS", help="with --slurm: further options of sbatch")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.action == "job") != (arguments.job is not None):
        parser.error("give the name of a job to `megamor study job FILE NAME`, and to nothing else")
    from megamor.study import load_study

    study = load_study(arguments.file, seeds=arguments.seeds)
    root = arguments.out / study.name
    if arguments.action == "job":
        run_single_job(study, root, arguments.job)
        return
    if arguments.action == "run":
        show_plan(study)
        if arguments.dry_run:
            from megamor.study.run import check_data

            try:
                check_data(study)
            except MegamorError as error:
                print(f"missing: {error}")
            return
        if arguments.slurm:
            from megamor.study.run import set_up
            from megamor.study.slurm import submit

            set_up(study, root)
            print(submit(study, root, arguments.sbatch))
            return
        run(study, root, arguments.jobs, arguments.threads)
    finish(study, root)
