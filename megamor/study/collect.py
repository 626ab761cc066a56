"""The result file of a study: its runs, floors, differences with intervals, and what they allow to say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from megamor.config import config_from_dict
from megamor.config.paths import expand_path
from megamor.data.loader import open_validation_sets
from megamor.data.shard import TokenShard
from megamor.errors import ConfigError, TrainingError
from megamor.evaluate.floors import seen_windows, validation_windows
from megamor.evaluate.ngram import NGramModel, count_table_accuracy
from megamor.files import parse_json, replace_file
from megamor.origin import describe_origin
from megamor.study.jobs import SETUP_FILE, Job, check_version, jobs_of, read_result
from megamor.study.laws import PHI_BOUNDS, fit_families
from megamor.study.spec import Study
from megamor.study.statistics import paired_difference, sentence

SCHEMA = "megamor-study/1"
RESULTS_FILE = "results.json"
TOLERANCE = 0.02
"""Largest relative difference in tokens or executed FLOPs between runs that count as matched."""
ORDERS = {1: "unigram", 2: "bigram", 3: "trigram"}


def collect(study: Study, root: Path) -> dict[str, Any]:
    """Put the results of all jobs together and write `results.json`.

    Raises:
        TrainingError: a job isn't finished, or the runs of a budget used different amounts of it.
        ConfigError: the study has changed since its jobs ran.
    """
    if (root / SETUP_FILE).exists():
        check_version(study, root)
    jobs = jobs_of(study)
    found = {job.name: read_result(root, job.name) for job in jobs}
    if missing := [name for name, result in found.items() if result is None]:
        raise TrainingError(
            f"{len(missing)} of {len(jobs)} jobs aren't finished ({', '.join(missing[:5])}): run the study"
        )
    runs = [{k: v for k, v in found[job.name].items() if k != "config"} for job in jobs if not job.is_tuning]  # type: ignore[union-attr]
    check_matched(study, runs)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "name": study.name,
        "question": study.question,
        "match": study.match,
        "budgets": study.budgets,
        "command": shlex.join(["megamor", "study", "run", str(study.file), "--seeds", str(study.seeds)]),
        "origin": describe_origin(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "seconds": sum(run["seconds"] for run in runs if study.arm(run["arm"]).of is None),
        "arms": [*_arms(study, jobs, found)],
        "runs": runs,
        "floors": floors(study, runs, found),
        "expected": study.expected,
        "differences": [*_differences(study, runs)],
    }
    results["law"] = fit_families(study.law, results) if study.law else None
    results["statements"] = [*statements(study, results)]
    replace_file(root / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return results


def check_matched(study: Study, runs: list[dict[str, Any]]) -> None:
    """Raises TrainingError if runs of one budget used different amounts of it. With `match: none` they may."""
    key = "executed_flops" if study.match == "executed_flops" else "tokens"
    for budget in study.budgets if study.match != "none" else ():
        used = sorted((run[key], run["directory"]) for run in runs if run["budget"] == budget)
        (low, least), (high, most) = used[0], used[-1]
        if high > low * (1 + TOLERANCE):
            raise TrainingError(
                f"not matched: {least} used {low:.4g} {key} and {most} {high:.4g}; a step is too large a part of the "
                "budget: raise the budget or lower train.global_batch_size"
            )


def _arms(study: Study, jobs: list[Job], found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for arm in study.arms:
        with_embedding, without = arm.parameters
        trained = study.trained(arm).name
        tuning = found.get(f"tune_{trained}") or {"lr": arm.rates[0], "tuning": [], "lr_at_edge": False}
        config = next(found[job.name]["config"] for job in jobs if job.arm is arm and not job.is_tuning)
        yield {
            "name": arm.name,
            "label": arm.label,
            "parameters": with_embedding,
            "parameters_without_embedding": without,
            "config": portable(config),
            "of": arm.of,
            "exit": None if arm.exit is None else {arm.exit.name: arm.exit.threshold},
            **tuning,
        }


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an arm without what is this machine's or one run's: names, and where files are."""
    data = {name: value for name, value in config["data"].items() if name not in ("train", "validation", "tokenizer")}
    return {**{name: section for name, section in config.items() if name != "run"}, "data": data}


