"""The recursion stage: a shared core of blocks applied up to Nr times, where a router decides token by token how deep.

Each recursion: the router selects among the tokens that passed the one before, the selected rows are gathered, the core
runs on them alone, and the result is combined into the stream with the weights of the plan. Tokens that are not
selected are not in the tensor that the core sees, so their compute is really saved.

The stage is one module whose forward loops over the recursions, so that sharded training gathers its weights once per
pass however many recursions run, and ranks whose tokens reach different depths still issue the same collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamor.config import Config
from megamor.model.attention import AttentionLayout
from megamor.model.blocks import (
    Block,
    KeysValues,
    KeyValue,
    RefreshedKeysValues,
    RotaryAngles,
    StoredKeysValues,
)
from megamor.model.geometry import Geometry
from megamor.model.sharing import LayerPlan
from megamor.routing import Mix, Ratio, Router, RoutingContext, RoutingPlan, TokenSet, build_router
from megamor.routing.plan import Weight


class StageOutput(NamedTuple):
    """The stage's result and what the routers did.

    `depth` [B·S] counts the recursions that each token took; `work` [Nr, 2] holds per recursion the tokens that the
    core has seen and the query-key pairs that attention may not skip (causal).
    """

    stream: Tensor
    losses: dict[str, Tensor]
    ratios: dict[str, Ratio]
    totals: dict[str, Tensor]
    depth: Tensor
    work: Tensor


@dataclass(frozen=True)
class Launch:
    """One run of the core's blocks on a set of tokens.

    `stored` lists the blocks whose keys and values of an earlier recursion come in, `kept` those whose fresh ones go
    out;
    `layouts` is indexed by block. `refresh` [N] are the places of the tokens among the stored keys (hybrid).
    """

    angles: RotaryAngles
    own: AttentionLayout
    layouts: dict[int, AttentionLayout]
    stored: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    refresh: dict[int, Tensor | None] | None = None


class RecursionStage(nn.Module):
    """Shared blocks and their router. See the module docstring."""

    def __init__(self, config: Config, plan: LayerPlan) -> None:
        super().__init__()
        self.schedule = plan.schedule
        self.kv_policy = config.recursion.kv_policy
        self.blocks = nn.ModuleList(Block(config.model) for _ in range(plan.num_core))
        self.router: Router = build_router(config.router, config.model.dim, len(plan.schedule))
        self.activation_checkpointing = "none"

    def forward(self, stream: Tensor, geometry: Geometry, context: RoutingContext) -> StageOutput:
        """stream [B·S, dim] through up to Nr recursions."""
        session = self.router.begin(stream, context)
        stage_input, emitted = stream, None
        candidates = TokenSet.all(geometry.batch, geometry.seq_len)
        rows = stream
        depth = torch.zeros(len(candidates), dtype=torch.int64, device=stream.device)
        work = []
        shared = SharedKeysValues(self.kv_policy)
        for recursion in range(self.router.num_recursions):
            plan = session.route(recursion, rows, candidates)
            x = rows if plan.places is None else rows.index_select(0, plan.places)
            y = self.run_recursion(recursion, x, plan.tokens, geometry, shared)
            mix = session.mix(recursion, plan, y)
            if mix.emit is not None:
                emitted = torch.zeros_like(stream) if emitted is None else emitted
                emitted = plan.tokens.scatter_add(emitted, _times(mix.emit, y))
            rows = combine(mix, x, y, stage_input, plan)
            stream = plan.tokens.scatter(stream, rows)
            candidates = plan.tokens
            depth = plan.tokens.scatter(depth, torch.full((len(candidates),), recursion + 1, device=depth.device))
            work.append(launch_work(plan.tokens, shared.keys_of(self.schedule[recursion][0]), geometry))
        result = stream if emitted is None else emitted
        return StageOutput(result, session.losses, session.ratios, session.totals, depth, torch.stack(work))

    def run_recursion(
        self, recursion: int, x: Tensor, tokens: TokenSet, geometry: Geometry, shared: SharedKeysValues
    ) -> Tensor:
        """The core's blocks of `recursion` on x [N, dim]."""
        if len(tokens) == 0:
            return x
        blocks = self.schedule[recursion]
        launch = shared.launch(blocks, tokens, geometry)
        run: Callable[..., Any] = partial(self.run_blocks, blocks, launch)
        if self.activation_checkpointing == "recursion":
            run = partial(checkpoint, run, use_reentrant=False)
        y, *kept = run(x, *shared.tensors(launch.stored))
        shared.keep(launch.kept, kept, tokens)
        return y

    def run_blocks(self, blocks: tuple[int, ...], launch: Launch, x: Tensor, *stored: Tensor) -> tuple[Tensor, ...]:
        """Blocks in order. Keys and values come in and go out as plain tensors, so that recomputation sees them."""
        available = dict(zip(launch.stored, zip(stored[0::2], stored[1::2], strict=True), strict=True))
        for block in blocks:
            layout = launch.layouts.get(block, launch.own)
            keys_values = self.keys_values(block, launch, available)
            x, fresh = run_block(self, self.blocks[block], x, launch.angles, layout, keys_values)
            if block in launch.kept and block not in available:
                assert fresh is not None
                available[block] = fresh
        return x, *(tensor for block in launch.kept for tensor in available[block])

    def keys_values(self, block: int, launch: Launch, available: dict[int, KeyValue]) -> KeysValues:
        """What this application of `block` attends to under the KV policy."""
        if block not in available:
            return KeysValues()
        if self.kv_policy == "share_first":
            return StoredKeysValues(available[block])
        return RefreshedKeysValues(available[block], (launch.refresh or {}).get(block))


