"""Keep the tables of the README equal to the measurements in benchmarks/results.

examples:
  python megamor/bench/tables.py --check     # exit status 1 if a table differs from the results
  python megamor/bench/tables.py --write     # rewrite the tables

A table stands between `<!-- generated: NAME -->` and `<!-- /generated -->`, each on a line of its own. NAME is one of:
  bench-train   training steps, from benchmarks/results/train_*.json (megamor bench train)
  bench-loader  the data loader, from benchmarks/results/loader_*.json (megamor bench loader)
  bench-preprocess
                text to token shards, from benchmarks/results/preprocess_*.json (megamor bench preprocess)
  bench-serve   policies of serving, from benchmarks/results/serve_offline_*.json (megamor.bench.serving --offline)
  quickstart    the quickstart's losses, from benchmarks/results/quickstart_*.json (runs/quickstart/report.json)
  reliability   promises and their tests, from benchmarks/results/reliability.json (make reliability)
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megamor.errors import DataError, user_errors

ROOT = Path(__file__).resolve().parents[2]
OPENING = re.compile(r"<!-- generated: (\S+) -->")
CLOSING = "<!-- /generated -->"
TRAIN_SCHEMA = "megamor-bench-train/1"
LOADER_SCHEMA = "megamor-bench-loader/1"
PREPROCESS_SCHEMA = "megamor-bench-preprocess/1"
SERVE_SCHEMA = "megamor-bench-serve-offline/1"
LOAD_SCHEMA = "megamor-bench-serve-load/1"
QUICKSTART_SCHEMA = "megamor-quickstart/1"
RELIABILITY_SCHEMA = "megamor-reliability/1"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="readme_numbers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="show differences; exit status 1 if there are any")
    action.add_argument("--write", action="store_true", help="rewrite the file")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    if not args.readme.is_file():
        raise DataError(f"{args.readme} does not exist; name the file with --readme")
    old = args.readme.read_text(encoding="utf-8")
    new = regenerate(old, args.results, str(args.readme))
    if args.write:
        if new != old:
            args.readme.write_text(new, encoding="utf-8")
        return
    difference = list(
        difflib.unified_diff(old.splitlines(), new.splitlines(), str(args.readme), "results", lineterm="")
    )
    if difference:
        print("\n".join([*difference, "the tables differ from the results: python megamor/bench/tables.py --write"]))
        raise SystemExit(1)


def regenerate(text: str, results: Path, name: str = "README.md") -> str:
    """`text` with the inside of every generated block replaced.

    Raises:
        DataError: a block without an end, an end without a beginning, a block of an unknown name, no block at all, or
            results that are missing or not in the expected form.
    """
    lines, block, found = [], "", False
    for number, line in enumerate(text.splitlines(), start=1):
        opening = OPENING.fullmatch(line.strip())
        closing = line.strip() == CLOSING
        if (opening and block) or (closing and not block):
            raise DataError(
                f"{name}:{number}: {line.strip()} where a block {'is open' if block else 'has no beginning'}"
            )
        if opening:
            block, found = opening[1], True
            if block not in RENDERERS:
                raise DataError(f"{name}:{number}: nothing generates {block!r}; there are {', '.join(RENDERERS)}")
            lines += [line, *RENDERERS[block](results)]
        if closing:
            block = ""
        if not block:
            lines.append(line)
    if block:
        raise DataError(f"{name}: the block {block!r} has no end; add a line {CLOSING}")
    if not found:
        raise DataError(f"{name} has no generated block; add the lines <!-- generated: bench-train --> and {CLOSING}")
    return "\n".join(lines) + "\n"


def train_tables(results: Path) -> Iterator[str]:
    """Markdown of all training results: per file and sequence length a caption and a table."""
    paths = sorted(results.glob("train_*.json"))
    if not paths:
        raise DataError(f"{results} holds no train_*.json; write one with megamor bench train --json")
    for path in paths:
        report = read_report(path, TRAIN_SCHEMA)
        try:
            for setting in report["settings"]:
                yield ""
                yield from train_table(report, setting)
        except KeyError as error:
            raise DataError(f"{path} has no field {error}; measure again with megamor bench train") from None
        yield ""
        yield f"`{report['command']}`"
    yield ""


def train_table(report: dict[str, Any], setting: dict[str, Any]) -> Iterator[str]:
    """Caption and table of one sequence length."""
    machine, model = report["machine"], report["config"]["model"]
    device = machine["accelerator"] or f"{machine['cpu']}, {machine['threads']} threads"
    revision = report["commit"]["revision"] + (" with changes" if report["commit"]["dirty"] else "")
    yield (
        f"Training step of {setting['batch_size']} × {setting['seq_len']} tokens, "
        f"{model['num_layers']} effective layers, width {model['dim']}, {setting['precision']}; {device}; "
        f"{setting['rounds']} rounds, {report['date'][:10]}, "
        f"torch {report['versions']['torch']}, revision {revision}."
    )
    yield ""
    yield "| model | parameters | step, ms (quartiles) | time / vanilla | FLOPs / vanilla | quotient | peak MB |"
    yield "|---|---|---|---|---|---|---|"
    for case in setting["cases"]:
        seconds = {name: f"{1e3 * value:.0f}" for name, value in case["step_seconds"].items()}
        memory = "n/a" if case["peak_memory_bytes"] is None else f"{case['peak_memory_bytes'] / 1e6:.0f}"
        yield (
            f"| {case['label']} | {case['parameters'] / 1e6:.2f}M "
            f"| {seconds['median']} ({seconds['q1']}–{seconds['q3']}) "
            f"| {case['time_ratio']['median']:.3f} | {case['flops_ratio']:.3f} | {case['time_over_flops']:.3f} "
            f"| {memory} |"
        )


def loader_tables(results: Path) -> Iterator[str]:
    """Markdown of the loader's speed, and of what many documents cost."""
    paths = sorted(results.glob("loader_*.json"))
    if not paths:
        raise DataError(f"{results} holds no loader_*.json; write one with megamor bench loader --json")
    for path in paths:
        report = read_report(path, LOADER_SCHEMA)
        documents, commit = report["documents"], report["commit"]
        yield ""
        yield "| batches of | M tokens/s | step, ms (quartiles) |"
        yield "|---|---|---|"
        for case in report["cases"]:
            seconds = {name: f"{1e3 * value:.2f}" for name, value in case["step_seconds"].items()}
            yield (
                f"| {case['batch_size']} × {case['seq_len']}, {case['label']} | {case['tokens_per_second'] / 1e6:,.1f} "
                f"| {seconds['median']} ({seconds['q1']}–{seconds['q3']}) |"
            )
        yield ""
        yield (
            f"{documents['documents']:,} documents: opened in {documents['open_stream_seconds']:.2f} s as a stream, in "
            f"{documents['open_best_fit_seconds']:.1f} s with best-fit packing ({documents['best_fit_padding']:.3%} "
            f"padding). One thread, no reading ahead; {report['machine']['cpu']}, load "
            f"{report['machine']['load_average']:.1f}, {report['date'][:10]}, revision {commit['revision']}"
            f"{' with changes' if commit['dirty'] else ''}."
        )
        yield ""
        yield f"`{report['command']}`"
    yield ""