def floors(study: Study, runs: list[dict[str, Any]], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What models of counts reach, estimated on exactly the tokens that the run with most tokens has seen."""
    most = max((run for run in runs if study.arm(run["arm"]).of is None), key=lambda run: run["tokens"])
    config = config_from_dict(found[most["directory"]]["config"])
    config = replace(config, data=replace(config.data, tokenizer=None))
    vocab_size = config.model.vocab_size
    seen = seen_windows(config, most["steps"])
    data = next(iter(open_validation_sets(config.data, vocab_size=vocab_size).values()))
    held_out = validation_windows(data, study.sequences or data.num_sequences)
    rows = [
        {
            "name": ORDERS.get(n, f"{n}-gram"),
            "loss": NGramModel.fit(seen, n, vocab_size).nll(held_out),
            "accuracy": None,
        }
        for n in study.ngrams
    ]
    if study.tables:
        # Tables of counts know no windows: the whole sets, one token after the other.
        prefixes = *(source.prefix for source in config.data.train), next(iter(config.data.validation.values()))
        *train, test_ids = (TokenShard.open(expand_path(prefix, "data")).tokens for prefix in prefixes)
        train_ids = np.concatenate(train)
        tables = [(n, False) for n in study.tables] + [(max(study.tables), True)]
        for n, back_off in tables:
            accuracy = count_table_accuracy(train_ids, test_ids, n, vocab_size, back_off)
            name = f"table of {n} tokens" + (", backing off" if back_off else "")
            rows.append({"name": name, "loss": None, "accuracy": accuracy})
    return rows


def _differences(study: Study, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    names = [arm.name for arm in study.arms]
    pairs = study.pairs or ([*combinations(names, 2)] if len(names) <= 4 else [(name, names[0]) for name in names[1:]])
    for metric in ("loss", "accuracy", "bits_per_byte"):
        for budget in study.budgets:
            values = {
                name: {r["seed"]: r[metric] for r in runs if r["arm"] == name and r["budget"] == budget}
                for name in names
            }
            for a, b in pairs if not study.law and study.match != "none" else ():
                if None in (*values[a].values(), *values[b].values()):
                    continue
                found = paired_difference(values[a], values[b])
                bounds = {"low": found.low, "high": found.high} if found.n > 1 else {"low": None, "high": None}
                verdict = found.verdict
                if metric == "accuracy" and verdict != "not resolved":
                    verdict = "b" if verdict == "a" else "a"  # more is better
                yield {"a": a, "b": b, "budget": budget, "metric": metric, "mean": found.mean, **bounds, "level": 0.95,
                       "seeds": found.n, "verdict": verdict}  # fmt: skip


def statements(study: Study, results: Mapping[str, Any]) -> Iterator[str]:
    """Sentences that say what the intervals allow, and what to be careful about."""
    runs = results["runs"]
    for budget in study.budgets:
        for pair in results["differences"]:
            if pair["budget"] == budget and pair["metric"] == "loss":
                one, other = (
                    {r["seed"]: r["loss"] for r in runs if r["arm"] == pair[side] and r["budget"] == budget}
                    for side in "ab"
                )
                at = f"At {budget:.3g} {study.limit.removeprefix('max_')}: " if len(study.budgets) > 1 else ""
                yield at + sentence(pair["a"], pair["b"], paired_difference(one, other))
    for arm in results["arms"]:
        if arm["lr_at_edge"]:
            at_edge = "lies at the edge of its grid: a better one may exist"
            yield f"The learning rate of {arm['name']}, {arm['lr']:g}, {at_edge}."
    for family, law in (results["law"] or {}).items():
        interval = f"90 % interval {law['low']:.2f} to {law['high']:.2f}, {law['runs']} runs"
        if min(abs(law["phi"] - bound) for bound in PHI_BOUNDS) < 1e-3:
            yield (
                f"phi of {family} isn't determined: the fit ends at the bound {law['phi']:.2f} of its search, with a "
                f"residual of {law['residual']:.3f} nats; the law doesn't describe these {law['runs']} runs."
            )
        else:
            yield f"phi of {family} is {law['phi']:.2f} ({interval}; residual {law['residual']:.3f} nats)."


def table_rows(results: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Cells of each arm at each budget, means over the seeds, and of each floor; an arm's loss with its deviation."""
    budgets = results["budgets"]
    for budget, arm in product(budgets, results["arms"]):
        runs = [run for run in results["runs"] if run["arm"] == arm["name"] and run["budget"] == budget]
        keys = ("loss", "mean_depth", "flops_per_token", "tokens", "executed_flops")
        loss, depth, forward, tokens, executed = (fmean(run[key] for run in runs) for key in keys)
        spread = f" ± {stdev(run['loss'] for run in runs):.4f}" if len(runs) > 1 else ""
        yield {
            "arm": arm["label"] + (f", {budget:.3g}" if len(budgets) > 1 else ""),
            "loss": f"{loss:.4f}{spread}",
            "accuracy": "" if runs[0]["accuracy"] is None else f"{fmean(run['accuracy'] for run in runs):.2%}",
            "depth": f"{depth:.2f}",
            "FLOPs/token": f"{forward:.3g}",
            "tokens": f"{tokens:,.0f}",
            "FLOPs": f"{executed:.3g}",
            "lr": f"{arm['lr']:g}",
        }
    for floor in results["floors"]:
        loss, accuracy = floor["loss"], floor["accuracy"]
        shown = {} if loss is None else {"loss": f"{loss:.4f}"}
        yield {"arm": floor["name"], **shown, **({} if accuracy is None else {"accuracy": f"{accuracy:.2%}"})}


def read_results(path: Path) -> dict[str, Any]:
    """The results of a study from its directory or its file. Raises ConfigError if they are none."""
    path = path / RESULTS_FILE if path.is_dir() else path
    try:
        found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as the results of a study: {error}") from error
    if found.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path}: schema = {found.get('schema')!r}, expected {SCHEMA}: make it again with this version"
        )
    return found
