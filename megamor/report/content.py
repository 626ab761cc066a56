"""What reports show of runs: figures, tables and sentences, the same for the HTML page and the dashboard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from megamor.progress import format_bytes, format_count, format_duration
from megamor.report.figures import Interval, Series, bars, forest, lines, radar, stack, strips
from megamor.report.runs import AXES, MATCHES, Results, Run, flatten, settings
from megamor.study.statistics import Difference, paired_difference, sentence

Table = tuple[list[str], list[list[str]]]
"""Headers and rows; the first cell of a row names it."""
MOST_POINTS = 150
"""Points of a curve that is drawn: more can't be seen, and make pages of megabytes."""
START = 0.25
"""Curves of losses begin at this fraction of the training: before, they fall so far that nothing else is seen."""
MOST_CURVES, MOST_PAIRS = 16, 21
UNCORRECTED = "95 % intervals (paired t over seeds), each for its pair alone: not corrected for the number of pairs."


class Metric(NamedTuple):
    """How a metric is called and written; `better` is 1 where more is better, 0 where neither is."""

    label: str
    unit: str = ""
    better: int = -1
    form: str = ".4f"
    """A format of numbers, or `count`, `bytes`, `time`."""

    @property
    def axis(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """A value; empty for None."""
        if value is None:
            return ""
        writers = {"count": format_count, "bytes": format_bytes, "time": format_duration}
        return writers[self.form](value) if self.form in writers else format(value, self.form)


METRICS = {
    "loss": Metric("validation loss", "nats/token"),
    "loss_topk": Metric("validation loss, top-k rule", "nats/token"),
    "loss_last3": Metric("validation loss, mean of the last 3", "nats/token"),
    "loss_average": Metric("validation loss of averaged weights", "nats/token"),
    "train_loss": Metric("training loss, last tenth", "nats/token"),
    "bits_per_byte": Metric("bits per byte"),
    "perplexity": Metric("perplexity", form=".4g"),
    "accuracy": Metric("accuracy", better=1),
    "mean_depth": Metric("mean depth", "recursions", 0, ".2f"),
    "mean_depth_topk": Metric("mean depth, top-k rule", "recursions", 0, ".2f"),
    "flops_per_token": Metric("forward FLOPs per token", form="count"),
    "flops_per_token_topk": Metric("forward FLOPs per token, top-k rule", form="count"),
    "parameters": Metric("unique parameters", form="count"),
    "parameters_without_embedding": Metric("unique parameters without embedding", form="count"),
    "tokens": Metric("training tokens", better=0, form="count"),
    "executed_flops": Metric("executed FLOPs", better=0, form="count"),
    "seconds": Metric("training time", "s", form="time"),
    "tokens_per_second": Metric("training speed", "tokens/s", 1, "count"),
    "peak_memory_bytes": Metric("peak memory", "bytes", form="bytes"),
    "kv_bytes_per_token": Metric("keys and values per token", "bytes", form="bytes"),
}
COMPACT = {"mean_depth": "depth", "tokens": "tokens", "executed_flops": "FLOPs", "parameters": "params",
           "flops_per_token": "forward\nFLOPs/tok", "seconds": "time"}  # fmt: skip
"""Columns of `megamor compare` beside the metric, as many as a terminal shows."""


def metric_named(name: str) -> Metric:
    """That of METRICS; a task's score is better if it is higher, the loss on a set if it is lower."""
    better = -1 if re.search(r"loss|perplexity|bits|ppl", name) else 1
    return METRICS.get(name) or Metric(name, "nats/token" if name.startswith("loss/") else "", better)


def matching(results: Results, by: str | None = None) -> tuple[list[str], list[str]]:
    """By what the runs are matched, and what keeps them from being matched by the rest; with `by`, by that alone.

    Runs of equal size are matched only if they also have seen equally many tokens.
    """
    names = {None: (*MATCHES,), "parameters": ("parameters", "tokens")}.get(by, (by or "",))
    reasons = {name: results.unmatched(name) for name in names}
    matched = [MATCHES[name] for name, why in reasons.items() if why is None]
    return matched if matched != [MATCHES["parameters"]] else [], [why for why in reasons.values() if why]


def means(results: Results, metric: str) -> dict[str, Difference]:
    """The mean of each group with its interval, best first."""
    values = results.values(metric)
    better = metric_named(metric).better
    # A mean is the difference to zero.
    found = {group: paired_difference(v, dict.fromkeys(v, 0.0)) for group, v in values.items()}
    return dict(sorted(found.items(), key=lambda item: (-better or 1) * item[1].mean))


def differences(results: Results, metric: str) -> list[tuple[str, str, Difference]]:
    """Pairs of groups with their difference: the pairs of the study, or all (with the best only, if there are many)."""
    values, budgets = results.values(metric), budgets_of(results)
    given = [d for d in results.study.get("differences") or [] if d["metric"] == metric]
    if given:
        groups = {(r.row["arm"], r.row["budget"]): group for group, runs in results.groups().items() for r in runs}
        pairs = [(groups[d["a"], d["budget"]], groups[d["b"], d["budget"]]) for d in given]
    else:
        pairs = [(a, b) for a, b in combinations(means(results, metric), 2) if budgets[a] == budgets[b]]
        if len(pairs) > MOST_PAIRS:
            best = {budgets[a]: a for a, _ in reversed(pairs)}
            pairs = [(a, b) for a, b in pairs if a == best[budgets[a]]]
    common = [(a, b) for a, b in pairs if values.get(a, {}).keys() & values.get(b, {}).keys()]
    return [(a, b, paired_difference(values[a], values[b])) for a, b in common]


def budgets_of(results: Results) -> dict[str, float | None]:
    """The budget of each group."""
    return {group: runs[0].row.get("budget") for group, runs in results.groups().items()}


def mean_of(runs: Sequence[Run], name: str) -> float | None:
    """The mean of the runs that have the figure."""
    values = [value for run in runs if (value := run.figure(name)) is not None]
    return fmean(values) if values else None


def matched_table(results: Results) -> Table:
    """A row for each metric that a run has: means over the seeds of each group, with their standard deviation."""
    groups = results.groups()
    rows = [["seeds", *(str(len(runs)) for runs in groups.values())]]
    for name, metric in METRICS.items():
        if any(run.figure(name) is not None for run in results.runs):
            cells = [metric.text(mean_of(runs, name)) + deviation(runs, name) for runs in groups.values()]
            rows.append([metric.axis, *cells])
    return ["", *groups], rows


def compact_table(results: Results, metric: str) -> Table:
    """A row for each group, narrow enough for a terminal of 80 columns."""
    results.values(metric)  # which may be unknown
    shown, groups = metric_named(metric), results.groups()
    rows = [
        [group, str(len(runs)), shown.text(mean_of(runs, metric)), deviation(runs, metric)[3:],
         *(METRICS[name].text(mean_of(runs, name)) for name in COMPACT)]
        for group, runs in groups.items()
    ]  # fmt: skip
    return ["arm", "n", f"{metric}\n{shown.unit.replace('/token', '')}".rstrip(), "sd", *COMPACT.values()], rows


def deviation(runs: Sequence[Run], name: str) -> str:
    """` ± 0.0123`, the standard deviation over the runs, of figures that a seed changes; empty for one run."""
    values = [value for run in runs if (value := run.figure(name)) is not None]
    return f" ± {stdev(values):.4f}" if len(values) > 1 and metric_named(name).form == ".4f" else ""


def leaderboard(results: Results, metric: str) -> Table:
    """Groups by the mean of `metric`, at each budget; matched ones with their paired difference from the first."""
    shown, values, budgets = metric_named(metric), results.values(metric), budgets_of(results)
    ranked, matched, rows = means(results, metric), bool(matching(results)[0]), []
    for budget in dict.fromkeys(budgets.values()):
        best, *_ = groups = [group for group in ranked if budgets[group] == budget] or [""]
        for place, group in enumerate(filter(None, groups), 1):
            mean, behind = ranked[group], ""
            if matched and place > 1 and values[group].keys() & values[best].keys():
                d = paired_difference(values[group], values[best])
                interval = f"[{d.low:+.4f}, {d.high:+.4f}]" + ", not resolved" * (d.verdict == "not resolved")
                behind = f"{d.mean:+.4f} {interval if d.n > 1 else '(one seed)'}"
            bounds = f"[{mean.low:.4g}, {mean.high:.4g}]" if mean.n > 1 else ""
            rows.append([group, str(place), shown.text(mean.mean), bounds, str(mean.n), behind])
    return ["arm", "rank", shown.axis, "95 % interval of the mean", "seeds", "difference from the first"], rows


def statistics_figures(results: Results, metric: str) -> list[str]:
    """The groups' means, the values of their seeds, and the differences, if the runs are matched."""
    axis, styles = metric_named(metric).axis, styles_of(results)
    rows = [_interval(group, d, styles[group]) for group, d in means(results, metric).items()]
    found = [
        forest("Mean over seeds, 95 % interval", axis, rows, zero=False),
        strips("Values of the seeds", axis, {group: list(v.values()) for group, v in results.values(metric).items()}),
    ]
    pairs = differences(results, metric) if matching(results)[0] else []
    rows = [_interval(f"{a} − {b}", d, 6 if d.low <= 0 <= d.high else 0) for a, b, d in pairs]
    return [*found, forest("Paired differences, 95 % intervals", f"difference of the {axis}", rows)] if rows else found


def _interval(label: str, d: Difference, style: int) -> Interval:
    if d.n == 1:
        return Interval(label, d.mean, note="one seed", style=style)
    return Interval(label, d.mean, d.low, d.high, "not resolved" if d.low <= 0 <= d.high else "", style)


def statements(results: Results, metric: str = "loss") -> list[str]:
    """What the figures allow to say, and what should make a reader careful."""
    found = list(results.study.get("statements") or []) if metric == "loss" else []
    by, reasons = matching(results)
    if not found and len(results.groups()) > 1:
        if not by:
            return [f"The runs are not matched, so their differences say nothing: {'; '.join(reasons)}."]
        found.append(f"Matched by {' and '.join(by)}." + (f" Not matched by {'; '.join(reasons)}." if reasons else ""))
        shown = metric_named(metric)
        pairs = differences(results, metric) if shown.better else []
        if pairs and all(d.n == 1 for _, _, d in pairs):
            listed = ", ".join(f"{group} {shown.text(d.mean)}" for group, d in means(results, metric).items())
            found.append(f"One seed allows no interval, so no difference is resolved ({shown.label}: {listed}).")
            pairs = []
        unit = shown.unit or shown.label
        found += [sentence(a, b, d, unit, lower_is_better=shown.better < 0) for a, b, d in pairs]
    found += results.differing_seeds()
    values = {group: fmean(v.values()) for group, v in results.values(metric).items()} if metric == "loss" else {}
    for floor in results.study.get("floors") or []:
        behind = [group for group, loss in values.items() if floor["loss"] is not None and loss >= floor["loss"]]
        if behind:
            found.append(f"Behind the floor {floor['name']} ({floor['loss']:.4f} nats/token): {', '.join(behind)}.")
    kinds = {name: ((arm.get("config") or {}).get("router") or {}).get("kind") for name, arm in results.arms.items()}
    return found + [alarm for run in results.runs for alarm in run.alarms(kinds.get(run.row["arm"]) != "fixed")]


def styles_of(results: Results) -> dict[str, int]:
    """The look of each group, the same in all figures."""
    return {group: index for index, group in enumerate(results.groups())}


def curve_figure(results: Results, metric: str, axis: str, title: str, y: str, start: float = 0.0) -> str | None:
    """`metric` of each group over training: the mean over seeds, in a band from the lowest to the highest.

    The part before `start` (a fraction of the run) is left out. None if no run has two points, or there are too many.
    """
    series = []
    if len(results.groups()) > MOST_CURVES:
        return None
    for (group, runs), style in zip(results.groups().items(), styles_of(results).values(), strict=True):
        curves = [(x, y) for run in runs if len((c := run.curve(metric, axis))[0]) > 1 for x, y in [c]]
        if not curves:
            continue
        # Runs of an arm are compared where all of them have been.
        places = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), MOST_POINTS)
        longest = max(curves, key=lambda curve: len(curve[0]))[0]
        places = places if len(longest) > MOST_POINTS else np.array(longest).clip(places[0], places[-1])
        width = max(1, len(longest) // 60) if metric == "train/loss" else 1
        smooth = [_smoothed(np.array(y), width) for _, y in curves]
        rows = np.array([np.interp(places, x, y) for (x, _), y in zip(curves, smooth, strict=True)])
        keep = places >= start * places[-1]
        low, high = (rows.min(0)[keep].tolist(), rows.max(0)[keep].tolist()) if len(rows) > 1 else ((), ())
        series.append(Series(group, places[keep].tolist(), rows.mean(0)[keep].tolist(), low, high, style))
    return lines(title, AXES[axis][1], y, series) if series else None


def _smoothed(values: Any, width: int) -> Any:
    """Means over the last `width` values."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def loss_figures(results: Results) -> list[str]:
    """Loss against tokens, executed FLOPs and time, on the validation sets and in training."""
    found = []
    for metric, name in (("loss", "Validation loss"), ("train/loss", "Training loss")):
        for axis in ("tokens", "executed_flops", "seconds"):
            title = f"{name} against {AXES[axis][1].partition(' (')[0]}"
            found.append(curve_figure(results, metric, axis, title, "loss (nats/token)", START))
    return [figure for figure in found if figure]


ROUTER_FIGURES = {
    "routing/mean_depth": ("Mean depth in training", "recursions per token"),
    "routing/entropy": ("Entropy of the depths", "nats"),
    "routing/topk_causal_agreement": ("Top-k and causal rule agree", "fraction of decisions"),
    "routing/max_violation": ("Imbalance of the depths", "largest excess over uniform"),
    "routing/dead_depths": ("Depths that no token takes", "fraction of the depths"),
}


def router_figures(results: Results) -> list[str]:
    """Statistics of the routers over training: those of ROUTER_FIGURES first, then each other one that was logged."""
    logged = {name for run in results.runs for record in run.records for name in record if name.startswith("routing/")}
    others = {name: (name, "value") for name in sorted(logged - ROUTER_FIGURES.keys())}
    wanted = {name: labels for name, labels in {**ROUTER_FIGURES, **others}.items() if name in logged}
    found = [curve_figure(results, name, "step", *labels) for name, labels in wanted.items()]
    return [figure for figure in found if figure]


def depth_figures(results: Results) -> list[str]:
    """The depths of the tokens over training, of the first seed of each group; one figure for each stage."""
    found = []
    for group, runs in results.groups().items():
        names = sorted({n for record in runs[0].records for n in record if re.fullmatch(r"depth/(.*/)?\d+", n)})
        for stage in sorted({name.rpartition("/")[0] for name in names}):
            depths = sorted(int(n.rpartition("/")[2]) for n in names if n.rpartition("/")[0] == stage)
            rows = {depth: runs[0].curve(f"{stage}/{depth}", "step") for depth in depths}
            every = max(1, len(rows[depths[0]][0]) // MOST_POINTS)
            layers = {f"depth {depth}": y[::every] for depth, (_, y) in rows.items() if any(y)}
            title = group + stage.removeprefix("depth").replace("/", ", ")
            if len(layers) > 1:
                found.append(stack(title, "optimizer step", "fraction of tokens", rows[depths[0]][0][::every], layers))
    return found


def tuning_figures(results: Results) -> list[str]:
    """Loss of the pilot runs against the learning rate."""
    series = []
    for index, arm in enumerate(results.arms.values()):
        if tried := sorted((one["lr"], one["loss"]) for one in arm.get("tuning") or ()):
            rates, losses = zip(*tried, strict=True)
            series.append(Series(arm.get("label") or arm["name"], rates, losses, style=index))
    y = "loss of the pilot run (nats/token)"
    return [lines("Tuning of the learning rate", "learning rate", y, series, log_x=True)] if series else []


def law_figures(results: Results) -> list[str]:
    """Loss against size at each budget, for each family of arms: the curves behind a law."""
    points: dict[str, list[tuple[float, float]]] = {}
    for runs in results.groups().values() if results.study.get("law") else ():
        label = f"{runs[0].row['arm'].partition('_')[2]}, {format_count(runs[0].row['budget'])}FLOPs"
        size = runs[0].row["parameters_without_embedding"]
        points.setdefault(label, []).append((size, fmean(run.row["loss"] for run in runs)))
    ordered = {name: sorted(found) for name, found in sorted(points.items())}
    series = [Series(name, [x for x, _ in found], [y for _, y in found]) for name, found in ordered.items()]
    axes = METRICS["parameters_without_embedding"].axis, METRICS["loss"].axis
    return [lines("Loss at equal executed FLOPs", *axes, series, log_x=True)] if series else []


def efficiency_figures(results: Results, metric: str) -> list[str]:
    """The metric against what a token costs, and bars of speed, memory and sizes."""
    groups, styles, shown = results.groups(), styles_of(results), metric_named(metric)
    points = {g: (mean_of(runs, "flops_per_token"), mean_of(runs, metric)) for g, runs in groups.items()}
    series = [Series(g, [x], [y], style=styles[g]) for g, (x, y) in points.items() if x is not None and y is not None]
    title = f"{shown.label.capitalize()} against cost"
    found = [lines(title, METRICS["flops_per_token"].axis, shown.axis, series)] if series else []
    for name in ("tokens_per_second", "peak_memory_bytes", "parameters", "kv_bytes_per_token"):
        known = {g: v for g, runs in groups.items() if (v := mean_of(runs, name)) is not None}
        rows = [Interval(g, v, note=METRICS[name].text(v), style=styles[g]) for g, v in known.items()]
        if rows:
            found.append(bars(METRICS[name].label.capitalize(), METRICS[name].axis, rows))
    return found


RADAR = {"model.dim": "width", "model.num_layers": "layers", "recursion.num_recursions": "recursions",
         "parameters": "parameters", "flops_per_token": "FLOPs/token", "mean_depth": "mean depth"}  # fmt: skip


def radar_figures(results: Results) -> list[str]:
    """The shapes of the arms and what they cost, each relative to the largest."""
    values: dict[str, dict[str, float]] = {}
    for group, runs in results.groups().items():
        known = {**flatten(results.arms[runs[0].row["arm"]].get("config") or {}), **runs[0].row}
        values[group] = {label: known[name] for name, label in RADAR.items() if known.get(name) is not None}
    common = [axis for axis in RADAR.values() if all(axis in own for own in values.values())]
    top = {axis: max(own[axis] for own in values.values()) or 1.0 for axis in common}
    series = {group: [own[axis] / top[axis] for axis in common] for group, own in values.items()}
    names = [f"{axis} ({format_count(top[axis])})" for axis in common]
    return [radar("Relative to the largest", names, series)] if len(common) > 2 else []


def specifications(results: Results) -> tuple[Table, Table]:
    """Settings of the arms side by side: those that differ, and the rest."""
    flat = {arm.get("label") or name: settings(arm.get("config") or {}) for name, arm in results.arms.items()}
    keys = dict.fromkeys(key for f in flat.values() for key in f)
    rows = [[key, *(f.get(key, "") for f in flat.values())] for key in keys]
    differ = [row for row in rows if len(set(row[1:])) > 1]
    return (["setting", *flat], differ), (["setting", "value"], [row[:2] for row in rows if row not in differ])