def preprocess_tables(results: Path) -> Iterator[str]:
    """Markdown of how fast text becomes token shards, and of the memory that takes."""
    paths = sorted(results.glob("preprocess_*.json"))
    if not paths:
        raise DataError(f"{results} holds no preprocess_*.json; write one with megamor bench preprocess --json")
    for path in paths:
        report = read_report(path, PREPROCESS_SCHEMA)
        machine, versions, commit = report["machine"], report["versions"], report["commit"]
        yield ""
        yield "| text to tokens | MB/s | MB of text | seconds (quartiles) | processor seconds |"
        yield "|---|---|---|---|---|"
        for case in report["cases"]:
            seconds = {name: f"{value:.2f}" for name, value in case["seconds"].items()}
            yield (
                f"| {case['label']} | {case['bytes_per_second'] / 1e6:,.1f} | {case['text_bytes'] / 1e6:,.1f} "
                f"| {seconds['median']} ({seconds['q1']}–{seconds['q3']}) | {case['processor_seconds']['median']:.2f} |"
            )
        yield ""
        memory = ", ".join(
            f"{case['peak_bytes'] / 1e6:,.0f} MB on {case['text_bytes'] / 1e6:,.0f} MB of text ({case['label']}"
            f"{f', {n} workers' if (n := case['workers']) else ''})"
            for case in report["memory"]
        )
        yield (
            f"{report['workers']} threads, {report['tokenizer']}, {', '.join(report['input'])}. Peak memory: "
            f"{memory}. {machine['cpu']}, load "
            f"{machine['load_average']:.1f}, {report['date'][:10]}, tokenizers {versions['tokenizers']}, gigatoken "
            f"{versions['gigatoken']}, revision {commit['revision']}{' with changes' if commit['dirty'] else ''}."
        )
        yield ""
        yield f"`{report['command']}`"
    yield ""


