"""Figures as SVG text: one style for pages, the dashboard, README and docs.

A figure's colours are CSS variables with a fallback, `var(--s0, #0072b2)`, which a page defines for light and for
dark (`page.py`). A file that stands alone has no such page; `fixed` puts in the colours of one theme.
Series differ by colour, dash and marker, so that they can be told apart without colours (palette: Okabe and Ito, 2008).
Figures are about 400 px wide with text of 12 px, the size that a phone shows. Text stays text, in the reader's fonts.
"""

from __future__ import annotations

import html
import io
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

THEMES = ("light", "dark", "both")
COLOURS: dict[str, tuple[str, str, str]] = {
    "ink": ("#1c2733", "#e6ebf0", "#767676"),
    "soft": ("#66727f", "#93a0ad", "#777777"),
    "line": ("#cfd6dd", "#3a4652", "#9aa0a6"),
    "paper": ("#fdfdfe", "#12181e", "transparent"),
    "s0": ("#0072b2", "#3d9bdc", "#0a7fc2"),
    "s1": ("#d55e00", "#e8742a", "#d55e00"),
    "s2": ("#009e73", "#14b88a", "#009e73"),
    "s3": ("#c26a9b", "#dc90ba", "#c26a9b"),
    "s4": ("#c08400", "#e69f00", "#c98a00"),
    "s5": ("#3d9ed1", "#8fd0f5", "#46a5d8"),
    "s6": ("#4d4d4d", "#c4c4c4", "#808080"),
}
"""Each colour in the themes of THEMES. "both" is readable on white and on black."""
NUM_SERIES = 7
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 3)))
_MARKERS = "os^DvPX*"
_SVG_ID = count()
# Matplotlib's settings are global to the process; the dashboard draws in several threads.
_DRAWING = threading.Lock()


@dataclass(frozen=True)
class Series:
    """Points of a line, and the bounds of a band around it. The same `style` in several figures looks the same."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: int | None = None


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its interval, where there is one; `note` is printed beside it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    style: int = 0


class Canvas:
    """An empty pair of axes to draw on; `svg` is the figure's text once the `canvas` block has ended."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.svg = ""


@contextmanager
def canvas(
    title: str, x: str = "", y: str = "", *, size: tuple[float, float] = (4.15, 2.9), polar: bool = False
) -> Iterator[Canvas]:
    """Axes with labels `x` and `y`, which name the unit too, in a figure of `size` inches (96 px each).

    Labelled lines get a legend below the axes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    ink, soft, line = (COLOURS[name][0] for name in ("ink", "soft", "line"))
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "megamor", "font.family": "sans-serif", "font.size": 9,
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": soft, "xtick.color": soft, "ytick.color": soft,
        "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "grid.color": line,
        "axes.grid": True, "grid.linewidth": 0.6, "grid.alpha": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.6,
        "lines.markersize": 4.5, "axes.unicode_minus": False, "axes.formatter.use_mathtext": False,
        "mathtext.fontset": "dejavusans", "axes.formatter.limits": (-3, 4),
    }  # fmt: skip
    with _DRAWING, matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(polar=polar)
        axes.patch.set_visible(False)
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        drawn = Canvas(axes)
        yield drawn
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            columns = max(1, min(len(labels), int(290 // (41 + 5.2 * max(map(len, labels))))))
            # Rows beyond the second would be taken from the axes' height.
            figure.set_figheight(size[1] + 0.17 * max(0, -(-len(labels) // columns) - 2))
            figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=2.6, columnspacing=1)
        for axis in () if polar else (axes.xaxis, axes.yaxis):
            low, high = sorted(map(abs, axis.get_view_interval()))
            if axis.get_scale() == "log":
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
                axis.set_major_formatter(
                    EngFormatter(sep=" ") if high >= 1e4 else FuncFormatter(lambda value, _: f"{value:g}")
                )
                axis.set_minor_formatter(NullFormatter())
            elif high >= 1e4:
                axis.set_major_locator(MaxNLocator(6))
                axis.set_major_formatter(EngFormatter(sep=" "))
        # The layout is worked out once, here: `savefig` would draw everything twice for it.
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.execute(figure)
        figure.set_layout_engine("none")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn.svg = _inline(buffer.getvalue(), title)


def _inline(text: str, title: str) -> str:
    """What can be pasted into a page: no prologue, ids of its own, a label for screen readers, colours as variables."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    own = f"f{next(_SVG_ID)}_"
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: match[0] + own, text)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
    for name, (light, _, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name}, {light})")
    return text


def fixed(svg: str, theme: str = "both") -> str:
    """The figure with the colours of a theme, for a file of its own or a page that doesn't define them."""
    column = THEMES.index(theme)
    return re.sub(r"var\(--(\w+), #\w+\)", lambda match: COLOURS[match[1]][column], svg)


def save(svg: str, path: Path) -> None:
    """Write the figure to a file that is readable on light and on dark ground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = re.search(r'id="(f\d+_)', svg)  # counts figures of this process: the same figure is the same file
    path.write_text(fixed(svg).replace(own[1], "") if own else fixed(svg), encoding="utf-8")


def variables() -> str:
    """CSS that defines the colours for light and dark."""
    light, dark = ("; ".join(f"--{name}: {c[i]}" for name, c in COLOURS.items()) for i in (0, 1))
    # Paper is light, whatever the screen.
    return f":root {{ {light}; }} @media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}; }} }}"


def colour(style: int) -> str:
    """The colour to draw series number `style` with."""
    return COLOURS[f"s{style % NUM_SERIES}"][0]


def depth_colours(number: int) -> list[str]:
    """Colours of `number` depths, from shallow to deep, readable on light and dark."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.92 - 0.77 * i / max(1, number - 1))) for i in range(number)]


