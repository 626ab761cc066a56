"""Keys and values of earlier tokens, for decoding.

Every application of a layer has a store of its own, into which only the tokens that take part are written: at recursion
r a token sees the tokens of its sequence that reached recursion r, at their original places. What is missing was never
there.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megamor.config import ModelConfig
from megamor.model.attention import AttentionLayout, Grid, visibility_mask
from megamor.model.blocks import KeysValues, KeyValue
from megamor.model.layouts import BEYOND, Geometry
from megamor.routing import TokenSet


@dataclass
class CacheStore:
    """Keys and values of one application: [batch, capacity, kv_heads, head_dim], filled from the front of each
    sequence.

    `order` [batch, capacity] is each entry's place in its sequence (beyond every place where empty), `lengths` [batch]
    says how many entries there are.
    """

    k: Tensor
    v: Tensor
    order: Tensor
    lengths: Tensor

    def admit(self, tokens: TokenSet, geometry: Geometry) -> Tensor:
        """Make room for `tokens` after what is there; returns their flat slots [N]."""
        rows = tokens.rows(self.order.device)
        sequence = rows // tokens.seq_len
        counts = torch.bincount(sequence, minlength=tokens.batch)
        slots = sequence * self.order.shape[1] + self.lengths[sequence] + tokens.rank_of(tokens, rows.device)
        self.order.view(-1)[slots] = geometry.order_of(tokens)
        self.lengths += counts
        return slots

    def write(self, slots: Tensor, keys_values: KeyValue) -> None:
        """Fill `slots` [N] with keys and values [N, kv_heads, head_dim]."""
        for store, new in zip((self.k, self.v), keys_values, strict=True):
            store.view(-1, *store.shape[2:])[slots] = new.to(store.dtype)


class CachedKeysValues(KeysValues):
    """What `inner` resolves to is added to a store, and the whole store is attended to."""

    def __init__(self, inner: KeysValues, store: CacheStore, slots: Tensor, length: int) -> None:
        self.inner, self.store, self.slots, self.length = inner, store, slots, length
        self.needs_fresh = inner.needs_fresh

    def resolve(self, fresh: KeyValue | None) -> KeyValue:
        """Add, then return all as [batch, length, kv_heads, head_dim]."""
        self.store.write(self.slots, self.inner.resolve(fresh))
        return self.store.k[:, : self.length], self.store.v[:, : self.length]


class ReadOnlyKeysValues(KeysValues):
    """A store that an earlier application has filled."""

    needs_fresh = False

    def __init__(self, store: CacheStore, length: int) -> None:
        self.store, self.length = store, length

    def resolve(self, fresh: KeyValue | None) -> KeyValue:
        """All of the store as [batch, length, kv_heads, head_dim]."""
        return self.store.k[:, : self.length], self.store.v[:, : self.length]


@dataclass
class KVCache:
    """The stores of a model for `batch` sequences of up to `capacity` tokens, which advance together.

    `num_tokens` have been read so far. Feed the cache to `Transformer.forward` with only the new tokens.
    """

    config: ModelConfig
    batch: int
    capacity: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    num_tokens: int = 0
    stores: dict[Hashable, CacheStore] = field(default_factory=dict)

    def store(self, key: Hashable) -> CacheStore:
        """The store of an application, created on first use."""
        if key not in self.stores:
            shape = (self.batch, self.capacity, self.config.num_kv_heads, self.config.head_dim)
            order = torch.full(shape[:2], BEYOND, dtype=torch.int64, device=self.device)
            lengths = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
            k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            self.stores[key] = CacheStore(k, v, order, lengths)
        return self.stores[key]

    def add(
        self, key: Hashable, inner: KeysValues, queries: TokenSet, keys: TokenSet, geometry: Geometry
    ) -> tuple[KeysValues, AttentionLayout]:
        """`queries` attend to the store of `key` after `keys` have been added to it."""
        store = self.store(key)
        slots = store.admit(keys, geometry)
        length = self.num_tokens + geometry.seq_len
        return CachedKeysValues(inner, store, slots, length), self._layout(store, queries, geometry)

    def read(self, key: Hashable, queries: TokenSet, geometry: Geometry) -> tuple[KeysValues, AttentionLayout]:
        """`queries` attend to the store of `key` as it is."""
        store = self.store(key)
        length = self.num_tokens + geometry.seq_len
        return ReadOnlyKeysValues(store, length), self._layout(store, queries, geometry)

    def num_bytes(self) -> int:
        """Bytes of the entries that are in use."""
        per_entry = 2 * self.config.num_kv_heads * self.config.head_dim * torch.finfo(self.dtype).bits // 8
        return sum(int(store.lengths.sum()) for store in self.stores.values()) * per_entry

    def _layout(self, store: CacheStore, queries: TokenSet, geometry: Geometry) -> AttentionLayout:
        grid = Grid.of(queries)
        query_order = grid.pad(geometry.order_of(queries), -1)
        key_order = store.order[:, : self.num_tokens + geometry.seq_len]
        return AttentionLayout(grid, None, visibility_mask(query_order, key_order))
