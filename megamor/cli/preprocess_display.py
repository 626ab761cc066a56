"""What megamor preprocess shows: how far it is, and what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megamor.corpus.preprocess import Totals
from megamor.corpus.text import Share
from megamor.metrics.byte_progress import LINE_SECONDS


def tell(message: str) -> None:
    """A line for people, beside the result."""
    print(message, file=sys.stderr, flush=True)


class Way:
    """How far a run is through its share of an input of `size` units, 0 if that is unknown."""

    def __init__(self, size: int, share: Share) -> None:
        self._begin, self._length = size * share.index / share.count, size / share.count

    def done(self, position: int) -> float:
        """0 to 1; always 0 if the size is unknown."""
        return min(max((position - self._begin) / self._length, 0.0), 1.0) if self._length else 0.0

    def describe(self, totals: Totals) -> str:
        """Text, tokens, speed, and the time that is left."""
        done, before = self.done(totals.position), self.done(totals.resumed_position)
        seconds = time.monotonic() - totals.started
        if done <= before:
            return totals.speed()
        left = int(seconds * (1 - done) / (done - before))
        return f"{totals.speed()}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


class PlainProgress:
    """A line now and then, where the output is not a terminal."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._next = time.monotonic() + LINE_SECONDS

    def update(self, totals: Totals) -> None:
        """Report if it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            tell(f"{self._way.done(totals.position):6.1%}  {self._way.describe(totals)}")


class TerminalProgress:
    """A bar, drawn from `update`."""

    def __init__(self, way: Way, bar: Progress) -> None:
        self._way = way
        self._bar = bar
        self._task = bar.add_task("", total=1.0, speed="")
        self._next = 0.0

    def update(self, totals: Totals) -> None:
        """Draw, ten times a second at most."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            self._bar.update(
                self._task, completed=self._way.done(totals.position), speed=self._way.describe(totals), refresh=True
            )


@contextmanager
def progress_display(size: int, share: Share) -> Iterator[PlainProgress | TerminalProgress]:
    """The display that suits stderr, for `share` of an input of `size` units."""
    console, way = Console(stderr=True), Way(size, share)
    if not console.is_terminal:
        yield PlainProgress(way)
        return
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        yield TerminalProgress(way, bar)


def print_summary(totals: Totals) -> None:
    """What was written, and what was left out."""
    for split, prefix in enumerate(totals.prefixes):
        documents = sum(count for (of, _), count in totals.documents.items() if of == split)
        tokens = sum(count for (of, _), count in totals.tokens.items() if of == split)
        print(f"{prefix}: {documents:,} documents, {tokens:,} tokens")
    print(totals.speed())
    left_out = {
        "documents without text": totals.empty,
        "blank lines": totals.blank,
        "documents below --min-length": totals.short,
        "documents of --holdout": totals.held_out,
        "duplicates": totals.duplicates,
    }
    if any(left_out.values()):
        print("left out: " + ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count))
    if totals.bad:
        print(f"skipped: {totals.bad:,} bad lines" + (", among them" if totals.bad > len(totals.bad_shown) else ""))
        for message in totals.bad_shown:
            print(f"  {message}")
