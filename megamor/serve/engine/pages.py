"""Pages of the KV cache, as integers: pools, page tables and reference counts.

A page stores the keys and values of `page_size` tokens for all layers of its pool. There are two pools: `edge` for the
unshared layers before and after the core, which see every token, and `core` for the shared layers. A sequence has one
table for the edge and one for each recursion whose keys are kept. Such a table is a "virtual sequence" of only those
tokens that reached the recursion: a token that stopped earlier has no entry, so an entry's index says nothing about the
token's position in the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# In `TableSpec.recursion`: the table of the edge, which has an entry for every token.
EVERY_TOKEN = -1


@dataclass(frozen=True)
class TableSpec:
    """One of the tables of each sequence: its pages come from `pool`, its tokens are those that take `recursion`."""

    pool: str
    recursion: int

    def holds(self, depth: int) -> bool:
        """Whether a token that takes `depth` recursions in all has an entry. Recursions count from 0."""
        return depth > self.recursion


@dataclass(slots=True)
class PageTable:
    """Where a virtual sequence is stored: entry i is at offset i % page_size of page pages[i // page_size].

    The first `length` entries are complete. Pages beyond them are reserved for tokens in flight.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagePool:
    """The free pages of a pool, and how many tables and cached prefixes refer to each of the others."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages - 1, -1, -1))
        self.ref_counts = [0] * num_pages

    def take(self, count: int) -> list[int]:
        """Remove `count` pages from the free list, each with one reference."""
        assert count <= len(self.free), "reserve before you take"
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.ref_counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each page."""
        for page in pages:
            assert self.ref_counts[page] > 0, "a free page can't be shared"
            self.ref_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; a page without references is free again."""
        for page in pages:
            assert self.ref_counts[page] > 0, "released more often than taken"
            self.ref_counts[page] -= 1
            if self.ref_counts[page] == 0:
                self.free.append(page)


class PageBook:
    """All pools, and the arithmetic of the tables that draw on them."""

    def __init__(self, page_size: int, specs: Sequence[TableSpec], num_pages: Mapping[str, int]) -> None:
        self.page_size = page_size
        self.specs = tuple(specs)
        self.pools = {name: PagePool(count) for name, count in num_pages.items()}
        self.num_pages = dict(num_pages)

    def pages_for(self, length: int) -> int:
        """Pages that `length` entries need."""
        return -(-length // self.page_size)

    def worst_case(self, num_tokens: int, max_depth: int) -> dict[str, int]:
        """Pages of each pool for a sequence of `num_tokens` that all take `max_depth` recursions."""
        return self.missing([PageTable() for _ in self.specs], num_tokens, max_depth)

    def missing(self, tables: Sequence[PageTable], num_tokens: int, max_depth: int) -> dict[str, int]:
        """Pages of each pool that `tables` lack for `num_tokens` more tokens, if all took `max_depth` recursions."""
        needed = dict.fromkeys(self.pools, 0)
        for number, count in self._shortages(tables, num_tokens, max_depth):
            needed[self.specs[number].pool] += count
        return needed

    def reserve(self, tables: Sequence[PageTable], num_tokens: int, max_depth: int) -> list[tuple[int, int]]:
        """Take the missing pages, which must be free; returns which tables grew and their numbers of pages before."""
        grown = []
        for number, count in self._shortages(tables, num_tokens, max_depth):
            grown.append((number, len(tables[number].pages)))
            tables[number].pages += self.pools[self.specs[number].pool].take(count)
        return grown

    def _shortages(self, tables: Sequence[PageTable], num_tokens: int, max_depth: int) -> Iterator[tuple[int, int]]:
        for number, (spec, table) in enumerate(zip(self.specs, tables, strict=True)):
            # Every token might take every recursion. The router decides only when the chunk is in flight, which is too
            # late to find that a page is missing.
            count = self.pages_for(table.length + num_tokens) - len(table.pages)
            if count > 0 and spec.holds(max_depth):
                yield number, count

    def trim(self, tables: Sequence[PageTable]) -> None:
        """Give back the reserved pages that turned out not to be needed."""
        # At once, rather than keeping them for the next chunk: others may be waiting for pages.
        size = self.page_size
        for spec, table in zip(self.specs, tables, strict=True):
            if len(table.pages) * size >= table.length + size:  # rarely
                kept = self.pages_for(table.length)
                self.pools[spec.pool].release(table.pages[kept:])
                del table.pages[kept:]

    def release(self, tables: Sequence[PageTable]) -> None:
        """Give back everything; the tables are empty afterwards."""
        for table in tables:
            table.length = 0
        self.trim(tables)
