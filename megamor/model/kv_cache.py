"""Keys and values of earlier tokens, for decoding.

Every application of a layer has its own store, and only the tokens that take part in the application are written to it.
At recursion r a token therefore sees exactly the tokens of its sequence that reached recursion r, at their original
positions, as in a full pass; there are no gaps to mask.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megamor.config import ModelConfig
from megamor.model.attention import AttentionLayout, Chunk, Grid, visibility_mask
from megamor.model.blocks import KeysValues, KeyValue
from megamor.model.layouts import Geometry
from megamor.model.multi_scale import BEYOND, Pool, first_fine
from megamor.routing import TokenSet


@dataclass
class CacheStore:
    """Keys and values of one application, [batch, capacity, kv_heads, head_dim], each sequence filled from the front.

    `order` [batch, capacity] is each entry's position in its sequence (`BEYOND` in empty slots); `lengths` [batch] is
    the number of entries.
    """

    k: Tensor
    v: Tensor
    order: Tensor
    lengths: Tensor

    def admit(self, tokens: TokenSet, geometry: Geometry) -> Tensor:
        """Reserve slots for `tokens` after the existing entries; returns the flat slots [N]."""
        # Sequences fill at different speeds, as routing sends different numbers of their tokens here.
        device = self.order.device
        sequence = tokens.sequences(device)
        slots = sequence * self.order.shape[1] + self.lengths[sequence] + tokens.rank_of(tokens, device)
        self.order.view(-1)[slots] = geometry.order_of(tokens)
        self.lengths += torch.bincount(sequence, minlength=tokens.batch)
        return slots

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

    `num_tokens` is how many each sequence has processed. Pass the cache to `Transformer.forward` with the new tokens
    only. `tokens` [batch, num_tokens] are their ids, kept for routers that read the text, and `memory` is what routers
    remember of each sequence.
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

    def store(self, key: Hashable) -> CacheStore:
        """The store of an application, created on first use."""
        if key not in self.stores:
            shape = (self.batch, self.capacity, self.config.num_kv_heads, self.config.head_dim)
            # Empty slots are after every query, so the mask hides them without looking at `lengths`.
            order = torch.full(shape[:2], BEYOND, dtype=torch.int64, device=self.device)
            lengths = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
            k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            self.stores[key] = CacheStore(k, v, order, lengths)
        return self.stores[key]

    def view(
        self, key: Hashable, queries: TokenSet, geometry: Geometry, added: tuple[KeysValues, TokenSet] | None
    ) -> tuple[KeysValues, AttentionLayout]:
        """`queries` attend to the store of `key`, after `added` (from these tokens) has been added to it."""
        store = self.store(key)
        # Slots are reserved before the layout is made, so that the new keys are in the mask; they are written when the
        # block has projected them.
        write = None if added is None else (added[0], store.admit(added[1], geometry))
        # No sequence can have more entries than tokens, so the rest of the store need not be looked at.
        length = self.num_tokens + geometry.everything.max_length
        grid, order = Grid.of(queries), store.order[:, :length]
        last, block = grid.pad(geometry.order_of(queries), -1), self.config.attention_block
        if self.config.attention == "full":
            chunk = Chunk(((0, length),), visibility_mask(last, order, dtype=geometry.dtype))
            return CachedKeysValues(store, length, write), AttentionLayout(grid, None, (chunk,))
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
        return CachedKeysValues(store, length, write), AttentionLayout(grid, None, (chunk,), pool=pool)
