"""The plots of a depth sweep, and the plots and the page of an analysis of a trained router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megamor.report.figures import COLOURS, Interval, Series, bars, canvas, forest, lines, look
from megamor.report.page import Page

Figures = Mapping[str, Any]
AXES = {
    "position": "tokens of context",
    "frequency": "occurrences of the token",
    "loss": "loss of the prediction (nats)",
    "entropy": "entropy of the prediction (nats)",
    "surprisal": "surprisal of the token (nats)",
    "previous depth": "depth of the previous token",
}
SPEARMAN = "Spearman's rank correlation, 95 % interval"
MEAN = "mean depth, 95 % interval"
LOSS = "loss (nats/token)"
BOUNDS = ("value", "low", "high")
AGREEMENT = ("agreement", "chance", "kappa", "spearman")


def router_plots(stage: Figures) -> dict[str, str]:
    """SVG figures of one stage, by name."""
    found = {"depths": bars("Recursions per token", "fraction of the tokens", shares(stage["depths"]))}
    if stage.get("halting", stage["depths"]) != stage["depths"]:
        found["halting"] = bars("Recursions until halting", "fraction of the tokens", shares(stage["halting"]))
    correlated = [interval(name, rho) for name, rho in stage["correlations"].items() if rho["value"] is not None]
    if correlated:
        found["correlations"] = forest("What depth correlates with", SPEARMAN, correlated)
        for name, groups in stage["classes"].items():
            means = [interval(group["at"] or "no word", group, f"({group['tokens']:,})") for group in groups]
            found[name.partition(" (")[0]] = forest(f"Depth by {name}", MEAN, means, zero=False)
        for name, points in stage["curves"].items():
            x, y, low, high = ([point[key] for point in points] for key in ("at", "value", "low", "high"))
            curve = Series("", x, y, low, high)
            title = f"Depth against {name}"
            found[f"depth by {name}"] = lines(title, AXES[name], MEAN, [curve], log_x=name == "frequency")
    if steps := stage.get("recursions"):
        for key, title in (("lens_loss", "Logit-lens loss (nats/token)"), ("rms", "RMS of hidden states")):
            curve = Series("", [step["recursion"] for step in steps], [step[key] for step in steps])
            found[key] = lines(f"{title.partition(' (')[0]} of all tokens", "recursions", title, [curve])
    return found | {name: svg for kind in ("gates", "scores") for name, svg in histograms(stage, kind)}


def shares(counts: Sequence[int]) -> list[Interval]:
    """A bar for each depth that occurs."""
    total = sum(counts)
    return [Interval(str(depth), n / total, note=f"{n / total:.1%}") for depth, n in enumerate(counts) if n]


def interval(label: str, figures: Figures, note: str = "") -> Interval:
    """A labelled row with the value printed beside it."""
    return Interval(label, figures["value"], figures["low"], figures["high"], f"{figures['value']:.2f} {note}".strip())


def histograms(stage: Figures, kind: str) -> Iterator[tuple[str, str]]:
    """A figure for each gate or score, with a line for each recursion."""
    for name in dict.fromkeys(one["name"] for one in stage.get(kind, ())):
        curves = []
        for one in (one for one in stage[kind] if one["name"] == name):
            low, high = one["edges"][:2]  # all bars have the same width
            middles = [edge + (high - low) / 2 for edge in one["edges"][:-1]]
            density = [count / sum(one["counts"]) / (high - low) for count in one["counts"]]
            curves.append(Series(f"recursion {one['recursion']}", middles, density))
        yield f"{kind} {name}", lines(f"{kind.capitalize()}: {name}", kind[:-1], "density", curves)


def router_page(
    figures: Figures, plots: Mapping[str, Mapping[str, str]], passages: Mapping[str, str], command: str
) -> Page:
    """The page. `plots` are those of each stage under the causal rule, `passages` depth maps as SVG."""
    checkpoint, data, origin = figures["checkpoint"], figures["data"], figures["origin"]
    step = "" if checkpoint["step"] is None else f", step {checkpoint['step']:,}"
    about = f"{data['tokens']:,} tokens of {data['documents']:,} documents of {data['prefix']}"
    page = Page(f"What the router of {checkpoint['name']} has learned", f"{checkpoint['directory']}{step}; {about}")
    page.sentences([*figures["notes"], "Figures show depths of the causal rule, by which the model generates."])
    rows = [
        [
            f"{mode}, {name}",
            f"{of['loss']:.4f}",
            *(f"{stage['mean_depth'][key]:.3f}" for key in ("value", "low", "high")),
        ]
        for mode, of in figures["modes"].items()
        for name, stage in of["stages"].items()
    ]
    page.table(("routing, stage", "loss (nats/token)", "mean depth", "from", "to"), rows, "Mean depth, 95 % interval")
    if figures["agreement"]:
        values = [(one["with"], [one[key]["value"] for key in AGREEMENT]) for one in figures["agreement"]]
        rows = [[name, *("" if x is None else f"{x:.3f}" for x in found)] for name, found in values]
        caption = "How often another rule, seed or checkpoint gives a token the same depth, and how often chance would"
        page.table(("depths of", "agreement", "by chance", "Cohen's kappa", "Spearman"), rows, caption)
    for name, found in plots.items():
        page.section(f"Depths: {name}" if len(plots) > 1 else "Depths")
        page.figures(list(found.values()))
    if passages:
        page.section("Passages with the widest, the median and the narrowest spread of depths")
        page.figures(list(passages.values()), list(passages))
    page.section("Origin")
    page.code(command)
    page.note(f"{origin['date']}, commit {origin['commit']['revision']}; {data['resamples']} resamples of documents")
    return page


def sweep_figure(entries: Sequence[Figures], what: str = LOSS) -> str:
    """The loss or a task's score against executed FLOPs, a curve for each rule and a star for the model's own."""
    own, *others = [(row, {LOSS: row["loss"], **row.get("tasks", {})}[what]) for row in entries]
    mark: Any = {"linestyle": "", "marker": "*", "markersize": 13, "color": COLOURS["ink"][0], "zorder": 5}
    with canvas("Quality against compute", "executed FLOPs per token of a forward pass", what) as drawn:
        for style, label in enumerate(dict.fromkeys(row["label"] for row, _ in others)):
            points = sorted((row["flops_per_token"], value) for row, value in others if row["label"] == label)
            drawn.axes.plot(*zip(*points, strict=True), label=label, **look(style))
        drawn.axes.plot([own[0]["flops_per_token"]], [own[1]], label="the model's own rule", **mark)
    return drawn.svg
