"""Which keys and values a recursion reads and writes (paper section 2.2.2).

recursion_wise: each application of a block has its own, those of the tokens that take part. share_first: the keys and
values of a block's first application serve all later ones, which project queries only. hybrid: as share_first, but with
the rows of the tokens that take part replaced by fresh keys and values, for that application alone. halted_reuse: as
hybrid, but the fresh rows stay for later applications: those of a token that has left are its last keys and values.
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
    """How a call's tokens attend to the stored keys of a block's earlier applications.

    `indices` [N] are the tokens' rows among `keys`; None means that both are the same set.
    """

    keys: TokenSet
    layout: AttentionLayout
    indices: Tensor | None


@dataclass(frozen=True)
class Sight:
    """How blocks of one kind, those with a sliding window or those without, see a call's tokens.

    `own` is their attention to each other.
    """

    geometry: Geometry
    angles: RotaryAngles
    own: AttentionLayout

    @staticmethod
    def of(tokens: TokenSet, geometry: Geometry) -> Sight:
        """The sight of blocks that see the stream as `geometry` says."""
        return Sight(geometry, geometry.angles_of(tokens), geometry.layout(tokens, tokens))


@dataclass(frozen=True)
class CoreCall:
    """One pass of `tokens` through the core: the blocks of one recursion, in order; `sights` are by block.

    The keys and values of the blocks `shared` enter from an earlier recursion as tensors, and those of the blocks
    `kept` that later ones need leave as tensors, both in this order.
    """

    recursion: int
    blocks: tuple[int, ...]
    tokens: TokenSet
    sights: dict[int, Sight]
    policy: str
    shared: dict[int, Shared] = field(default_factory=dict)
    kept: tuple[int, ...] = ()
    cache: KVCache | None = None
    stage: str = ""

    def shared_of(self, block: int) -> Shared:
        """The keys that `block` attends to: those of the call's own tokens, where no earlier recursion has run it."""
        return self.shared.get(block, Shared(self.tokens, self.sights[block].own, None))

    def attention(self, layer: int, available: dict[int, KeyValue]) -> tuple[KeysValues, AttentionLayout]:
        """What the `layer`-th block of this call attends to; `available` holds stored keys and values by block."""
        block = self.blocks[layer]
        # A block may run several times within one recursion (sharing `sequence`): then its first application is in this
        # very call, and `available` has it although `shared` does not.
        first, shared, geometry = block not in available, self.shared_of(block), self.sights[block].geometry
        source: KeysValues
        if first:
            source = KeysValues()
        elif self.policy == "share_first":
            source = StoredKeysValues(available[block])
        else:
            source = RefreshedKeysValues(available[block], shared.indices)
        if self.cache is None:
            return source, shared.layout
        # Decoding. Under share_first one store per block serves all its applications, and only the first adds to it.
        # Otherwise each application has a store of its own. Where it starts from stored keys, it must also hold those
        # of the tokens of this step that skip the recursion, which is why `shared.keys` are added.
        if self.policy == "share_first" and not first:
            return self.cache.view((self.stage, "block", block), self.tokens, geometry, None)
        application = ("block", block) if self.policy == "share_first" else (self.recursion, layer)
        key = (self.stage, *application)
        return self.cache.view(key, self.tokens, geometry, (source, shared.keys))


class KVPolicy:
    """A policy of a recursion `stage` in one forward pass; remembers keys and values of each block, for the tokens of
    its first application: as they were there, or (halted_reuse) at each token's last one.

    `stage` is the name under which the cache knows it; its blocks `sliding` have a sliding window.
    """

    def __init__(self, policy: str, cache: KVCache | None, stage: str = "", sliding: tuple[int, ...] = ()) -> None:
        self.policy, self.cache, self.stage, self.sliding = policy, cache, stage, sliding
        self.store: dict[int, tuple[KeyValue, TokenSet]] = {}

    def core_call(self, recursion: int, blocks: tuple[int, ...], tokens: TokenSet, geometry: Geometry) -> CoreCall:
        """The call of `blocks` on `tokens`, with the layouts of everything that they attend to."""
        kinds = {block in self.sliding for block in blocks}
        found = {slides: Sight.of(tokens, geometry.seen_by(slides)) for slides in kinds}
        sights = {block: found[block in self.sliding] for block in blocks}
        unique = () if self.policy == "recursion_wise" else tuple(dict.fromkeys(blocks))
        kept = tuple(block for block in unique if block not in self.store or self.policy == "halted_reuse")
        # Blocks that first ran together stored keys of the same tokens: their layout (a mask) is built once.
        by_keys: dict[tuple[int, bool], Shared] = {}
        shared: dict[int, Shared] = {}
        for block in unique:
            if block in self.store:
                keys = self.store[block][1]
                kind = id(keys), block in self.sliding
                if kind not in by_keys:
                    layout = sights[block].geometry.layout(tokens, keys)
                    by_keys[kind] = Shared(keys, layout, keys.find(tokens))
                shared[block] = by_keys[kind]
        return CoreCall(recursion, blocks, tokens, sights, self.policy, shared, kept, self.cache, self.stage)

    # Stored keys and values enter and leave a call as tensors: `run_blocks` never reads or writes `store` itself.
    # Activation checkpointing runs a call a second time in the backward pass, when `store` already holds what this call
    # and later ones have added. A call that looked there would take other branches than in its first run.
    def inputs(self, call: CoreCall) -> list[Tensor]:
        """Keys and values of the blocks `call.shared`, flat."""
        return [tensor for block in call.shared for tensor in self.store[block][0]]

    def keep(self, call: CoreCall, tensors: list[Tensor]) -> None:
        """Remember the keys and values of the blocks `call.kept`, flat."""
        for block, key, value in zip(call.kept, tensors[0::2], tensors[1::2], strict=True):
            self.store[block] = (key, value), call.shared_of(block).keys

    def skip(self, recursion: int, blocks: tuple[int, ...], geometry: Geometry) -> None:
        """Account for a recursion that no token takes."""
        # Under hybrid and halted_reuse, tokens that skip a recursion are visible there, with their stored keys, to
        # later tokens that take it. While decoding, a step in which all tokens skip must still add them to the cache.
        if self.policy not in ("hybrid", "halted_reuse") or self.cache is None:
            return
        for layer, block in enumerate(blocks):
            if block in self.store:
                keys_values, tokens = self.store[block]
                store = self.cache.store((self.stage, recursion, layer))
                store.write(self.cache.admit(store, tokens, geometry), keys_values)
