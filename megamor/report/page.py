"""One self-contained HTML page: prose, tables and figures; no scripts, no network, light and dark, paper and phone."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from megamor.files import replace_file
from megamor.report.figures import variables

CSS = """
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 80rem;
  margin: 0 auto; padding: 1.2rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .4rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem;
  border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p, ul { max-width: 46rem; margin: .5rem 0; } ul { padding-left: 1.2rem; }
.note, figcaption, caption { color: var(--soft); font-size: .88rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem;
  align-items: start; }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; max-width: 34rem; height: auto; display: block; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .8rem 0; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; overflow-wrap: break-word;
  padding: .28rem .7rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } thead th { vertical-align: bottom; } .n { text-align: right; }
code, pre { font: .86rem/1.45 ui-monospace, monospace; white-space: pre-wrap; } summary { cursor: pointer; }
@media screen and (max-width: 640px) {
  table, tbody, tr, td, th, caption { display: block; } thead { display: none; }
  tr { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .7rem; margin: .5rem 0; }
  td, th { border: 0; padding: .1rem 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; text-align: right; }
  td::before { content: attr(data-label); color: var(--soft); text-align: left; }
}
@media print { body { font-size: 10.5pt; max-width: none; padding: 0; } .figures { grid-template-columns: 1fr 1fr; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; } table, .note, figcaption, caption { font-size: 8pt; } @page { margin: 14mm; } }
"""


class Page:
    """Content is added from top to bottom. Text is escaped, except for that of `raw` and for figures."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]
        if subtitle:
            self.note(subtitle)

    def section(self, heading: str) -> None:
        """Start a section."""
        self.parts.append(f"<h2>{html.escape(heading)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add a paragraph in small print."""
        self.parts.append(f'<p class="note">{html.escape(text)}</p>')

    def sentences(self, sentences: Sequence[str]) -> None:
        """Add a list of statements."""
        if sentences:
            self.parts.append("<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in sentences) + "</ul>")

    def code(self, text: str) -> None:
        """Add a block of code, such as the command that made the results."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def raw(self, markup: str) -> None:
        """Add HTML as it is."""
        self.parts.append(markup)

    def figures(self, figures: Sequence[str], captions: Sequence[str] = ()) -> None:
        """Add SVG figures beside each other, as many as fit, with a caption below each where there is one."""
        texts = [*captions, *[""] * len(figures)]
        shown = (
            f"<figure>{svg}" + (f"<figcaption>{html.escape(text)}</figcaption>" if text else "") + "</figure>"
            for svg, text in zip(figures, texts, strict=False)
        )
        if figures:
            self.parts.append(f'<div class="figures">{"".join(shown)}</div>')

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", fold: str = "") -> None:
        """Add a table whose first column names the rows; on a phone each row becomes a card.

        Cells that start like a number are aligned to the right. With `fold`, the table is closed behind that text.
        """
        number = [all(not row[i] or row[i][0] in "0123456789+-–." for row in rows) for i in range(len(headers))]
        kind = [' class="n"' if right else "" for right in number]
        heads = "".join(f"<th{kind[i]}>{html.escape(header)}</th>" for i, header in enumerate(headers))
        body = ""
        for row in rows:
            cells = [
                f'<td{kind[i]} data-label="{html.escape(headers[i])}">{html.escape(cell) or "–"}</td>'
                for i, cell in enumerate(row[1:], 1)
            ]
            body += f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(cells)}</tr>\n'
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        table = f'<div class="table"><table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        self.parts.append(f"<details><summary>{html.escape(fold)}</summary>{table}</details>" if fold else table)

    def render(self) -> str:
        """The page as a complete HTML document."""
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        head += f'<meta name="color-scheme" content="light dark"><title>{html.escape(self.title)}</title>'
        content = "\n".join(self.parts)
        head += f"<style>{variables()}{CSS}</style>"
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{content}\n</body></html>\n'

    def write(self, path: Path) -> None:
        """Write the page to a file, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, self.render())
