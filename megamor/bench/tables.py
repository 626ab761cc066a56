"""Keep the tables of README.md and docs/ equal to the measurements in benchmarks/results.

examples:
  python -m megamor.bench.tables --check     # exit status 1 if a table differs from the results
  python -m megamor.bench.tables --write     # rewrite the tables

A table lies between `<!-- generated: NAME -->` and `<!-- /generated -->`, each on a line of its own. docs/benchmarks.md
lists the names. Without PAGE, all pages that have tables are meant.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megamor.bench import gpu, load, loader, preprocess, save, scaling, serve, serving, train
from megamor.bench.report import Column, Row, Table, number, provenance, read_report, text
from megamor.errors import DataError, user_errors
from megamor.study.collect import SCHEMA, table_rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("benchmarks", "findings", "finetuning", "gpu", "interop", "reliability", "scaling")
    ),
]
MARK = re.compile(r"^<!-- (?:generated: (\S+)|/generated) -->$", re.MULTILINE)
BLOCK = re.compile(r"^<!-- generated: (\S+) -->\n(?:(?!<!-- (?:/|generated: )).*\n)*<!-- /generated -->$", re.MULTILINE)
QUICKSTART_SCHEMA = "megamor-quickstart/1"
FINETUNING_SCHEMA = "megamor-finetuning/1"
STUDIES = [path.stem for path in sorted((RESULTS / "studies").glob("*.json"))]
STUDY_COLUMNS = {
    "arm": "arm", "loss": "loss, nats/token", "accuracy": "accuracy", "depth": "depth",
    "FLOPs/token": "forward FLOPs/token", "tokens": "tokens", "lr": "learning rate",
}  # fmt: skip
RELIABILITY_SCHEMA = "megamor-reliability/1"
IMPORTS_SCHEMA = "megamor-imports/1"


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Check or rewrite the tables of the pages.

    Raises:
        SystemExit: status 1 if a checked page differs, 2 if a page or a result can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megamor.bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="show differences; exit status 1 if there are any")
    action.add_argument("--write", action="store_true", help="rewrite the pages")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="default: README.md and those in docs/")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(argv)
    different = False
    for page in args.pages or PAGES:
        if not page.is_file():
            raise DataError(f"{page} does not exist; name a page of Markdown")
        old = page.read_text(encoding="utf-8")
        new = regenerate(old, args.results, str(page))
        if args.write and new != old:
            page.write_text(new, encoding="utf-8")
        if args.check:
            for line in difflib.unified_diff(old.splitlines(), new.splitlines(), str(page), "results", lineterm=""):
                print(line)
                different = True
    if different:
        print("the tables differ from the results: python -m megamor.bench.tables --write")
        raise SystemExit(1)


def regenerate(page: str, results: Path, name: str = "README.md") -> str:
    """`page` with the inside of every generated block replaced.

    Raises:
        DataError: half a block, a block of an unknown name, no block at all, or results that are missing or malformed.
    """

    def fresh(block: re.Match[str]) -> str:
        if block[1] not in BLOCKS:
            raise DataError(f"{name}: nothing generates {block[1]!r}; choose from {', '.join(BLOCKS)}")
        return "\n".join([f"<!-- generated: {block[1]} -->", *BLOCKS[block[1]](results), "", "<!-- /generated -->"])

    new, count = BLOCK.subn(fresh, page)
    # Whole blocks are emptied but keep their lines, so that a mark that is left is found under its number.
    rest = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), page)
    if alone := MARK.search(rest):
        line, missing = rest.count("\n", 0, alone.start()) + 1, "end" if alone[1] else "beginning"
        raise DataError(f"{name}:{line}: {alone[0]} has no {missing}; add it")
    if not count:
        raise DataError(f"{name}: no generated block; add the lines <!-- generated: NAME --> and <!-- /generated -->")
    return new


def measured(pattern: str, bench: ModuleType, results: Path) -> Iterator[str]:
    """Markdown of every result file that matches: its tables and the command that made it."""
    paths = sorted(results.glob(pattern))
    if not paths:
        raise DataError(f"{results} holds no {pattern}; write one with megamor bench … --json")
    for path in paths:
        report = read_report(path, bench.SCHEMA)
        try:
            for table in bench.tables(report):
                yield from table.markdown()
        except KeyError as error:
            raise DataError(f"{path} has no field {error}; measure again with megamor bench") from None
        yield from ("", f"`{report['command']}`")


def gpus(results: Path) -> Iterator[str]:
    """Markdown of what GPUs were measured to do."""
    if not any(results.glob("gpu_*.json")):
        yield from ("", "None yet: `benchmarks/results` has no `gpu_*.json`.")
        return
    yield from measured("gpu_*.json", gpu, results)


def computed(make: Callable[[str], Table], recipe: str, _: Path) -> Iterator[str]:
    """Markdown of a table that is computed from a recipe."""
    return make(recipe).markdown()


def quickstart(results: Path) -> Iterator[str]:
    """Markdown of the quickstart's comparison and how long it took."""
    for path in sorted(results.glob("quickstart_*.json")):
        report = read_report(path, QUICKSTART_SCHEMA)
        network, machine, minutes = report["network"], report["machine"], sum(report["seconds"].values()) / 60
        rows = [(f"{order} (interpolated Kneser-Ney)", f"{loss:.4f}") for order, loss in report["floors"].items()]
        rows.append(("network, top-k routing (looks ahead)", f"{network['loss_topk']:.4f}"))
        rows.append(("**network, causal routing**", f"**{network['loss_causal']:.4f}**"))
        columns = Column("model", text("model"), left=True), Column("validation loss, nats/token", text("loss"))
        note = (
            f"({report['tokens_seen']:,} tokens, {minutes:.1f} minutes on {machine['cores']} cores of "
            f"{machine['cpu']}; {provenance(report, 'torch')})"
        )
        yield from Table(columns, [{"model": model, "loss": loss} for model, loss in rows], notes=(note,)).markdown()


