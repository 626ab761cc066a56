"""Prefix cache: prompts that begin with the same tokens share the keys and values of those tokens.

This is exact because routing is causal: the depth of a token and its keys at every recursion depend only on the tokens
before it. The unit is a block of `page_size` tokens. In the table of a deeper recursion a block may end in the middle
of a page, because tokens that stopped earlier have no entry there.

Blocks form a trie. A block is identified by its parent, its tokens and their depths, never by a hash alone, so two
different prefixes cannot be confused. The depths belong to it although they follow from the tokens: sequences that read
the same prefix in different batches may decide a router's near tie differently. Then their tables have different
lengths, and what one stores after the tie can't be found through the pages of the other. The least recently used leaf
is dropped when pages are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megamor.serve.engine.pages import PageBook, PageTable

# Number of the parent block, the block's tokens and their depths. The first block of a prompt has -max_depth as its
# parent: prompts read under different depth bounds have different keys and values and must not be shared.
Key = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass
class PrefixBlock:
    """A block of tokens that follows its parent's.

    `lengths` are the lengths of all tables after the block. `pages` are the pages of each table that contain its
    entries, of which `first` is the index in the table. The first of them may also contain the parent's last entries.
    """

    number: int
    key: Key
    parent: PrefixBlock | None
    lengths: tuple[int, ...]
    first: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    num_children: int = 0
    dropped: bool = False

    @property
    def depths(self) -> tuple[int, ...]:
        """The recursions that each token took."""
        return self.key[2]


@dataclass(frozen=True)
class PageCopy:
    """Copy the contents of page `source` to page `target` of a pool before anything is written to it."""

    pool: str
    source: int
    target: int


class PrefixCache:
    """The trie of blocks. It holds a reference to every page of every block in `book`."""

    def __init__(self, book: PageBook) -> None:
        self.book = book
        self.blocks: dict[Key, PrefixBlock] = {}
        # By parent and tokens: the blocks that differ in depths alone, oldest first.
        self.variants: dict[tuple[int, tuple[int, ...]], list[PrefixBlock]] = {}
        # Blocks without children by number, least recently used first (a dict keeps its insertion order).
        self.leaves: dict[int, PrefixBlock] = {}
        self.next_number = 0

    def find(self, tokens: Sequence[int], max_depth: int, depths: Sequence[int] = ()) -> list[PrefixBlock]:
        """A chain of cached blocks at the start of `tokens` that leaves at least one token to read.

        Its tokens took the `depths` of those that are known: a preempted sequence must not continue from other depths
        than its later tokens have seen.
        """
        # The last token must be read: the logits at its position predict the first new token.
        size, chain = self.book.page_size, list[PrefixBlock]()
        for start in range(0, len(tokens) - size, size):
            parent = chain[-1].number if chain else -max_depth
            known = tuple(depths[start : start + size])
            variants = self.variants.get((parent, tuple(tokens[start : start + size])), ())
            # The oldest, so that of several variants one stays in use and the others can be dropped.
            block = next((block for block in variants if block.depths[: len(known)] == known), None)
            if block is None:
                break
            chain.append(block)
        if chain and chain[-1].number in self.leaves:
            self.leaves[chain[-1].number] = self.leaves.pop(chain[-1].number)
        return chain

    def adopt(self, chain: Sequence[PrefixBlock], tables: Sequence[PageTable]) -> list[tuple[str, int, PageTable]]:
        """Fill the empty `tables` with the full pages of `chain`.

        Returns pool, page and table where the chain ends inside a page, with a reference to it. Two sequences that
        continue the same prefix both write after its last entry: on a shared page they would overwrite each other's
        keys. So each needs a copy, and `tables` lack the page for it.
        """
        partial = []
        for index, (spec, table) in enumerate(zip(self.book.specs, tables, strict=True)):
            for block in chain:
                # If its parent ended inside a page, the sequence that wrote this block had its own copy of that page.
                # The copy has the parent's entries too, so it replaces the parent's page.
                table.pages[block.first[index] :] = block.pages[index]
            table.length = chain[-1].lengths[index] if chain else 0
            del table.pages[self.book.pages_for(table.length) :]
            self.book.pools[spec.pool].share(table.pages)
            if table.length % self.book.page_size:
                partial.append((spec.pool, table.pages.pop(), table))
        return partial

    def insert(
        self,
        parent: PrefixBlock | None,
        tokens: Sequence[int],
        depths: Sequence[int],
        max_depth: int,
        tables: list[PageTable],
    ) -> PrefixBlock:
        """The block of `tokens` with `depths` after `parent`; a new one takes references to its pages in `tables`."""
        key = (-max_depth if parent is None else parent.number, tuple(tokens), tuple(depths))
        if key in self.blocks:
            return self.blocks[key]
        before = parent.lengths if parent else (0,) * len(tables)
        lengths, first, pages = [], [], []
        for spec, table, start in zip(self.book.specs, tables, before, strict=True):
            end = start + sum(spec.holds(depth) for depth in depths)
            first.append(start // self.book.page_size)
            pages.append(tuple(table.pages[first[-1] : self.book.pages_for(end)]))
            lengths.append(end)
            self.book.pools[spec.pool].share(pages[-1])
        self.next_number += 1
        block = PrefixBlock(self.next_number, key, parent, tuple(lengths), tuple(first), tuple(pages))
        self.blocks[key] = self.leaves[block.number] = block
        self.variants.setdefault(key[:2], []).append(block)
        if parent is not None:
            parent.num_children += 1
            self.leaves.pop(parent.number, None)
        return block

    def drop_oldest(self) -> bool:
        """Forget the least recently used leaf; False if there is none."""
        if not self.leaves:
            return False
        # Leaves only: dropping a block with children would make them unreachable while they hold their pages.
        block = self.leaves.pop(next(iter(self.leaves)))
        block.dropped = True
        del self.blocks[block.key]
        self.variants[block.key[:2]].remove(block)
        if not self.variants[block.key[:2]]:
            del self.variants[block.key[:2]]
        for spec, pages in zip(self.book.specs, block.pages, strict=True):
            self.book.pools[spec.pool].release(pages)
        if block.parent is not None:
            block.parent.num_children -= 1
            if block.parent.num_children == 0:
                self.leaves[block.parent.number] = block.parent
        return True
