"""Which keys and values a recursion reads and writes (paper section 2.2.2).

recursion_wise: each application has its own, of the tokens that take part. share_first: those of a block's first
application serve all later ones, which project queries only. hybrid: the same, with the rows of the tokens that take
part replaced by fresh keys and values for that application alone.

Keys and values that are used again go in and out of a recursion as plain tensors, so that recomputing a recursion in
backward sees them as inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megamor.model.attention import AttentionLayout
from megamor.model.blocks import KeysValues, KeyValue, RefreshedKeysValues, RotaryAngles, StoredKeysValues
from megamor.model.kv_cache import KVCache
from megamor.model.layouts import Geometry
from megamor.routing import TokenSet


@dataclass(frozen=True)
class Shared:
    """A block's first application: how the tokens of a call attend to its keys, and their places [N] among them."""

    keys: TokenSet
    layout: AttentionLayout
    places: Tensor | None


@dataclass(frozen=True)
class CoreCall:
    """One run of the core's blocks on a set of tokens.

    `stored` are the blocks whose keys and values of an earlier recursion come in as tensors, `kept` those whose fresh
    ones go out; both in the order of the tensors.
    """

    recursion: int
    blocks: tuple[int, ...]
    tokens: TokenSet
    geometry: Geometry
    angles: RotaryAngles
    own: AttentionLayout
    policy: str
    shared: dict[int, Shared] = field(default_factory=dict)
    kept: tuple[int, ...] = ()
    cache: KVCache | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Blocks whose keys and values come in."""
        return tuple(self.shared)

    def attention(self, place: int, available: dict[int, KeyValue]) -> tuple[KeysValues, AttentionLayout]:
        """What the block at `place` of this call attends to; `available` has the keys and values there are so far."""
        block = self.blocks[place]
        first = block not in available
        shared = self.shared.get(block, Shared(self.tokens, self.own, None))
        inner: KeysValues
        if first:
            inner = KeysValues()
        elif self.policy == "share_first":
            inner = StoredKeysValues(available[block])
        else:
            inner = RefreshedKeysValues(available[block], shared.places)
        if self.cache is None:
            return inner, shared.layout
        if self.policy == "share_first" and not first:
            return self.cache.read(("block", block), self.tokens, self.geometry)
        key = ("block", block) if self.policy == "share_first" else (self.recursion, place)
        return self.cache.add(key, inner, self.tokens, shared.keys, self.geometry)


class KVPolicy:
    """A policy at work in one forward pass: remembers the keys and values of first applications."""

    def __init__(self, policy: str, cache: KVCache | None) -> None:
        self.policy = policy
        self.cache = cache
        self.store: dict[int, tuple[KeyValue, TokenSet]] = {}

    def core_call(self, recursion: int, blocks: tuple[int, ...], tokens: TokenSet, geometry: Geometry) -> CoreCall:
        """How the blocks of one recursion see keys and values."""
        angles, own = geometry.angles_of(tokens), geometry.layout(tokens, tokens)
        shared: dict[int, Shared] = {}
        kept: tuple[int, ...] = ()
        if self.policy != "recursion_wise":
            unique = tuple(dict.fromkeys(blocks))
            kept = tuple(block for block in unique if block not in self.store)
            by_keys: dict[int, Shared] = {}
            for block in unique:
                if block in self.store:
                    keys = self.store[block][1]
                    if id(keys) not in by_keys:
                        layout = geometry.layout(tokens, keys)
                        by_keys[id(keys)] = Shared(keys, layout, keys.find(tokens))
                    shared[block] = by_keys[id(keys)]
        return CoreCall(recursion, blocks, tokens, geometry, angles, own, self.policy, shared, kept, self.cache)

    def inputs(self, call: CoreCall) -> list[Tensor]:
        """Keys and values of the blocks `call.stored`, flat."""
        return [tensor for block in call.stored for tensor in self.store[block][0]]

    def keep(self, call: CoreCall, tensors: list[Tensor]) -> None:
        """Remember the fresh keys and values of the blocks `call.kept`, flat."""
        for block, key, value in zip(call.kept, tensors[0::2], tensors[1::2], strict=True):
            self.store[block] = (key, value), call.tokens

    def pass_by(self, recursion: int, blocks: tuple[int, ...], geometry: Geometry) -> None:
        """A recursion that no token takes. Under hybrid, tokens that sit it out are seen by later ones that don't."""
        if self.policy != "hybrid" or self.cache is None:
            return
        for place, block in enumerate(blocks):
            if block in self.store:
                keys_values, tokens = self.store[block]
                store = self.cache.store((recursion, place))
                store.write(store.admit(tokens, geometry), keys_values)

    def keys_of(self, call: CoreCall) -> TokenSet:
        """The tokens whose keys the first block of `call` attended to."""
        shared = call.shared.get(call.blocks[0])
        return call.tokens if shared is None else shared.keys
