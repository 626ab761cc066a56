"""Depth of every token as a colour heat map: in the terminal and as a PNG.

Both show the same layout: tokens side by side in a monospaced grid, each cell coloured by the number of recursions that
the token took, whitespace made visible. Colours run from light (shallow) to dark (deep) along a perceptual map, and
every cell sets its own text colour, so that the terminal map reads the same on dark and on light backgrounds; a
terminal without colours gets the depths as digits under the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR_MAP = "YlGnBu"
_COLOUR_RANGE = (0.12, 0.88)
_MAX_COLUMNS = 96
_TAB_COLUMNS = 4

_FONT = "DejaVu Sans Mono"
_FONT_POINTS = 10.0
_COLUMN_INCHES = 0.602 * _FONT_POINTS / 72  # this font's advance is 0.602 em
_LINE_INCHES = 1.75 * _FONT_POINTS / 72
_CELL_HEIGHT = 0.86  # of a line; the rest separates the lines
_CELL_GAP = 0.04  # of a column, separates neighbouring tokens
_MARGIN_INCHES = 0.2
_HEADER_INCHES = 0.85


@dataclass(frozen=True)
class Cell:
    """A token, or the part of one that fits on a line: where it stands and what is shown."""

    line: int
    column: int
    text: str
    depth: int

    @property
    def width(self) -> int:
        """Columns taken; wide characters take two."""
        return cell_len(self.text)


def render_terminal(tokens: Sequence[str], depths: Sequence[int], num_recursions: int, console: Console) -> None:
    """Print the heat map of `tokens` [T] with `depths` [T] in 0..num_recursions to `console`, legend first.

    Raises:
        ValueError: lengths differ or a depth lies outside 0..num_recursions.
    """
    _check(tokens, depths, num_recursions)
    colours = palette(num_recursions)
    console.print(_legend(depths, colours))
    lines: dict[int, list[Cell]] = {}
    for cell in lay_out(tokens, depths, min(console.width, _MAX_COLUMNS)):
        lines.setdefault(cell.line, []).append(cell)
    for cells in lines.values():
        row = Text(no_wrap=True)
        for cell in cells:
            row.append(cell.text, style=f"{_ink(colours[cell.depth])} on {colours[cell.depth]}")
        console.print(row, soft_wrap=True)
        if console.color_system is None:
            console.print("".join(str(cell.depth).ljust(cell.width) for cell in cells), soft_wrap=True, highlight=False)


def save_png(tokens: Sequence[str], depths: Sequence[int], num_recursions: int, path: Path | str, title: str) -> None:
    """Draw the heat map of `tokens` [T] with `depths` [T] in 0..num_recursions to the PNG file `path`.

    Raises:
        ValueError: lengths differ or a depth lies outside 0..num_recursions.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _check(tokens, depths, num_recursions)
    cells = lay_out(tokens, depths, _MAX_COLUMNS)
    lines = 1 + max((cell.line for cell in cells), default=0)
    width, height = _MAX_COLUMNS * _COLUMN_INCHES, lines * _LINE_INCHES
    figure = Figure(figsize=(width + 2 * _MARGIN_INCHES, height + 2 * _MARGIN_INCHES + _HEADER_INCHES), dpi=144)
    FigureCanvasAgg(figure)
    figure_width, figure_height = figure.get_size_inches()
    body = figure.add_axes(
        (_MARGIN_INCHES / figure_width, _MARGIN_INCHES / figure_height, width / figure_width, height / figure_height)
    )
    body.set(xlim=(0, _MAX_COLUMNS), ylim=(lines, 0))
    header_bottom = (height + 1.5 * _MARGIN_INCHES) / figure_height
    header = figure.add_axes(
        (_MARGIN_INCHES / figure_width, header_bottom, width / figure_width, _HEADER_INCHES / figure_height)
    )
    header.set(xlim=(0, _MAX_COLUMNS), ylim=(_HEADER_INCHES / _LINE_INCHES, 0))
    for axes in (body, header):
        axes.axis("off")
    colours = palette(num_recursions)
    _draw_header(header, depths, colours, title)
    for cell in cells:
        _draw_cell(body, cell, colours[cell.depth])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def lay_out(tokens: Sequence[str], depths: Sequence[int], columns: int) -> list[Cell]:
    """Place tokens on lines of at most `columns`; a newline is shown and ends its line.

    A token that doesn't fit on the rest of its line moves to the next one; one longer than a whole line is cut.
    """
    cells: list[Cell] = []
    line = column = 0
    for token, depth in zip(tokens, depths, strict=True):
        for piece in token.splitlines(keepends=True):
            shown = _visible(piece)
            if column and column + cell_len(shown) > columns:
                line, column = line + 1, 0
            for part in _cut(shown, columns):
                if column + cell_len(part) > columns:
                    line, column = line + 1, 0
                cells.append(Cell(line, column, part, depth))
                column += cell_len(part)
            if piece.splitlines()[0] != piece:
                line, column = line + 1, 0
    return cells


