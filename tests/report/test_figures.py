"""Figures as SVG, and the page that holds them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megamor.report import figures
from megamor.report.figures import COLOURS, Interval, Series, fixed
from megamor.report.page import Page

SERIES = [Series(f"arm {i} <&>", [1e5, 2e5, 3e5], [3.0 + i, 2.5, 2.0], [2, 2, 1], [4, 3, 3]) for i in range(9)]
ROWS = [Interval("a - b", -0.01, -0.03, 0.01, "not resolved"), Interval("one seed", 0.02, style=1)]
DRAWN = {
    "lines": lambda: figures.lines("Loss", "tokens", "loss (nats/token)", SERIES),
    "log": lambda: figures.lines("Loss", "FLOPs", "loss (nats/token)", SERIES, log_x=True, log_y=True),
    "forest": lambda: figures.forest("Differences", "loss (nats/token)", ROWS),
    "bars": lambda: figures.bars("Speed", "tokens/s", ROWS),
    "strips": lambda: figures.strips("Seeds", "loss (nats/token)", {"a": [1.0, 2.0], "b": [1.5]}),
    "stack": lambda: figures.stack("Depths", "step", "fraction", [0, 1], {"1": [0.2, 0.4], "2": [0.8, 0.6]}),
    "radar": lambda: figures.radar("Shape", ["width", "layers", "KV"], {"a": [1, 0.5, 0.2]}),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_a_figure_is_one_well_formed_element_that_names_its_axes(kind: str) -> None:
    svg = DRAWN[kind]()
    root = ET.fromstring(svg)
    words = [text for element in root.iter() if (text := (element.text or "").strip())]
    assert root.get("aria-label") in words
    labels = {"lines": ["tokens", "loss (nats/token)", "arm 0 <&>"], "forest": ["loss (nats/token)", "one seed"]}
    assert set(labels.get(kind, [])) <= set(words)
    width = float(root.get("width", "").removesuffix("pt")) * 96 / 72
    assert 380 < width < 420, "the size of text on a phone is that of the figure"


def test_ids_differ_between_figures_of_a_page() -> None:
    first, second = (set(re.findall(r'\bid="([^"]+)"', DRAWN["lines"]())) for _ in range(2))
    assert first
    assert not first & second
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg := DRAWN["lines"]())
    assert set(used) <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_colours_are_variables_of_the_page_or_fixed_ones(tmp_path: Path) -> None:
    svg = DRAWN["lines"]()
    assert not set(re.findall(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", svg))), "a colour that no theme decides"
    for column, theme in enumerate(figures.THEMES):
        alone = fixed(svg, theme)
        assert "var(" not in alone
        assert COLOURS["s0"][column] in alone
    files = [tmp_path / "a" / "1.svg", tmp_path / "2.svg"]
    for file in files:
        figures.save(DRAWN["lines"](), file)
    assert files[0].read_bytes() == files[1].read_bytes(), "a committed picture changes only with what it shows"


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("column", "ground"), [(0, "#fdfdfe"), (1, "#12181e"), (2, "#ffffff"), (2, "#0d1117")])
def test_colours_can_be_seen_on_their_ground(column: int, ground: str) -> None:
    for name, colours in COLOURS.items():
        needed = {"ink": 4.1, "soft": 4.1, "line": 1.3, "paper": 0}.get(name, 2.6)
        if colours[column] != "transparent":
            assert contrast(colours[column], ground) >= needed, (name, colours[column])


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    page = Page("A <b> & c", "made by hand")
    page.section("One")
    page.text("1 < 2")
    page.sentences(["x & y"])
    page.code("megamor study run x.yaml --out 'a b'")
    page.figures([DRAWN["lines"](), DRAWN["forest"]()], ["the losses"])
    page.table(["arm", "loss", "note"], [["a<b", "4.20", "good"], ["b", "-0.1", ""]], "All", fold="more")
    page.write(tmp_path / "deep" / "page.html")
    text = (tmp_path / "deep" / "page.html").read_text()
    reader = Reader(text)
    assert reader.open == []
    assert not [tag for tag, _ in reader.found if tag in ("script", "link", "img", "iframe")]
    used = ("href", "src", "xlink:href")
    addresses = {a for _, attributes in reader.found for n, a in attributes.items() if n in used}
    assert all(address and address.startswith("#") for address in addresses)
    for part in ("A &lt;b&gt; &amp; c", "1 &lt; 2", "<li>x &amp; y</li>", "a&lt;b", "prefers-color-scheme: dark"):
        assert part in text
    assert '<td class="n" data-label="loss">4.20</td><td data-label="note">good</td>' in text
    assert "@import" not in text
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
