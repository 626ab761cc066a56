"""Runs and studies in one form: the content of a study's results.json, and the logged lines of each run beside it.

Runs that belong to no study get the same form, so that one page, one table and one dashboard serve both. Runs are read
while they are being written.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megamor.checkpoint.layout import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    by_preference,
    latest_step,
    published_steps,
    step_name,
)
from megamor.config import config_from_yaml
from megamor.config.convert import config_to_dict
from megamor.config.derive import derive
from megamor.errors import ConfigError
from megamor.metrics import read_jsonl
from megamor.study import collect
from megamor.study.collect import TOLERANCE

METRICS_FILE = "metrics.jsonl"
TOKENS, FLOPS, SECONDS = "train/tokens_seen", "throughput/executed_flops", "throughput/training_seconds"
AXES = {
    "tokens": (TOKENS, "tokens seen"),
    "executed_flops": (FLOPS, "executed training FLOPs"),
    "seconds": (SECONDS, "training time (s)"),
    "step": ("step", "optimizer step"),
}
MATCHES = {"tokens": "tokens", "executed_flops": "executed FLOPs", "parameters": "unique parameters"}
_VALIDATION = re.compile(r"validation/(.+)/(loss|mean_depth|flops_per_token)(_causal|_topk)(_average)?")
_NO_METRICS = ("seed", "budget", "lr", "updated", "steps")
_SEED = re.compile(r"(.+)_seed(\d+)")


@dataclass(frozen=True)
class Run:
    """`row` is as in results.json; `records` are the run's lines of metrics, empty if only the results are here."""

    row: dict[str, Any]
    records: list[dict[str, Any]]

    def curve(self, metric: str, axis: str) -> tuple[list[float], list[float]]:
        """Where `metric` was logged, in units of `axis` (see AXES), and its values."""
        name = AXES[axis][0]
        known = [(r["step"], r[name]) for r in self.records if r.get(name) is not None]
        points = [(r["step"], v) for r in self.records if (v := r.get(metric)) is not None and math.isfinite(v)]
        if not known or not points:
            return [], []
        # Validation has a line of its own, and training is logged every few steps only.
        steps, reached = zip(*known, strict=True)
        places = np.interp([step for step, _ in points], steps, reached)
        return places.tolist(), [value for _, value in points]

    def figure(self, name: str) -> float | None:
        """A number of the row that is known and finite."""
        value = self.row.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def alarms(self, routed: bool) -> list[str]:
        """What in the metrics should make a reader careful; `routed` if a router chooses between depths."""
        last = {name: value for record in self.records for name, value in record.items()}
        dead = last.get("routing/dead_depths") or 0
        failed = sum(not math.isfinite(record.get("train/loss") or 0.0) for record in self.records)
        left_out = self.row.get("loss") is not None and self.figure("loss") is None
        found = {
            " validation loss that isn't finite (left out of the means)": left_out,
            " steps with a loss that isn't finite": failed,
            " steps skipped": last.get("guard/skipped_steps"),
            " rollbacks": last.get("guard/rollbacks"),
            "% of the depths are taken by no token": round(100 * dead) if routed else 0,
        }
        return [f"{self.row['name']}: {count:g}{what}." for what, count in found.items() if count]


