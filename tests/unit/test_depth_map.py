"""The depth map: where tokens are placed, what their colours and digits say, and that the picture holds them."""

from __future__ import annotations

from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.cells import cell_len
from rich.console import Console

from megamor.evaluate.depth_map import lay_out, palette, render_terminal, save_png

TOKENS = ["def", " f", "(x):", "\n", "    ", "return", " x", "\n", "漢字"]
DEPTHS = [1, 2, 3, 1, 0, 2, 3, 1, 2]


def text_of(console_width: int = 80) -> str:
    out = StringIO()
    render_terminal(TOKENS, DEPTHS, 3, Console(file=out, width=console_width, color_system=None))
    return out.getvalue()


def test_every_token_is_placed_once_in_order_and_within_the_width() -> None:
    for columns in (4, 7, 80):
        cells = lay_out(TOKENS, DEPTHS, columns)
        assert [(cell.line, cell.column) for cell in cells] == sorted((cell.line, cell.column) for cell in cells)
        assert all(cell.column + cell.width <= columns for cell in cells)
        for one, other in pairwise(cells):
            assert other.line > one.line or other.column == one.column + one.width
        assert {cell.depth for cell in cells} == {0, 1, 2, 3}


def test_a_newline_ends_its_line_and_a_long_token_is_cut() -> None:
    cells = lay_out(["ab", "\n", "cdefgh"], [1, 2, 3], 4)
    assert [(cell.line, cell.column, cell.depth) for cell in cells][:2] == [(0, 0, 1), (0, 2, 2)]
    assert [cell.text for cell in cells if cell.depth == 3] == ["cdef", "gh"]
    assert [cell.line for cell in cells if cell.depth == 3] == [1, 2]


def test_without_colours_the_digits_stand_under_their_tokens() -> None:
    lines = text_of().splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("def"))
    assert lines[place + 1].rstrip() == "1  2 3   1"
    wide = next(number for number, line in enumerate(lines) if "漢字" in line)
    assert lines[wide + 1].rstrip() == "2"
    assert cell_len(lines[wide]) == 4


def test_colours_tell_the_depths_apart() -> None:
    out = StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="truecolor")
    render_terminal(["a", "b"], [1, 3], 3, console)
    colours = palette(3)
    assert len(set(colours)) == 4
    for depth in (1, 3):
        red, green, blue = (int(colours[depth][start : start + 2], 16) for start in (1, 3, 5))
        assert f"48;2;{red};{green};{blue}" in out.getvalue()


def test_the_picture_shows_each_depth_in_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "new" / "depth.png"
    save_png(["aaaa", "bbbb"], [1, 3], 3, path, "two tokens")
    pixels = imread(path)[..., :3].reshape(-1, 3)

    def area(depth: int) -> int:
        colour = [int(palette(3)[depth][start : start + 2], 16) / 255 for start in (1, 3, 5)]
        return int((abs(pixels - colour).max(axis=1) < 0.01).sum())

    in_legend = area(2)
    assert in_legend > 0
    assert area(1) > 1.5 * in_legend
    assert area(3) > 1.5 * in_legend


@pytest.mark.parametrize(("depths", "what"), [([1], "2 tokens but 1"), ([1, 4], "depth 4"), ([1, -1], "depth -1")])
def test_wrong_depths_are_refused(depths: list[int], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        render_terminal(["a", "b"], depths, 3, Console(file=StringIO()))