def palette(num_recursions: int) -> list[str]:
    """Colours `#rrggbb` of depths 0 to num_recursions: grey for a token that skips the core, then light to dark."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    low, high = _COLOUR_RANGE
    steps = [low + (high - low) * depth / max(num_recursions - 1, 1) for depth in range(num_recursions)]
    return ["#e4e4e4", *(to_hex(colormaps[_COLOUR_MAP](step)) for step in steps)]


def _check(tokens: Sequence[str], depths: Sequence[int], num_recursions: int) -> None:
    if len(tokens) != len(depths):
        raise ValueError(f"{len(tokens)} tokens but {len(depths)} depths: give one depth a token")
    outside = [depth for depth in depths if not 0 <= depth <= num_recursions]
    if outside:
        raise ValueError(f"depth {outside[0]} lies outside 0..{num_recursions}: give the model's number of recursions")


def _visible(text: str) -> str:
    """Whitespace and control characters as symbols, each line break as one arrow."""
    shown = []
    for character in text.replace("\r\n", "\n"):
        if character == "\t":
            shown.append("→".ljust(_TAB_COLUMNS))
        elif character.splitlines() != [character]:
            shown.append("↵")
        elif cell_len(character) == 0 or not character.isprintable():
            shown.append("�")
        else:
            shown.append(character)
    return "".join(shown)


def _cut(text: str, columns: int) -> list[str]:
    """Pieces of at most `columns` columns."""
    pieces = [""]
    for character in text:
        if pieces[-1] and cell_len(pieces[-1] + character) > columns:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _ink(background: str) -> str:
    """Black or white, whichever contrasts more with `background` (WCAG 2 relative luminance)."""
    channels = [int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _summary(depths: Sequence[int]) -> str:
    mean = sum(depths) / len(depths) if depths else 0.0
    return f"mean depth {mean:.2f} over {len(depths)} tokens"


def _legend_entries(depths: Sequence[int], num_recursions: int) -> list[tuple[int, str]]:
    """Depth and share of each depth; a skipped core (depth 0) is listed only where it occurs."""
    shown = range(0 if 0 in depths else 1, num_recursions + 1)
    return [(depth, f"{list(depths).count(depth) / max(len(depths), 1):.0%}") for depth in shown]


def _legend(depths: Sequence[int], colours: Sequence[str]) -> Text:
    legend = Text("recursions ")
    for depth, share in _legend_entries(depths, len(colours) - 1):
        legend.append(f" {depth} ", style=f"{_ink(colours[depth])} on {colours[depth]}")
        legend.append(f" {share}  ")
    return legend.append(_summary(depths))


def _draw_header(axes: Axes, depths: Sequence[int], colours: Sequence[str], title: str) -> None:
    axes.text(0, 0.9, title, fontsize=13, va="center", color="#222222", fontweight="bold", parse_math=False)
    column, line = 0.0, 2.1
    axes.text(column, line + 0.5, "recursions", fontsize=10, va="center", color="#444444")
    column += 11
    for depth, share in _legend_entries(depths, len(colours) - 1):
        _draw_cell(axes, Cell(int(line), int(column), f" {depth} ", depth), colours[depth])
        axes.text(column + 3.6, int(line) + 0.5, share, fontsize=10, va="center", color="#444444")
        column += 9
    axes.text(column + 1, int(line) + 0.5, _summary(depths), fontsize=10, va="center", color="#444444")


def _draw_cell(axes: Axes, cell: Cell, colour: str) -> None:
    from matplotlib.patches import Rectangle

    corner = (cell.column + _CELL_GAP, cell.line + (1 - _CELL_HEIGHT) / 2)
    axes.add_patch(Rectangle(corner, cell.width - 2 * _CELL_GAP, _CELL_HEIGHT, facecolor=colour, linewidth=0))
    column = cell.column
    for character in cell.text:
        # One character at a time: hinting and wide characters can't push what follows out of its column.
        if character != " ":
            axes.text(
                column + cell_len(character) / 2,
                cell.line + 0.5,
                _drawable(character),
                fontsize=_FONT_POINTS,
                family=_FONT,
                ha="center",
                va="center_baseline",
                color=_ink(colour),
                parse_math=False,
            )
        column += cell_len(character)


def _drawable(character: str) -> str:
    """The character, or a box where the font that comes with matplotlib lacks it."""
    from matplotlib.font_manager import findfont, get_font

    return character if ord(character) in get_font(findfont(_FONT)).get_charmap() else "□"
