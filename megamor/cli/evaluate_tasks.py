"""The part of `megamor evaluate` that measures downstream tasks."""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamor import __version__
from megamor.cli import positive, words
from megamor.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from megamor.evaluate.tasks import TaskSet
    from megamor.load import LoadedModel

BOOTSTRAP_SAMPLES = 1000
"""For standard errors of metrics that aren't means; the harness's 100,000 would take longer than the tasks."""


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options of downstream tasks."""
    add = parser.add_argument
    names = "downstream tasks: names, groups and tags of lm-evaluation-harness (`glue`, `mmlu`, `wikitext` …), YAML "
    names += "files, or the sets `paper`, `superglue` and `ptb`"
    add("--tasks", type=words, default=[], metavar="TASK,TASK", help=names)
    add("--task-path", type=Path, metavar="DIR", help="where YAML files of further tasks are")
    add("--num-fewshot", type=int, metavar="N", help="examples in front of each question (default: what the task says)")
    add("--limit", type=positive, metavar="N", help="documents of each task to use, the first ones (default: all)")
    text = "routing in tasks: the inference rule, or that of training, which sees later tokens (default: %(default)s)"
    add("--routing", choices=("causal", "topk"), default="causal", help=text)


def read_tasks(arguments: argparse.Namespace) -> TaskSet:
    """Load what `--tasks` names; see `load_tasks` for errors."""
    from megamor.evaluate.tasks import load_tasks

    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise ConfigError(f"--num-fewshot {arguments.num_fewshot} is negative: give 0 or more")
    options = {"num_fewshot": arguments.num_fewshot, "limit": arguments.limit}
    return load_tasks(arguments.tasks, directory=arguments.task_path, **options)


def measure_tasks(
    arguments: argparse.Namespace, loaded: LoadedModel, tasks: TaskSet, progress: Progress, is_main: bool
) -> dict[str, Any]:
    """Evaluate `tasks` and print the harness's table on the first rank; returns what the JSON file says. Collective."""
    from megamor.evaluate.scoring import Scorer
    from megamor.evaluate.tasks import paper_average, run_tasks, tables

    bars: dict[str, TaskID] = {}

    def watch(what: str, total: int, done: int) -> None:
        bars[what] = bars[what] if what in bars else progress.add_task(what, total=total)
        progress.update(bars[what], completed=done)

    scorer = Scorer.of(loaded, batch_size=arguments.batch_size, mode=arguments.routing, watch=watch)
    found = run_tasks(scorer, loaded.codec(), tasks, BOOTSTRAP_SAMPLES if is_main else 0)
    paper = paper_average(found["results"])
    if is_main:
        print(f"tasks of {loaded.origin}\n{tables(found)}")
        if paper:
            print("the paper's tasks:", ", ".join(f"{name} {100 * value:.1f} %" for name, value in paper.items()))
    settings = {"limit": arguments.limit, "routing": arguments.routing, "lm_eval": metadata.version("lm_eval")}
    return {**found, **({"paper": paper} if paper else {}), **settings, "megamor": __version__}