def study(name: str, results: Path) -> Iterator[str]:
    """Markdown of a study: its arms at each budget, its floors, what its intervals allow to say, and where it ran."""
    report = read_report(results / "studies" / f"{name}.json", SCHEMA)
    columns = [Column(header, text(key), left=key == "arm") for key, header in STUDY_COLUMNS.items()]
    yield from Table(columns, [*table_rows(report)]).markdown()
    yield from ("", *(f"- {sentence}" for sentence in report["statements"]), "")
    minutes, machine = report["seconds"] / 60, report["origin"]["machine"]
    where = f"one of {machine['cores']} cores of {machine['cpu']}; {provenance(report['origin'], 'torch')}"
    yield f"`{report['command']}` ({minutes:.0f} minutes of training, without the tuning of rates, on {where})"


def reliability(results: Path) -> Iterator[str]:
    """Markdown of the promises: the tests of each, on which backends, with which outcome; the oldest last run."""
    report = read_report(results / "reliability.json", RELIABILITY_SCHEMA)
    headers = ("", "promise", "tests", "backends", "passed", "last run")
    columns = [Column(header, text(header), left=True) for header in headers]
    yield from Table(columns, [promise_row(report, promise) for promise in report["promises"]]).markdown()


def promise_row(report: Row, promise: str) -> dict[str, Any]:
    """The row of one promise."""
    outcomes = [
        (node.partition("::")[2], test, entry)
        for node, test in report["tests"].items()
        for entry in test["promises"]
        if entry["promise"] == promise
    ]
    count = {name: sum(entry.get(name, 0) for *_, entry in outcomes) for name in ("passed", "failed", "skipped")}
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    dates = sorted({f"{test['date'][:10]}, {test['revision'][:7]}" for _, test, _ in outcomes})
    return {
        "": promise,
        "promise": report["promises"][promise],
        "tests": ", ".join(dict.fromkeys(f"`{name}`" for name, *_ in outcomes)) or "none yet",
        "backends": ", ".join(sorted({entry["backend"] for *_, entry in outcomes} - {""})),
        "passed": f"{count['passed']}/{count['passed'] + count['failed']}{skipped}" if outcomes else "",
        "last run": dates[0] if dates else "",
    }


def imports(results: Path) -> Iterator[str]:
    """Markdown of the errors of imports: how far logits are from those of transformers."""
    report = read_report(results / "imports.json", IMPORTS_SCHEMA)
    columns = (
        Column("model", text("model"), left=True),
        Column("parameters", number("parameters", ",")),
        Column("largest logit", number("scale", ".1f")),
        Column("largest difference", number("difference", ".1e")),
    )
    note = f"`{report['command']}` ({report['machine']['cpu']}; {provenance(report, 'torch', 'transformers')})"
    yield from Table(columns, report["rows"], notes=(note,)).markdown()


def finetuning(results: Path) -> Iterator[str]:
    """Markdown of a task's accuracy before and after fine-tuning on its training split, with intervals of 95 %."""
    report = read_report(results / "finetune_sst2.json", FINETUNING_SCHEMA)
    columns = (
        Column("model", text("model"), left=True),
        Column("accuracy", text("accuracy")),
        Column("95 %", text("range")),
    )
    rows = [{"model": r["model"], "accuracy": f"{r['accuracy']:.1%}", "range": f"{r['low']:.1%} to {r['high']:.1%}"}
            for r in report["rows"]]  # fmt: skip
    note = (
        f"(first {report['rows'][0]['sentences']} sentences of the development split; {report['cpu_seconds']} seconds "
        f"of one core of {report['machine']['cpu']}; {report['note']}; {provenance(report, 'torch', 'lm_eval')})"
    )
    yield from Table(columns, rows, notes=(note,)).markdown()


BLOCKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "bench-train": partial(measured, "train_*.json", train),
    "bench-policies": partial(measured, "checkpointing_*.json", train),
    "bench-gpu": gpus,
    "bench-padding": partial(measured, "padding_*.json", train),
    "bench-loader": partial(measured, "loader_*.json", loader),
    "bench-preprocess": partial(measured, "preprocess_*.json", preprocess),
    "bench-save": partial(measured, "save_*.json", save),
    "bench-serve": partial(measured, "serve_offline_*.json", serve),
    "bench-load": partial(measured, "serve_load_*.json", load),
    "bench-serving": partial(measured, "serving_*.json", serving),
    "quickstart": quickstart,
    **{f"study-{name}": partial(study, name) for name in STUDIES},
    "reliability": reliability,
    "imports": imports,
    "finetuning": finetuning,
    "scaling-mor_1b": partial(computed, scaling.strong_scaling, "mor_1b"),
    "scaling-vanilla_1b": partial(computed, scaling.strong_scaling, "vanilla_1b"),
    "backends": partial(computed, scaling.backends, "mor_1b"),
    "policies": partial(computed, scaling.policies, "mor_1b"),
    "mfu": partial(computed, scaling.expected_mfu, "mor3_expert"),
    "mfu-operations": partial(computed, scaling.milliseconds, "mor3_expert"),
}


if __name__ == "__main__":
    main()