@dataclass(frozen=True)
class Results:
    """A study, or runs in the form of one."""

    study: dict[str, Any]
    runs: list[Run]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The arms by name."""
        return {arm["name"]: arm for arm in self.study["arms"]}

    def groups(self) -> dict[str, list[Run]]:
        """The runs of each arm, at each budget if there are several, by a label for people."""
        arms, budgets = self.arms, {run.row.get("budget") for run in self.runs}
        found: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs:
            label = arms[run.row["arm"]].get("label") or run.row["arm"]
            found[label if len(budgets) < 2 else f"{label} at {run.row['budget']:.3g}"].append(run)
        return dict(found)

    def metrics(self) -> list[str]:
        """Names of the figures that a run has and that can be compared, the most telling first."""
        names = dict.fromkeys(name for run in self.runs for name in run.row if run.figure(name) is not None)
        found = [name for name in names if name not in _NO_METRICS]
        if not found:
            raise ConfigError(f"{self.study['name']}: nothing is logged yet; try again after the first steps")
        return found

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """`metric` of each group by seed, where it is known. Raises ConfigError if no run has it."""
        found: dict[str, dict[int, float]] = {}
        for group, runs in self.groups().items():
            if values := {run.row["seed"]: v for run in runs if (v := run.figure(metric)) is not None}:
                found[group] = values
        if not found:
            raise ConfigError(f"no run has the metric {metric!r}; they have {', '.join(self.metrics())}")
        return found

    def unmatched(self, by: str) -> str | None:
        """What keeps the runs of a budget from being matched `by` one of MATCHES; None if they are."""
        for budget in {run.row.get("budget") for run in self.runs}:
            runs = [run for run in self.runs if run.row.get("budget") == budget]
            found = sorted((v, r.row["name"]) for r in runs if (v := r.figure(by)) is not None)
            if len(found) < len(runs):
                return f"{MATCHES[by]} of {next(r.row['name'] for r in runs if r.figure(by) is None)} aren't known"
            (low, first), (high, last) = found[0], found[-1]
            if high > low * (1 + TOLERANCE):
                return f"{MATCHES[by]}: {first} has {low:.4g}, {last} {high:.4g} ({high / max(low, 1e-30):.2f} times)"
        return None

    def differing_seeds(self) -> list[str]:
        """Arms whose runs differ in more than their seed, with the settings."""
        lines = []
        for group, runs in self.groups().items():
            configs = [set(settings(config).items()) for run in runs if (config := run.row.get("config"))]
            keys = sorted({key for config in configs for key, _ in config ^ configs[0]})
            if keys:
                lines.append(f"The runs of {group} differ in {', '.join(keys)}, not only in their seed.")
        return lines


def flatten(values: Mapping[str, Any], prefix: str = "", point: str = ".") -> dict[str, Any]:
    """`{"model.dim": 128, …}` of nested values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}{point}", point) if isinstance(value, Mapping) else {prefix + key: value}
    return found


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings by dotted name, as text, without those that tell an arm's seeds apart."""
    flat = {key: value for key, value in flatten(config).items() if key not in ("run.name", "run.seed", "run.dir")}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in flat.items()
    }


def find_runs(root: Path) -> Iterator[Path]:
    """Directories of runs below `root`, without the runs that try a study's learning rates."""
    for directory, below, files in os.walk(root):
        if METRICS_FILE in files:
            below.clear()
            yield Path(directory)
        below[:] = sorted(name for name in below if not name.startswith("tune_"))


def read_results(paths: Sequence[Path]) -> Results:
    """Read one study (its directory or results.json), or any number of runs and directories of runs.

    Raises:
        ConfigError: there is nothing there, or a study is given beside something else.
        CheckpointError: a run's config is damaged.
    """
    if not paths:
        raise ConfigError("there is no run or study to report on: give one")
    studies = [path for path in paths if path.suffix == ".json" or (path / collect.RESULTS_FILE).is_file()]
    if studies and len(paths) > 1:
        raise ConfigError(f"{studies[0]} is a study: give one study, or runs")
    if studies:
        return _read_study(studies[0])
    directories: list[Path] = []
    for path in paths:
        directories += find_runs(path)
        if not directories or path not in (directories[-1], *directories[-1].parents):
            raise ConfigError(f"{path} has no {METRICS_FILE}: give directories of runs, or of one study")
    runs = _named([read_run(directory) for directory in dict.fromkeys(directories)])
    arms: dict[str, dict[str, Any]] = {}
    for run in runs:
        copied = ("parameters", "parameters_without_embedding", "config", "lr")
        if run.row["arm"] not in arms or not arms[run.row["arm"]]["config"]:
            arms[run.row["arm"]] = {"name": run.row["arm"], **{name: run.row[name] for name in copied}}
    name = paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"
    return Results({"name": name, "arms": list(arms.values())}, runs)