def look(style: int, points: int = 0) -> dict[str, Any]:
    """Keywords of `axes.plot` for series number `style`; a long line of `points` gets a few markers only."""
    every = max(1, points // 8)
    marker = {"marker": _MARKERS[style % len(_MARKERS)], "markevery": (style * every // NUM_SERIES, every)}
    return {"color": colour(style), "linestyle": _DASHES[style % len(_DASHES)], **marker}


def lines(title: str, x: str, y: str, series: Sequence[Series], *, log_x: bool = False, log_y: bool = False) -> str:
    """Curves, each with its band where it has one."""
    with canvas(title, x, y) as drawn:
        for index, one in enumerate(series):
            style = index if one.style is None else one.style
            drawn.axes.plot(one.x, one.y, label=one.label, **look(style, len(one.x)))
            if one.low:
                drawn.axes.fill_between(one.x, one.low, one.high, color=colour(style), alpha=0.18, linewidth=0)
        if log_x:
            drawn.axes.set_xscale("log")
        if log_y:
            drawn.axes.set_yscale("log")
    return drawn.svg


def forest(title: str, x: str, rows: Sequence[Interval], *, zero: bool = True) -> str:
    """One row for each interval, its label above it; with `zero`, a line where there is no difference."""
    with canvas(title, x, size=(4.15, 0.95 + 0.42 * len(rows))) as drawn:
        axes = drawn.axes
        for index, row in enumerate(rows):
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [index, index], color=colour(row.style), linewidth=2.4)
            axes.plot([row.value], [index], color=colour(row.style), marker=_MARKERS[row.style % len(_MARKERS)])
            text = f"{row.label}: {row.note}" if row.note else row.label
            axes.text(0.01, index - 0.3, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
        if zero:
            axes.axvline(0, color=COLOURS["soft"][0], linewidth=1, linestyle=":")
        axes.set_ylim(len(rows) - 0.6, -0.65)
        axes.set_yticks([])
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.08)
    return drawn.svg


def bars(title: str, x: str, rows: Sequence[Interval]) -> str:
    """Horizontal bars, the label above each bar and its `note` (or value) at the label's end."""
    with canvas(title, x, size=(4.15, 0.95 + 0.46 * len(rows))) as drawn:
        axes = drawn.axes
        for index, row in enumerate(rows):
            error = None if row.low is None or row.high is None else [[row.value - row.low], [row.high - row.value]]
            axes.barh(index + 0.16, row.value, 0.34, color=colour(row.style), xerr=error, ecolor=COLOURS["ink"][0])
            text = f"{row.label}: {row.note or f'{row.value:.4g}'}"
            axes.text(0.005, index - 0.2, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
        axes.set_ylim(len(rows) - 0.5, -0.55)
        axes.set_yticks([])
        axes.grid(visible=False, axis="y")
    return drawn.svg


def strips(title: str, y: str, groups: Mapping[str, Sequence[float]]) -> str:
    """The single values of each group (such as an arm's seeds) as points, with a line at their mean."""
    with canvas(title, "", y, size=(4.15, 3.1)) as drawn:
        for index, values in enumerate(groups.values()):
            step = 0.36 / max(1, len(values) - 1)
            places = [index + (i - (len(values) - 1) / 2) * step for i in range(len(values))]
            drawn.axes.plot(places, values, **look(index) | {"linestyle": ""}, alpha=0.9)
            if values:
                drawn.axes.hlines(math.fsum(values) / len(values), index - 0.3, index + 0.3, color=colour(index))
        turned = {"rotation": 28, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, groups)) > 34 else {}
        drawn.axes.set_xticks(range(len(groups)), [str(name) for name in groups], **turned)
        drawn.axes.set_xlim(-0.6, len(groups) - 0.4)
        drawn.axes.grid(visible=False, axis="x")
    return drawn.svg


def stack(title: str, x: str, y: str, places: Sequence[float], layers: Mapping[str, Sequence[float]]) -> str:
    """Fractions that add up to 1, one layer on the other, such as the depths of the tokens over training."""
    with canvas(title, x, y) as drawn:
        colours, paper = depth_colours(len(layers)), COLOURS["paper"][0]
        values = list(layers.values())
        drawn.axes.stackplot(places, *values, labels=list(layers), colors=colours, edgecolor=paper, linewidth=0.5)
        drawn.axes.set_ylim(0, 1)
        if len(places) > 1:
            drawn.axes.set_xlim(places[0], places[-1])
    return drawn.svg


def radar(title: str, axes_names: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """Values between 0 and 1 on axes around a centre, one polygon for each series."""
    with canvas(title, size=(4.15, 3.4), polar=True) as drawn:
        angles = [2 * math.pi * i / len(axes_names) for i in range(len(axes_names))]
        for index, (label, values) in enumerate(series.items()):
            drawn.axes.plot([*angles, angles[0]], [*values, values[0]], label=label, **look(index))
        drawn.axes.set_xticks(angles, axes_names, fontsize=8.5)
        for label, angle in zip(drawn.axes.get_xticklabels(), angles, strict=True):
            right, left = math.cos(angle) > 0.1, math.cos(angle) < -0.1
            label.set_horizontalalignment("left" if right else "right" if left else "center")
        drawn.axes.set_yticks([0.25, 0.5, 0.75, 1], [])
        drawn.axes.set_ylim(0, 1.05)
    return drawn.svg
