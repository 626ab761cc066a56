"""The Streamlit app of `megamor dashboard`: the figures of the report, following runs while they are written.

Streamlit runs this file from top to bottom for each visitor and at each interaction.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamor.errors import MegamorError
from megamor.report import content
from megamor.report.figures import fixed
from megamor.report.runs import Results, find_runs, read_results

# Environment variables: the directory to watch, and the seconds between two looks at it.
RUNS, REFRESH = "MEGAMOR_RUNS", "MEGAMOR_REFRESH"
TABS = ("Losses", "Leaderboard", "Specifications", "Efficiency", "Statistics", "Insights")
ALL_RUNS = "all runs"
MOST_RUNS = 12  # chosen at first


def show(root: Path, seconds: float) -> None:
    """Draw the whole app."""
    import streamlit as st

    st.set_page_config("megamor", layout="wide")
    st.title("megamor")
    studies = {str(path.parent.relative_to(root)): path.parent for path in sorted(root.glob("**/results.json"))}
    choice = st.sidebar.selectbox("Study", [*studies, ALL_RUNS])
    if choice in studies:
        paths = [studies[choice]]
    else:
        names = {str(path.relative_to(root)): path for path in find_runs(root)}
        paths = [names[name] for name in st.sidebar.multiselect("Runs", names, default=list(names)[:MOST_RUNS])]
    items = st.cache_data(show_spinner=False, max_entries=32)(items_of)

    def draw() -> None:
        try:
            results = read_results(paths)
            names = results.metrics()
            metric = st.selectbox("Metric", names, key="metric", format_func=lambda n: content.metric_named(n).axis)
            state = str([(run.row, len(run.records)) for run in results.runs])
            for name, tab in zip(TABS, st.tabs(TABS, key="tab", on_change="rerun"), strict=True):
                if tab.open:  # the others aren't drawn
                    with tab:
                        show_items(st, items(results, metric, name, state))
        except MegamorError as error:  # of a run that has just begun, too
            st.warning(str(error))

    if paths:
        st.fragment(draw, run_every=seconds)()
    else:
        st.info(f"No run is chosen, or there is none in {root}.")


def items_of(_results: Results, metric: str, tab: str, state: str) -> list[Any]:
    """What a tab shows: lists of figures, tables, and text. Streamlit keeps it until `state` changes."""
    results = _results
    match tab:
        case "Losses":
            return [content.loss_figures(results), content.depth_figures(results), content.router_figures(results)]
        case "Leaderboard":
            return [content.leaderboard(results, metric), content.matched_table(results)]
        case "Specifications":
            differing, rest = content.specifications(results)
            return [content.radar_figures(results), differing, "The same for all:", rest]
        case "Efficiency":
            return [content.efficiency_figures(results, metric)]
        case "Statistics":
            figures = [*content.statistics_figures(results, metric), *content.tuning_figures(results)]
            return [[*figures, *content.law_figures(results)], content.UNCORRECTED]
    return [f"- {line}" for line in content.statements(results, metric)]


def show_items(st: Any, items: Sequence[Any]) -> None:
    """Show one tab's content; `st` is the module streamlit."""
    for item in items:
        if isinstance(item, str):
            st.markdown(item.replace("$", r"\$"))
        elif isinstance(item, list):
            for column, figures in zip(st.columns(2), (item[::2], item[1::2]), strict=True):
                for svg in figures:
                    column.image(fixed(svg, st.context.theme.type or "light"), width="stretch")
        else:
            headers, rows = item
            st.dataframe([dict(zip(headers, row, strict=True)) for row in rows], hide_index=True)


if __name__ == "__main__":
    show(Path(os.environ[RUNS]), float(os.environ[REFRESH]))