def run_block(
    owner: Any, block: nn.Module, x: Tensor, angles: RotaryAngles, layout: AttentionLayout, keys_values: KeysValues
) -> tuple[Tensor, KeyValue | None]:
    """Call a block, recomputing it in backward where `owner.activation_checkpointing` is "block"."""
    if owner.activation_checkpointing == "block":
        return checkpoint(block, x, angles, layout, keys_values, use_reentrant=False)
    return block(x, angles, layout, keys_values)


class SharedKeysValues:
    """Keys and values of each block's first application, for the policies that use them again (paper section 2.2.2)."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.store: dict[int, tuple[KeyValue, TokenSet]] = {}
        self.own_keys: TokenSet | None = None

    def launch(self, blocks: tuple[int, ...], tokens: TokenSet, geometry: Geometry) -> Launch:
        """How the blocks of one recursion see keys and values."""
        angles, own = geometry.angles_of(tokens), geometry.layout(tokens, tokens)
        self.own_keys = tokens
        if self.policy == "recursion_wise":
            return Launch(angles, own, {})
        stored = tuple(block for block in dict.fromkeys(blocks) if block in self.store)
        kept = tuple(block for block in dict.fromkeys(blocks) if block not in self.store)
        layouts: dict[int, AttentionLayout] = {}
        refresh: dict[int, Tensor | None] = {}
        by_set: dict[int, tuple[AttentionLayout, Tensor | None]] = {}
        for block in stored:
            keys = self.store[block][1]
            if id(keys) not in by_set:
                by_set[id(keys)] = geometry.layout(tokens, keys), places_among(tokens, keys)
            layouts[block], refresh[block] = by_set[id(keys)]
        return Launch(angles, own, layouts, stored, kept, refresh)

    def tensors(self, blocks: tuple[int, ...]) -> list[Tensor]:
        """Stored keys and values of `blocks`, flat."""
        return [tensor for block in blocks for tensor in self.store[block][0]]

    def keep(self, blocks: tuple[int, ...], tensors: list[Tensor], tokens: TokenSet) -> None:
        """Store fresh keys and values, flat as from `RecursionStage.run_blocks`."""
        for block, key, value in zip(blocks, tensors[0::2], tensors[1::2], strict=True):
            self.store[block] = (key, value), tokens

    def keys_of(self, block: int) -> TokenSet | None:
        """The tokens whose keys the latest launch of `block` attended to; None means its own."""
        if block not in self.store or self.store[block][1] is self.own_keys:
            return None
        return self.store[block][1]


def places_among(tokens: TokenSet, keys: TokenSet) -> Tensor | None:
    """Places [N] of `tokens` among the rows of `keys`, a superset; None where they are the same set."""
    if tokens is keys or (tokens.is_everything and keys.is_everything):
        return None
    assert tokens.index is not None
    return tokens.index if keys.index is None else torch.searchsorted(keys.index, tokens.index)


def _times(weight: Weight, values: Tensor) -> Tensor:
    """weight · values, where a tensor weight [N] applies row by row."""
    if isinstance(weight, Tensor):
        return weight.unsqueeze(-1) * values
    assert weight is not None
    return values if weight == 1.0 else weight * values


def combine(mix: Mix, x: Tensor, y: Tensor, stage_input: Tensor, plan: RoutingPlan) -> Tensor:
    """The selected rows after a recursion, [N, dim], in the type of the stream."""
    terms = []
    if mix.from_core is not None:
        terms.append(_times(mix.from_core, y))
    if mix.from_stream is not None:
        terms.append(_times(mix.from_stream, x))
    if mix.from_input is not None:
        terms.append(_times(mix.from_input, plan.tokens.gather(stage_input)))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(x.dtype)


def launch_work(tokens: TokenSet, keys: TokenSet | None, geometry: Geometry) -> Tensor:
    """[2]: tokens in the launch, and the pairs (query, key) with the key not after the query."""
    device = geometry.angles.cos.device
    count = float(len(tokens))
    if keys is not None and keys.is_everything:
        rows = tokens.rows(device)
        pairs = (rows % geometry.seq_len + 1).sum().float()
    elif tokens.lengths is not None:
        lengths = tokens.lengths.float()
        pairs = (lengths * (lengths + 1) / 2).sum()
    else:
        pairs = torch.full((), tokens.batch * tokens.max_length * (tokens.max_length + 1) / 2, device=device)
    return torch.stack((torch.full_like(pairs, count), pairs))
