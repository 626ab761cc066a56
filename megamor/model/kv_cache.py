"""Keys and values of earlier tokens, for decoding.

Every application of a layer has its own store, and only the tokens that take part in the application are written to it.
At recursion r a token therefore sees exactly the tokens of its sequence that reached recursion r, at their original
positions, as in a full pass; there are no gaps to mask. A `CacheBound` limits what each store holds: older tokens then
drop out of it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.config import ModelConfig
from megamor.errors import ConfigError
from megamor.model.attention import AttentionLayout, Chunk, Grid, visibility_mask
from megamor.model.blocks import KeysValues, KeyValue
from megamor.model.layouts import Geometry
from megamor.model.multi_scale import BEYOND, Pool, first_fine
from megamor.routing import TokenSet
from megamor.routing.plan import to_device

Keep = Literal["score", "depth", "recent"]
STORED = ("k", "v", "order", "lengths", "score")


@dataclass(frozen=True)
class CacheBound:
    """Most entries that a store holds of a sequence, and which give way to new ones.

    The first `sinks` and the newest `recent` entries stay (by default half of the budget is for the newest). Of the
    others, those stay that have received the most attention since they were stored, summed over heads and queries
    (`score`, arXiv 2306.14048), whose tokens took the most recursions (`depth`), or that are newest (`recent`, arXiv
    2309.17453).

    Raises:
        ConfigError: the budget is too small.
    """

    budget: int
    keep: Keep = "score"
    sinks: int = 4
    recent: int | None = None

    def __post_init__(self) -> None:
        if min(self.sinks, self.newest, self.budget - self.sinks - self.newest - 1) < 0:
            raise ConfigError(
                f"a KV budget of {self.budget} with {self.sinks} sinks (--kv-sinks) and {self.newest} recent entries "
                "(--kv-recent): neither may be negative, and the budget must leave room for at least one other entry"
            )

    @property
    def newest(self) -> int:
        """Newest entries that always stay."""
        return self.budget // 2 if self.recent is None else self.recent

    @property
    def chunk(self) -> int:
        """Tokens to read at a time: few, as they need room in the budget before it is known which entries matter."""
        return max(1, min(16, (self.budget - self.sinks - self.newest) // 4))


@dataclass
class CacheStore:
    """Keys and values of one application, [batch, capacity, kv_heads, head_dim], each sequence filled from the front.

    `order` [batch, capacity] is each entry's position in its sequence (`BEYOND` in empty slots); `lengths` [batch] is
    the number of entries. `score` [batch, capacity] is the attention that each has received, if that is recorded.
    """

    k: Tensor
    v: Tensor
    order: Tensor
    lengths: Tensor
    score: Tensor | None = None

    def admit(self, tokens: TokenSet, geometry: Geometry) -> Tensor:
        """Reserve slots for `tokens` after the existing entries; returns the flat slots [N]."""
        # Sequences fill at different speeds, as routing sends different numbers of their tokens here.
        device = self.order.device
        sequence = tokens.sequences(device)
        slots = sequence * self.order.shape[1] + self.lengths[sequence] + tokens.rank_of(tokens, device)
        self.order.view(-1)[slots] = geometry.order_of(tokens)
        self.lengths += torch.bincount(sequence, minlength=tokens.batch)
        return slots

    def evict(self, bound: CacheBound, incoming: Tensor, depths: Tensor | None) -> None:
        """Make room for `incoming` [batch] entries; `depths` [batch, tokens] are those of the tokens so far."""
        slots, lengths = torch.arange(self.order.shape[1], device=self.order.device), self.lengths.unsqueeze(1)
        worth = torch.zeros(self.order.shape, device=self.order.device)
        if bound.keep == "score" and self.score is not None:
            worth = self.score
        elif bound.keep == "depth" and depths is not None:
            worth = depths.gather(1, self.order.clamp_max(depths.shape[1] - 1)).float()
        worth = worth.masked_fill((slots < bound.sinks) | (slots >= lengths - bound.newest), torch.inf)
        worth = worth.masked_fill(slots >= lengths, -torch.inf)
        # The newest first, so that they win among equals.
        ranked = slots.flip(0)[worth.flip(1).argsort(dim=1, descending=True, stable=True)]
        stays = torch.zeros_like(worth, dtype=torch.bool)
        stays.scatter_(1, ranked, slots < (bound.budget - incoming).unsqueeze(1)).logical_and_(slots < lengths)
        self.lengths = stays.sum(1)
        kept, empty = (~stays).to(torch.int8).argsort(dim=1, stable=True), slots >= self.lengths.unsqueeze(1)
        self.k, self.v = (x.take_along_dim(kept[..., None, None], 1) for x in (self.k, self.v))
        self.order = self.order.take_along_dim(kept, 1).masked_fill(empty, BEYOND)
        if self.score is not None:
            self.score = self.score.take_along_dim(kept, 1).masked_fill(empty, 0.0)

    def write(self, slots: Tensor, keys_values: KeyValue) -> None:
        """Fill `slots` [N] with keys and values [N, kv_heads, head_dim]."""
        for store, new in zip((self.k, self.v), keys_values, strict=True):
            store.view(-1, *store.shape[2:])[slots] = new.to(store.dtype)


class CachedKeysValues(KeysValues):
    """The first `length` slots of a store, after what `write` resolves to has been written to its slots [N].

    Without `write` the store is read as an earlier application filled it.
    """

    def __init__(self, store: CacheStore, length: int, write: tuple[KeysValues, Tensor] | None) -> None:
        self.store, self.length, self.write = store, length, write
        self.needs_fresh = write is not None and write[0].needs_fresh

    def merge(self, fresh: KeyValue | None) -> KeyValue | None:
        return fresh if self.write is None else self.write[0].merge(fresh)

    def resolve(self, merged: KeyValue | None) -> KeyValue:
        """Keys and values [batch, length, kv_heads, head_dim], old and new."""
        if self.write is not None:
            source, slots = self.write
            self.store.write(slots, source.resolve(merged))
        return self.store.k[:, : self.length], self.store.v[:, : self.length]


@dataclass
class KVCache:
    """The stores of a model for `batch` sequences of up to `capacity` tokens, which advance together.

    `num_tokens` is how many each sequence has processed, of which `padding` [batch] were none (None: all were tokens).
    Pass the cache to `Transformer.forward` with the new tokens only. `tokens` [batch, num_tokens] are their ids, kept
    for routers that read the text, and `memory` is what routers remember of each sequence. With a `bound`, stores have
    room for its budget only, and at most `chunk` tokens may be passed at once; `depths` are those of the tokens so far.
    """

    config: ModelConfig
    batch: int
    capacity: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    num_tokens: int = 0
    stores: dict[Hashable, CacheStore] = field(default_factory=dict)
    tokens: Tensor | None = None
    memory: dict[nn.Module, Tensor] = field(default_factory=dict)
    bound: CacheBound | None = None
    depths: Tensor | None = None
    padding: Tensor | None = None

    @property
    def chunk(self) -> int:
        """Most tokens of each sequence to pass at once."""
        return self.capacity if self.bound is None else self.bound.chunk

    def store(self, key: Hashable) -> CacheStore:
        """The store of an application, created on first use."""
        if key not in self.stores:
            room = self.capacity if self.bound is None else min(self.capacity, self.bound.budget)
            shape = (self.batch, room, self.config.num_kv_heads, self.config.head_dim)
            # Empty slots are after every query, so the mask hides them without looking at `lengths`.
            order = torch.full(shape[:2], BEYOND, dtype=torch.int64, device=self.device)
            lengths = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
            k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            records = self.bound is not None and self.bound.keep == "score"
            score = torch.zeros(shape[:2], device=self.device) if records else None
            self.stores[key] = CacheStore(k, v, order, lengths, score)
        return self.stores[key]

    def admit(self, store: CacheStore, tokens: TokenSet, geometry: Geometry) -> Tensor:
        """`CacheStore.admit`, after the bound has made room."""
        new = geometry.everything.max_length
        # Known to the host: no store has more entries than there are tokens.
        if self.bound is not None and self.num_tokens + new > self.bound.budget:
            assert new <= self.chunk, "more tokens at once than the bound has room for"
            incoming = torch.bincount(tokens.sequences(store.order.device), minlength=self.batch)
            store.evict(self.bound, incoming, self.depths)
        return store.admit(tokens, geometry)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens of each sequence; for caches without a bound."""
        self.capacity, more = capacity, capacity - self.capacity
        for store in self.stores.values():
            store.k, store.v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (store.k, store.v))
            # Not `F.pad`, which takes its value as a float: the largest integer would become negative.
            store.order = torch.cat((store.order, store.order.new_full((self.batch, more), BEYOND)), 1)

    def begin(self, length: int, lengths: tuple[int, ...] | None) -> int | Tensor:
        """Tokens of each sequence so far. Of the next `length`, only the last `lengths[b]` of sequence b are real."""
        start = self.num_tokens if self.padding is None else self.num_tokens - self.padding
        if lengths is not None:
            assert self.bound is None, "a bounded cache takes no padding"
            added = length - to_device(lengths, torch.device(self.device))
            self.padding = added if self.padding is None else self.padding + added
        return start

    def advance(self, depth: Tensor | None, length: int) -> None:
        """Count `length` more tokens of each sequence, which took `depth` [batch, length] recursions."""
        self.num_tokens += length
        if depth is not None and self.bound is not None:
            self.depths = depth if self.depths is None else torch.cat((self.depths, depth), 1)

    def select(self, rows: Tensor) -> None:
        """Continue with the sequences `rows` [n] instead; a sequence may be taken several times."""
        self.batch = len(rows)
        self.memory = {router: value.index_select(0, rows) for router, value in self.memory.items()}
        for holder, names in ((self, ("tokens", "depths", "padding")), *((s, STORED) for s in self.stores.values())):
            for name in names:
                if (value := getattr(holder, name)) is not None:
                    setattr(holder, name, value.index_select(0, rows))

    def bytes_held(self) -> Tensor:
        """Bytes of the keys and values stored for each sequence, [batch]."""
        entry = 2 * self.config.num_kv_heads * self.config.head_dim * self.dtype.itemsize
        return entry * torch.stack([store.lengths for store in self.stores.values()]).sum(0)

    def view(
        self, key: Hashable, queries: TokenSet, geometry: Geometry, added: tuple[KeysValues, TokenSet] | None
    ) -> tuple[KeysValues, AttentionLayout]:
        """`queries` attend to the store of `key`, after `added` (from these tokens) has been added to it."""
        store = self.store(key)
        # Slots are reserved before the layout is made, so that the new keys are in the mask; they are written when the
        # block has projected them.
        write = None if added is None else (added[0], self.admit(store, added[1], geometry))
        # No sequence can have more entries than tokens, so the rest of the store need not be looked at.
        length = min(self.num_tokens + geometry.everything.max_length, store.order.shape[1])
        grid, order = Grid.of(queries), store.order[:, :length]
        last, block = grid.pad(geometry.order_of(queries), -1), self.config.attention_block
        score = None if store.score is None else store.score[:, :length]
        if self.config.attention == "full":
            first = None if geometry.reach is None else last - geometry.reach
            chunk = Chunk(((0, length),), visibility_mask(last, order, first, geometry.dtype))
            return CachedKeysValues(store, length, write), AttentionLayout(grid, None, (chunk,), score=score)
        # The means are taken anew from the entries: reading them is what a step of full attention costs too.
        count = (self.num_tokens + geometry.everything.max_length) // block
        sequence = torch.arange(self.batch, device=order.device).unsqueeze(1) * (count + 1) * block
        pool = Pool.of((sequence + order.clamp_max(count * block)).flatten(), self.batch, count, block)
        ends = torch.arange(1, count + 1, device=order.device).unsqueeze(0) * block - 1
        fine = first_fine(last, self.config)
        masks = (
            pool.mask(torch.zeros_like(fine), fine - 1, ends.expand(self.batch, -1), geometry.dtype),
            visibility_mask(last, order, fine, geometry.dtype),
        )
        chunk = Chunk(((0, count + length),), torch.cat(masks, dim=-1))
        return CachedKeysValues(store, length, write), AttentionLayout(grid, None, (chunk,), None, pool, score)