def _read_study(path: Path) -> Results:
    study = collect.read_results(path)
    root = path if path.is_dir() else path.parent
    arms, runs = {arm["name"]: arm for arm in study["arms"]}, []
    for row in study["runs"]:
        given = Path(row["directory"])
        found = next((d for d in (root / given, root / given.name) if (d / METRICS_FILE).is_file()), None)
        sizes = {name: arms[row["arm"]][name] for name in ("parameters", "parameters_without_embedding")}
        tasks = flatten(row.get("tasks") or {}, "tasks/", "/")
        runs.append(Run({"name": given.name, **row, **sizes, **tasks}, read_records(found) if found else []))
    return Results(study, runs)


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics; those of validation get the means over their sets: `loss`, `loss_topk`, and so on."""
    records = read_jsonl(directory / METRICS_FILE)
    seconds, step = 0.0, 0
    for record in records:
        if "throughput/step_seconds" in record:  # runs of earlier versions logged the time of a step only
            seconds += (record["step"] - step) * (record["throughput/step_seconds"] or 0.0)
            step = record["step"]
            record.setdefault(SECONDS, seconds)
        found: dict[str, list[float]] = defaultdict(list)
        for name, value in record.items():
            if (match := _VALIDATION.fullmatch(name)) and value is not None:
                found[match[2] + match[3].replace("_causal", "") + (match[4] or "")].append(value)
        record |= {name: fmean(values) for name, values in found.items()}
    return records


def read_run(directory: Path) -> Run:
    """Read a run, finished or not; what isn't there yet is None."""
    records, config = read_records(directory), _stored_config(directory)
    logged = [record for record in records if TOKENS in record]
    last: dict[str, Any] = logged[-1] if logged else {}
    known = {name: value for record in records for name, value in record.items()}
    losses = [record["loss"] for record in records if "loss" in record]
    sizes = derive(config, 1) if config else None
    peak = max((record.get("memory/peak_gib") or 0.0 for record in records), default=0.0)
    tail = [r["train/loss"] for r in logged[-max(1, len(logged) // 10) :] if r.get("train/loss") is not None]
    sets = [name for name in known if name.startswith("validation/") and name.endswith("/loss_causal")]
    figures = [f"{name}{rule}" for name in ("loss", "mean_depth", "flops_per_token") for rule in ("", "_topk")]
    row = {
        "name": directory.name,
        "directory": str(directory),
        "seed": config.run.seed if config else None,
        "budget": None,
        "lr": config.optim.lr if config else None,
        "config": config_to_dict(config) if config else {},
        **{name: known.get(name) for name in (*figures, "loss_average")},
        "loss_last3": fmean(losses[-3:]) if losses else None,
        "train_loss": fmean(tail) if tail else None,
        "perplexity": math.exp(min(losses[-1], 700)) if losses else None,
        "parameters": sizes and sizes.unique_parameters_with_embedding,
        "parameters_without_embedding": sizes and sizes.unique_parameters,
        "tokens": last.get(TOKENS),
        "executed_flops": last.get(FLOPS),
        "seconds": last.get(SECONDS),
        "tokens_per_second": last[TOKENS] / last[SECONDS] if last.get(SECONDS) else None,
        "peak_memory_bytes": peak * 2**30 or None,
        "updated": records[-1].get("time") if records else None,
        **{f"loss/{name[len('validation/') : -len('/loss_causal')]}": known[name] for name in sets},
        **{name: value for name, value in known.items() if name.startswith("tasks/")},
    }
    return Run(row, records)


def _stored_config(directory: Path) -> Any:
    """The config in the newest checkpoint; None before the first."""
    root = directory / CHECKPOINTS_DIR
    for step in by_preference(published_steps(root), latest_step(root)):
        file = root / step_name(step) / CONFIG_FILE
        if file.is_file():
            return config_from_yaml(file.read_text(encoding="utf-8"), str(file))
    return None


def _named(runs: Sequence[Run]) -> list[Run]:
    """Give each run its arm and seed: by its name `<arm>_seed<k>`, or by settings that are equal but for the seed."""
    parents: dict[str, set[Path]] = defaultdict(set)
    first: dict[str, str] = {}
    for run in runs:
        row, match = run.row, _SEED.fullmatch(run.row["name"])
        key = str(sorted(settings(row["config"]).items())) if row["config"] else row["directory"]
        row["arm"] = match[1] if match else first.setdefault(key, row["name"])
        row["seed"] = row["seed"] if row["seed"] is not None else int(match[2]) if match else 0
        parents[row["arm"]].add(Path(row["directory"]).resolve().parent)
    for run in runs:
        if len(parents[run.row["arm"]]) > 1:
            run.row["arm"] = f"{Path(run.row['directory']).resolve().parent.name}/{run.row['arm']}"
    # Two runs of one seed are no pair of samples: each is an arm of its own.
    count = Counter((run.row["arm"], run.row["seed"]) for run in runs)
    for run in runs:
        if count[run.row["arm"], run.row["seed"]] > 1:
            run.row["arm"] = run.row["directory"]
    return list(runs)
