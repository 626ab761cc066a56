"""Show how many recursions each token took, as a colour heat map in the terminal and as an SVG picture.

Tokens are laid out side by side in a monospaced grid with whitespace made visible. The background of a token is
coloured by its depth, from light (shallow) to dark (deep). The text colour is set too, so that the map reads the same
on dark and on light terminals; a terminal without colours gets the depths as digits below the text. Prompt and
continuation have a heading each, and the continuation starts in the column where the prompt ended.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

# The nine-class YlGnBu scheme of ColorBrewer (Cynthia Brewer): even steps in lightness, safe for colour-blind readers.
_SCALE = ("ffffd9", "edf8b1", "c7e9b4", "7fcdbb", "41b6c4", "1d91c0", "225ea8", "253494", "081d58")
_SCALE_RANGE = (0.12, 0.88)  # nearer to the ends, light cells vanish on white paper and dark ones look black
_SKIPPED_COLOUR = "#e4e4e4"
_MAX_COLUMNS = 96
_TAB_COLUMNS = 4
_PART_OF_CHARACTER = "…"  # shown for a token without a text of its own: the character appears with its last token

# Of the picture, in pixels. The advance of common monospaced fonts is 0.6 em.
_FONT_SIZE = 14
_COLUMN = 0.602 * _FONT_SIZE
_LINE = 24
_MARGIN = 16


@dataclass(frozen=True)
class Cell:
    """A token, or as much of one as fits on a line: its line and column, the text shown, and its depth."""

    line: int
    column: int
    text: str
    depth: int
    in_prompt: bool = False

    @property
    def width(self) -> int:
        """Columns taken; wide characters take two."""
        return cell_len(self.text)


@dataclass(frozen=True)
class DepthMap:
    """Texts of the tokens [T] and how deep each went [T], in 0..num_recursions; the first `prompt_length` are given.

    Raises:
        ValueError: the lengths differ, or a depth lies outside 0..num_recursions.
    """

    tokens: Sequence[str]
    depths: Sequence[int]
    num_recursions: int
    prompt_length: int = 0

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.depths):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.depths)} depths: give one depth per token")
        for depth in self.depths:
            if not 0 <= depth <= self.num_recursions:
                raise ValueError(f"depth {depth} isn't in 0..{self.num_recursions}: give the model's num_recursions")

    def print(self, console: Console) -> None:
        """Print the map to `console`, legend first."""
        styles = [f"{_ink(colour)} on {colour}" for colour in palette(self.num_recursions)]
        fractions, summary = self._legend()
        legend = Text("recursions ")
        for depth, fraction in fractions:
            legend.append(f" {depth} ", style=styles[depth]).append(f" {fraction}  ")
        console.print(legend.append(summary), soft_wrap=True)
        # In a file a line ends where the text has a line break, and nowhere else.
        for heading, lines in self._sections(
            min(console.width, _MAX_COLUMNS) if console.is_terminal else console.width
        ):
            if heading:
                console.print(heading, style="italic", highlight=False)
            for cells in lines:
                indent = " " * cells[0].column
                row = Text.assemble(indent, *((cell.text, styles[cell.depth]) for cell in cells), no_wrap=True)
                console.print(row, soft_wrap=True)
                if console.color_system is None:
                    digits = indent + "".join(str(cell.depth).ljust(cell.width) for cell in cells)
                    console.print(digits, soft_wrap=True, highlight=False)

    def save_svg(self, path: Path | str, title: str) -> None:
        """Draw the map as the SVG file `path`, below `title` and a legend."""
        # rich can export what it prints as SVG, but it squeezes wide characters into one column and leaves no gap
        # between neighbouring tokens of the same depth.
        colours = palette(self.num_recursions)
        fractions, summary = self._legend()
        shapes: list[str] = []
        line = -1.0
        for row in textwrap.wrap(title, _MAX_COLUMNS):
            line += 1
            shapes += _label(line, 0, row, "bold")
        line += 1.2
        shapes += _label(line, 0, "recursions")
        column = 11
        for depth, fraction in fractions:
            shapes += _box(line, column, f" {depth} ", colours[depth]) + _label(line, column + 4, fraction)
            column += 9
        shapes += _label(line, column, summary)
        for heading, lines in self._sections(_MAX_COLUMNS):
            line += 0.4
            if heading:
                line += 1
                shapes += _label(line, 0, heading, "italic")
            for cells in lines:
                line += 1
                for cell in cells:
                    shapes += _box(line, cell.column, cell.text, colours[cell.depth])
        size = f"{_MAX_COLUMNS * _COLUMN + 2 * _MARGIN:.0f} {(line + 1) * _LINE + 2 * _MARGIN:.0f}"
        font = f'{_FONT_SIZE}px "DejaVu Sans Mono", Menlo, Consolas, monospace'
        style = f"text {{ font: {font} }} .bold {{ font-weight: bold }} .italic {{ font-style: italic }}"
        head = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">', f"<style>{style}</style>"]
        lines_of_file = [*head, '<rect width="100%" height="100%" fill="#ffffff"/>', *shapes, "</svg>", ""]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("\n".join(lines_of_file), encoding="utf-8")

    def _legend(self) -> tuple[list[tuple[int, str]], str]:
        """Fraction of the tokens at each depth, and the mean; depth 0 (the core was skipped) only if it occurs."""
        shown = range(0 if 0 in self.depths else 1, self.num_recursions + 1)
        count = max(len(self.depths), 1)
        fractions = [(depth, f"{list(self.depths).count(depth) / count:.0%}") for depth in shown]
        return fractions, f"mean depth {sum(self.depths) / count:.2f} over {len(self.depths)} tokens"

    def _sections(self, columns: int) -> Iterator[tuple[str, list[list[Cell]]]]:
        """Heading and lines of the prompt, then of the continuation; without a prompt, all lines and no heading."""
        cells = lay_out(self.tokens, self.depths, columns, self.prompt_length)
        # A line on which the prompt ends and the continuation begins is shown twice, once for each of its halves.
        for in_prompt, section in groupby(cells, key=lambda cell: cell.in_prompt):
            heading = "prompt" if in_prompt else "continuation"
            lines = [list(line) for _, line in groupby(section, key=lambda cell: cell.line)]
            yield heading if self.prompt_length else "", lines


def lay_out(tokens: Sequence[str], depths: Sequence[int], columns: int, prompt_length: int = 0) -> list[Cell]:
    """Place tokens on lines of at most `columns`; a newline is shown and ends its line.

    A token that doesn't fit on the rest of its line moves to the next one; one longer than a whole line is cut.
    """
    cells: list[Cell] = []
    line = column = 0
    for number, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
        for chunk in token.splitlines(keepends=True) or [_PART_OF_CHARACTER]:
            shown = _visible(chunk)
            # Break lines between tokens, not inside one, unless it is longer than a line.
            if column and column + cell_len(shown) > columns:
                line, column = line + 1, 0
            for fitting in chop_cells(shown, columns):
                if column + cell_len(fitting) > columns:
                    line, column = line + 1, 0
                cells.append(Cell(line, column, fitting, depth, number < prompt_length))
                column += cell_len(fitting)
            if chunk.splitlines()[0] != chunk:
                line, column = line + 1, 0
    return cells


def palette(num_recursions: int) -> list[str]:
    """Colours `#rrggbb` of depths 0 to num_recursions: grey for a token that skips the core, then light to dark."""
    # Interpolated like matplotlib's colour map of the same name.
    low, high = (end * (len(_SCALE) - 1) for end in _SCALE_RANGE)
    colours = [_SKIPPED_COLOUR]
    for depth in range(num_recursions):
        lower, weight = divmod(low + (high - low) * depth / max(num_recursions - 1, 1), 1)
        ends = zip(*(bytes.fromhex(_SCALE[int(lower) + side]) for side in (0, 1)), strict=True)
        colours.append("#" + bytes(round(a + weight * (b - a)) for a, b in ends).hex())
    return colours


def _visible(text: str) -> str:
    """Replace whitespace and control characters by symbols, each line break by one arrow."""
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


def _ink(background: str) -> str:
    """Black or white, whichever contrasts more with `background` (WCAG 2 relative luminance)."""
    channels = [int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _label(line: float, column: int, text: str, style: str = "", colour: str = "#222222") -> list[str]:
    """SVG text; `textLength` keeps it in its columns whatever font the viewer has."""
    if not text.strip():
        return []
    x, y, width = _MARGIN + column * _COLUMN, _MARGIN + (line + 0.68) * _LINE, cell_len(text) * _COLUMN
    shown = escape(text).replace(" ", "\u00a0")
    return [f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" fill="{colour}" textLength="{width:.1f}">{shown}</text>']


def _box(line: float, column: int, text: str, colour: str) -> list[str]:
    """SVG text on a coloured background, slightly smaller than its columns to set neighbours apart."""
    x, y, width = _MARGIN + column * _COLUMN + 0.4, _MARGIN + line * _LINE + 2, cell_len(text) * _COLUMN - 0.8
    box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_LINE - 4}" rx="2" fill="{colour}"/>'
    return [box, *_label(line, column, text, colour=_ink(colour))]
