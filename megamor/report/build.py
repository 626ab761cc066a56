"""The report of a study or of runs as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megamor.errors import ConfigError
from megamor.report import content
from megamor.report.page import Page
from megamor.report.router import LOSS, router_plots, sweep_figure
from megamor.report.runs import Results


def build_page(results: Results, metric: str | None = None, extras: Sequence[Mapping[str, Any]] = ()) -> Page:
    """Everything that is known of the runs; compared by `metric` (default: the loss, if there is one).

    `extras` are contents of files of `megamor sweep-depth` and `megamor analyze`.

    Raises:
        ConfigError: no run has the metric, or an extra is neither a sweep nor an analysis.
    """
    study, metric = results.study, metric or results.metrics()[0]
    page = Page(study["name"], study.get("question") or "")
    page.sentences(content.statements(results, metric))
    several = len(results.groups()) > 1
    comparable = several and bool(content.matching(results)[0])
    if comparable:
        page.note(content.UNCORRECTED)
    if study.get("command"):
        page.code(study["command"])
    page.section("Matched table" if comparable else "Figures of the runs")
    page.table(
        *content.matched_table(results),
        caption="Means over seeds ± standard deviation. Losses are under the causal rule unless another is named.",
    )
    if study.get("expected"):
        rows = [[str(e["what"]), str(e["value"]), str(e["source"])] for e in study["expected"]]
        page.table(["what was expected", "value", "source"], rows)
    if study.get("floors"):
        rows = [
            [f["name"], *("" if f[n] is None else f"{f[n]:.4f}" for n in ("loss", "accuracy"))] for f in study["floors"]
        ]
        page.table(["floor", "loss (nats/token)", "accuracy"], rows, caption="What models without a network reach.")
    if curves := content.loss_figures(results):
        page.section("Loss")
        page.figures(curves)
        page.note("Bands span the seeds. The first quarter of the training is left out.")
    if several:
        page.section("Leaderboard: " + content.metric_named(metric).label)
        page.table(*content.leaderboard(results, metric))
        page.figures(content.statistics_figures(results, metric))
        page.section("Efficiency")
        page.figures(content.efficiency_figures(results, metric))
    for heading, figures in (
        ("Depths over training", content.depth_figures(results)),
        ("Routers", content.router_figures(results)),
        ("Learning rates", content.tuning_figures(results)),
        ("Scaling", content.law_figures(results)),
    ):
        if figures:
            page.section(heading)
            page.figures(figures)
    page.section("Specifications")
    page.figures(content.radar_figures(results) if several else [])
    differing, rest = content.specifications(results)
    if differing[1]:
        page.table(*differing, caption="Settings that differ between the arms.")
    page.table(*rest, fold=f"{len(rest[1])} settings that are the same")
    for extra in extras:
        add_extra(page, extra)
    return page


def add_extra(page: Page, extra: Mapping[str, Any]) -> None:
    """Add the figures of a sweep or an analysis."""
    schema = extra.get("schema")
    if schema == "megamor-sweep/1":
        page.section(f"Other depths than its own: {extra['checkpoint']}")
        page.figures([sweep_figure(extra["entries"], what) for what in (LOSS, *extra["entries"][0].get("tasks", ()))])
        page.sentences([f"Left out: {sentence}" for sentence in extra["left_out"]])
    elif schema == "megamor-analysis/1":
        for name, stage in extra["modes"]["causal"]["stages"].items():
            page.section(f"What the router of {extra['checkpoint']['name']} has learned: {name}")
            page.figures(list(router_plots(stage).values()))
        page.sentences(extra["notes"])
    else:
        raise ConfigError(
            f"a JSON file has the schema {schema!r}; give files of megamor sweep-depth or megamor analyze"
        )
