"""Prefix cache: keys and values of prompts that begin alike are computed once.

Routing is causal, so a token's depth and its keys at every depth depend on the tokens before it alone, and sharing them
is exact. The unit is a block of `page_size` tokens. In the table of a depth a block may end anywhere in a page: whole
pages are shared, the last partial one is copied, because whoever goes on from here writes behind its entries.

Blocks form a trie; a node is found by its parent and its very tokens, so that there are no collisions. Every node holds
the pages in which its entries lie. Nodes that nothing else needs are dropped when pages are wanted, the one that was
used longest ago first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megamor.serve.engine.pages import PageBook, PageTable

Key = tuple[int, tuple[int, ...]]


@dataclass
class Node:
    """A block of tokens after those of its parent, with their `depths`.

    `lengths` are those of all tables at its end, and `pages` of each table hold its entries, from page `first` on.
    """

    number: int
    key: Key
    parent: Node | None
    depths: tuple[int, ...]
    lengths: tuple[int, ...]
    first: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    num_children: int = 0
    dropped: bool = False


@dataclass(frozen=True)
class Copy:
    """A page whose contents are to be copied before anything is written."""

    pool: str
    source: int
    target: int


class PrefixCache:
    """The trie. `book` owns the pages."""

    def __init__(self, book: PageBook) -> None:
        self.book = book
        self.nodes: dict[Key, Node] = {}
        self.leaves: dict[int, Node] = {}
        """Leaves by number, in the order of their last use."""
        self.next_number = 0

    def find(self, tokens: Sequence[int], max_depth: int) -> list[Node]:
        """The longest known chain of blocks at the beginning of `tokens` that leaves at least one token to read."""
        size, chain = self.book.page_size, list[Node]()
        for start in range(0, len(tokens) - size, size):
            node = self.nodes.get((chain[-1].number if chain else -max_depth, tuple(tokens[start : start + size])))
            if node is None:
                break
            chain.append(node)
        if chain and chain[-1].number in self.leaves:
            self.leaves[chain[-1].number] = self.leaves.pop(chain[-1].number)
        return chain

    def adopt(self, chain: Sequence[Node], tables: Sequence[PageTable]) -> None:
        """Make `tables`, which are empty, hold the whole pages of `chain`, and the partial ones for the time being."""
        for place, (spec, table) in enumerate(zip(self.book.specs, tables, strict=True)):
            for node in chain:
                table.pages[node.first[place] :] = node.pages[place]
            table.length = chain[-1].lengths[place]
            del table.pages[self.book.pages_for(table.length) :]
            self.book.pools[spec.pool].share(table.pages)

    def num_partial(self, tables: Sequence[PageTable]) -> dict[str, int]:
        """Pages of each pool that `detach` will take."""
        counts = dict.fromkeys(self.book.pools, 0)
        for spec, table in zip(self.book.specs, tables, strict=True):
            counts[spec.pool] += table.length % self.book.page_size > 0
        return counts

    def detach(self, tables: Sequence[PageTable]) -> list[Copy]:
        """Replace the adopted partial pages by pages of one's own; returns the copies to make, in this order."""
        copies = []
        for spec, table in zip(self.book.specs, tables, strict=True):
            if table.length % self.book.page_size:
                pool, source = self.book.pools[spec.pool], table.pages[-1]
                table.pages[-1] = pool.take(1)[0]
                pool.release([source])
                copies.append(Copy(spec.pool, source, table.pages[-1]))
        return copies

    def insert(
        self, parent: Node | None, tokens: Sequence[int], depths: Sequence[int], max_depth: int, tables: list[PageTable]
    ) -> Node:
        """The node of a block that follows `parent`, made from `tables` if it isn't known yet."""
        key = (-max_depth if parent is None else parent.number, tuple(tokens))
        if key in self.nodes:
            return self.nodes[key]
        before = parent.lengths if parent else (0,) * len(tables)
        lengths, first, pages = [], [], []
        for spec, table, start in zip(self.book.specs, tables, before, strict=True):
            end = start + sum(spec.lists(depth) for depth in depths)
            first.append(start // self.book.page_size)
            pages.append(tuple(table.pages[first[-1] : self.book.pages_for(end)]))
            lengths.append(end)
            self.book.pools[spec.pool].share(pages[-1])
        self.next_number += 1
        node = Node(self.next_number, key, parent, tuple(depths), tuple(lengths), tuple(first), tuple(pages))
        self.nodes[key] = self.leaves[node.number] = node
        if parent is not None:
            parent.num_children += 1
            self.leaves.pop(parent.number, None)
        return node

    def drop_oldest(self) -> bool:
        """Forget the leaf that was used longest ago; False if there is none."""
        if not self.leaves:
            return False
        node = self.leaves.pop(next(iter(self.leaves)))
        node.dropped = True
        del self.nodes[node.key]
        for spec, pages in zip(self.book.specs, node.pages, strict=True):
            self.book.pools[spec.pool].release(pages)
        if node.parent is not None:
            node.parent.num_children -= 1
            if node.parent.num_children == 0 and not node.parent.dropped:
                self.leaves[node.parent.number] = node.parent
        return True

    def clear(self) -> None:
        """Forget everything."""
        while self.drop_oldest():
            pass
