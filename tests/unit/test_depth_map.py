"""The depth map: positions, colours and digits of tokens, and the picture."""

from __future__ import annotations

from io import StringIO
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len
from rich.console import Console

from megamor.evaluate.depth_map import DepthMap, lay_out, palette

TOKENS = ["def", " f", "(x):", "\n", "    ", "return", " x", "\n", "漢字"]
DEPTHS = [1, 2, 3, 1, 0, 2, 3, 1, 2]
SVG = "{http://www.w3.org/2000/svg}"


def text_of(console_width: int = 80, prompt_length: int = 0) -> str:
    out = StringIO()
    DepthMap(TOKENS, DEPTHS, 3, prompt_length).print(Console(file=out, width=console_width, color_system=None))
    return out.getvalue()


def test_every_token_is_placed_once_in_order_and_within_the_width() -> None:
    for columns in (4, 7, 80):
        cells = lay_out(TOKENS, DEPTHS, columns)
        assert [(cell.line, cell.column) for cell in cells] == sorted((cell.line, cell.column) for cell in cells)
        assert all(cell.column + cell.width <= columns for cell in cells)
        for one, other in pairwise(cells):
            assert other.line > one.line or other.column == one.column + one.width
        assert {cell.depth for cell in cells} == {0, 1, 2, 3}
    cells = lay_out(["ab", "\n", "cdefgh"], [1, 2, 3], 4)
    assert [(cell.line, cell.column, cell.depth) for cell in cells][:2] == [(0, 0, 1), (0, 2, 2)]
    assert [(cell.text, cell.line) for cell in cells if cell.depth == 3] == [("cdef", 1), ("gh", 2)]


def test_without_colours_the_digits_are_below_their_tokens() -> None:
    lines = text_of().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("def"))
    assert lines[first + 1].rstrip() == "1  2 3   1"
    wide = next(number for number, line in enumerate(lines) if "漢字" in line)
    assert lines[wide + 1].rstrip() == "2"
    assert cell_len(lines[wide]) == 4


def test_colours_tell_the_depths_apart() -> None:
    out = StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="truecolor")
    DepthMap(["a", "b"], [1, 3], 3).print(console)
    colours = palette(3)
    assert len(set(colours)) == 4
    for depth in (1, 3):
        red, green, blue = (int(colours[depth][start : start + 2], 16) for start in (1, 3, 5))
        assert f"48;2;{red};{green};{blue}" in out.getvalue()


def test_the_continuation_has_a_heading_and_starts_where_the_prompt_ended() -> None:
    lines = [line.rstrip() for line in text_of(prompt_length=6).splitlines()]
    prompt, continuation = lines.index("prompt"), lines.index("continuation")
    assert lines[prompt + 1 : continuation : 2] == ["def f(x):↵", "    return"]
    assert lines[continuation + 1] == "           x↵"
    assert lines[continuation + 2] == "          3 1"
    assert not {"prompt", "continuation"} & set(text_of().splitlines())


def test_the_picture_shows_title_legend_and_every_token_in_the_colour_of_its_depth(tmp_path: Path) -> None:
    path = tmp_path / "new" / "depth.svg"
    title = "a title that is longer than a line of the picture is " + "wide " * 20
    DepthMap(TOKENS, DEPTHS, 3, prompt_length=6).save_svg(path, title)
    root = ElementTree.parse(path).getroot()
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    boxes = [box for box in root.iter(f"{SVG}rect") if "x" in box.attrib]
    colours = palette(3)
    assert [box.attrib["fill"] for box in boxes] == [colours[depth] for depth in [0, 1, 2, 3, *DEPTHS]]
    texts = ["".join(text.itertext()).replace("\u00a0", " ") for text in root.iter(f"{SVG}text")]
    assert title.split() == " ".join(texts[: texts.index("recursions")]).split()
    assert texts.index("prompt") < texts.index("def") < texts.index("continuation") < texts.index(" x")
    for shape in [*boxes, *root.iter(f"{SVG}text")]:
        right = float(shape.attrib["x"]) + float(shape.attrib.get("width") or shape.attrib["textLength"])
        assert right < width
        assert float(shape.attrib["y"]) < height


@pytest.mark.parametrize(("depths", "what"), [([1], "2 tokens but 1"), ([1, 4], "depth 4"), ([1, -1], "depth -1")])
def test_wrong_depths_are_refused(depths: list[int], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        DepthMap(["a", "b"], depths, 3)
