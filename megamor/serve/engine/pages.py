"""Pages of keys and values, as integers: pools, tables, and who holds what.

A page has room for `page_size` tokens in all layers of its pool. There are two pools: `edge` for the unshared layers
before and after the core, which see every token, and `core` for the shared ones. A sequence has one table for the edge
and one for each depth at which the core's keys are kept, a "virtual sequence" of the tokens that got there: what is
missing was never there, and places in a table say nothing about positions in the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

EVERY_TOKEN = -1
"""In `TableSpec.recursion`: the table of the edge."""


@dataclass(frozen=True)
class TableSpec:
    """A table of each sequence: its pages come from `pool`; it lists the tokens that take `recursion` (0-based)."""

    pool: str
    recursion: int

    def lists(self, depth: int) -> bool:
        """Whether a token that takes `depth` recursions has an entry."""
        return depth > self.recursion


@dataclass
class PageTable:
    """Entries 0 to `length` of a virtual sequence: entry i is at place i % page_size of page pages[i // page_size].

    Pages beyond the length are reserved for tokens under way.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagePool:
    """Free pages and how many hold each of the others."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages - 1, -1, -1))
        self.holders = [0] * num_pages

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one holder from now on."""
        assert count <= len(self.free), "reserve before you take"
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each page."""
        for page in pages:
            assert self.holders[page] > 0, "a free page can't be shared"
            self.holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each page; those that nobody holds are free again."""
        for page in pages:
            assert self.holders[page] > 0, "released more often than held"
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free.append(page)


class PageBook:
    """All pools, and the arithmetic of tables."""

    def __init__(self, page_size: int, specs: Sequence[TableSpec], num_pages: Mapping[str, int]) -> None:
        self.page_size = page_size
        self.specs = tuple(specs)
        self.pools = {name: PagePool(count) for name, count in num_pages.items()}
        self.num_pages = dict(num_pages)

    def pages_for(self, length: int) -> int:
        """Pages that hold `length` entries."""
        return -(-length // self.page_size)

    def worst_case(self, num_tokens: int, max_depth: int) -> dict[str, int]:
        """Pages of each pool for a whole sequence whose tokens all take `max_depth` recursions."""
        return self.missing([PageTable() for _ in self.specs], num_tokens, max_depth)

    def missing(self, tables: Sequence[PageTable], num_tokens: int, max_depth: int) -> dict[str, int]:
        """Pages of each pool that `tables` lack for `num_tokens` more, all of which may take `max_depth` recursions."""
        needed = dict.fromkeys(self.pools, 0)
        for spec, table in zip(self.specs, tables, strict=True):
            count = self.pages_for(table.length + num_tokens) - len(table.pages)
            if count > 0 and spec.lists(max_depth):
                needed[spec.pool] += count
        return needed

    def reserve(self, tables: Sequence[PageTable], num_tokens: int, max_depth: int) -> None:
        """Take what is missing, which must be free."""
        for spec, table in zip(self.specs, tables, strict=True):
            count = self.pages_for(table.length + num_tokens) - len(table.pages)
            if count > 0 and spec.lists(max_depth):
                table.pages += self.pools[spec.pool].take(count)

    def trim(self, tables: Sequence[PageTable]) -> None:
        """Give back pages that are reserved beyond the length."""
        for spec, table in zip(self.specs, tables, strict=True):
            kept = self.pages_for(table.length)
            if kept < len(table.pages):
                self.pools[spec.pool].release(table.pages[kept:])
                del table.pages[kept:]

    def release(self, tables: Sequence[PageTable]) -> None:
        """Give back everything; the tables are empty afterwards."""
        for table in tables:
            table.length = 0
        self.trim(tables)