def serve_tables(results: Path) -> Iterator[str]:
    """Markdown of serving: policies at equal residents and at equal bytes of keys and values, beside predictions."""
    paths = sorted(results.glob("serve_offline_*.json"))
    if not paths:
        raise DataError(
            f"{results} holds no serve_offline_*.json; write one with megamor.bench.serving --offline --json"
        )
    for path in paths:
        report = read_report(path, SERVE_SCHEMA)
        machine, commit, recursion = report["machine"], report["commit"], report["config"]["recursion"]
        threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
        device = machine["accelerator"] or f"{machine['cpu']}, {threads}"
        work, model = report["workload"], report["config"]["model"]
        lengths = "–".join(map(str, work["new_tokens"]))
        yield ""
        yield (
            f"{model['num_layers']} effective layers, {recursion['num_recursions']} recursions, width {model['dim']}, "
            f"{recursion['sharing']}, vocabulary {model['vocab_size']:,}, {recursion['kv_policy']}; "
            f"prompts of {work['prompt_tokens']} tokens, "
            f"{lengths} new ones; a boundary costs {report['costs']['boundary_over_core']:.2f} of a core launch. "
            f"{device}; {work['turns']} turns, {report['date'][:10]}, torch {report['versions']['torch']}, revision "
            f"{commit['revision']}{' with changes' if commit['dirty'] else ''}."
        )
        yield ""
        columns = ("", "residents", "mean depth", "rows a core launch", "tokens/s", "of predicted")
        yield f"| {' | '.join(columns)} | over full | over shrink | over vanilla |"
        yield "|---" * 9 + "|"
        for case in report["cases"]:
            over = [
                f"{case[name]:.2f}" if name in case else "" for name in ("over_full", "over_shrink", "over_vanilla")
            ]
            predicted = f"{case['of_prediction']:.0%}" if case["of_prediction"] else ""
            depth = [f"{case['mean_depth']:.2f}", f"{case['core_width']:.1f}"] if case["mean_depth"] else ["", ""]
            row = [case["case"], str(case["residents"]), *depth, f"{case['tokens_per_second']:.0f}", predicted, *over]
            yield f"| {' | '.join(row)} |"
        yield ""
        yield f"`{report['command']}`"
    yield ""


def load_table(results: Path) -> Iterator[str]:
    """Markdown of a server under load, a row for each result."""
    paths = sorted(results.glob("serve_load_*.json"))
    if not paths:
        raise DataError(f"{results} holds no serve_load_*.json; write one with megamor.bench.serving --url --json")
    yield ""
    yield "| model, machine | requests, at a time | tokens each | requests/s | tokens/s | TTFT, ms | ITL, ms | failed |"
    yield "|---|---|---|---|---|---|---|---|"
    reports = [read_report(path, LOAD_SCHEMA) for path in paths]
    for report in reports:
        load, result, machine = report["load"], report["result"], report["machine"]
        ttft, itl = (f"{result[n]['p50']:.0f} (p99 {result[n]['p99']:.0f})" for n in ("ttft_ms", "itl_ms"))
        yield (
            f"| {report['served_model']}, {machine['cores']} cores of {machine['cpu']} "
            f"| {load['num_requests']:,}, {load['max_concurrency'] or 'all'} "
            f"| {load['input_tokens']} + {load['output_tokens']} | {result['requests_per_second']:.0f} "
            f"| {result['output_tokens_per_second']:,.0f} | {ttft} | {itl} | {result['failed']} |"
        )
    for report in reports:
        commit = report["commit"]
        yield ""
        yield (
            f"`{report['command']}` on the same machine; {report['date'][:10]}, torch {report['versions']['torch']}, "
            f"revision {commit['revision']}{' with changes' if commit['dirty'] else ''}."
        )
    yield ""


def read_report(path: Path, schema: str) -> dict[str, Any]:
    """A result file of the given schema."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as JSON: {error}") from error
    found = report.get("schema") if isinstance(report, dict) else None
    if found != schema:
        raise DataError(f"{path}: schema is {found!r}, expected {schema!r}; measure again with megamor bench")
    return report


def quickstart_table(results: Path) -> Iterator[str]:
    """Markdown of the quickstart's comparison and how long it took."""
    paths = sorted(results.glob("quickstart_*.json"))
    if not paths:
        raise DataError(f"{results} holds no quickstart_*.json; copy runs/quickstart/report.json there")
    for path in paths:
        report = read_report(path, QUICKSTART_SCHEMA)
        network, floors, minutes = report["network"], report["floors"], sum(report["seconds"].values()) / 60
        yield ""
        yield "| model | validation loss, nats/token |"
        yield "|---|---|"
        for order, loss in floors.items():
            yield f"| {order} (interpolated Kneser-Ney) | {loss:.4f} |"
        yield f"| network, top-k routing (looks ahead) | {network['loss_topk']:.4f} |"
        yield f"| **network, causal routing** | **{network['loss_causal']:.4f}** |"
        yield ""
        yield (
            f"({report['tokens_seen']:,} tokens, {minutes:.1f} minutes on {report['machine']['cores']} cores of "
            f"{report['machine']['cpu']}; {report['date'][:10]}, torch {report['versions']['torch']}, "
            f"revision {report['commit']['revision']})"
        )
    yield ""


def reliability_table(results: Path) -> Iterator[str]:
    """Markdown of the promises: the tests of each, on which backends, and what came of them; the oldest last run."""
    report = read_report(results / "reliability.json", RELIABILITY_SCHEMA)
    yield ""
    yield "| | Promise | Tests | Backends | Passed | Last run |"
    yield "|---|---|---|---|---|---|"
    for promise, title in report["promises"].items():
        outcomes = [
            (node.partition("::")[2], test, entry)
            for node, test in report["tests"].items()
            for entry in test["promises"]
            if entry["promise"] == promise
        ]
        names = ", ".join(dict.fromkeys(f"`{name}`" for name, _, _ in outcomes)) or "none yet"
        backends = ", ".join(sorted({entry["backend"] for _, _, entry in outcomes} - {""}))
        passed = sum(entry.get("passed", 0) for _, _, entry in outcomes)
        run = passed + sum(entry.get("failed", 0) for _, _, entry in outcomes)
        skipped = sum(entry.get("skipped", 0) for _, _, entry in outcomes)
        result = f"{passed}/{run}" + (f", {skipped} skipped" if skipped else "") if outcomes else ""
        dates = sorted({f"{test['date'][:10]}, {test['revision'][:7]}" for _, test, _ in outcomes})
        yield f"| {promise} | {title} | {names} | {backends} | {result} | {dates[0] if dates else ''} |"
    yield ""


RENDERERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "bench-train": train_tables,
    "bench-loader": loader_tables,
    "bench-preprocess": preprocess_tables,
    "bench-serve": serve_tables,
    "bench-serve-load": load_table,
    "quickstart": quickstart_table,
    "reliability": reliability_table,
}


if __name__ == "__main__":
    main()
