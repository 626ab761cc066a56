"""Runs batches on the training model's own modules: blocks, router sessions, norms and head.

Tokens in flight keep their state between batches in tensors with one row per slot: the residual stream, what the router
knows about them, how their next recursion will be combined. A batch gathers the rows of its slots, so it can bring
together tokens that began at different times and are at different recursions.

Where recursions share a block, rows of all depths go through it in one call. Where they don't (a sequence of blocks,
separate norms, LoRA) there is one call for each run of recursions that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.model.blocks import RotaryAngles, rotary_angles
from megamor.model.recursion import combine, weighted
from megamor.routing import DepthBounds, MarkedSet, Mix, RoutingContext, RoutingPlan, RoutingSession, TokenSet
from megamor.routing.plan import to_device
from megamor.routing.random import text_keys
from megamor.serve.engine.attention import KVRows, KVView, Layout, PagedKeysValues, paged_layout
from megamor.serve.engine.graphs import BatchGraphs, Chain, Store
from megamor.serve.engine.layers import LayerAccess, Layers
from megamor.serve.engine.pages import EVERY_TOKEN
from megamor.serve.engine.prefix import PageCopy
from megamor.serve.engine.scheduler import Chunk

FOREIGN_SET = (
    "the plan for recursion {recursion} (counted from 0) has tokens that aren't among the candidates: when serving, a "
    "router must select with candidates.where, see docs/routers.md"
)
MIX_WEIGHTS = tuple(field.name for field in fields(Mix))


@dataclass(frozen=True)
class DepthGroup:
    """Rows `first` to `end` of a core batch, which are at the same `recursion`; `rows` of each of `chunks` are in it.

    Under the policy full the group includes rows that have stopped. `taking` [n] are the indices in the group of those
    that really take the recursion; None means all.
    """

    recursion: int
    first: int
    end: int
    chunks: list[Chunk]
    rows: list[list[int]]
    taking: Tensor | None


@dataclass(frozen=True)
class BlockCall:
    """What a block is told about its rows: angles and what they see, without a sliding window and with one; and which
    `rows` (None: all) write to `addresses`."""

    sights: list[tuple[RotaryAngles, Layout]]
    addresses: Tensor
    rows: Tensor | None

    def apply(self, block: nn.Module, x: Tensor, store: Store, slides: bool, recursion: int) -> Tensor:
        """x [N, dim] to [N, dim]."""
        k, v = store
        y: Tensor = block(x, *self.sights[slides], PagedKeysValues(k, v, self.addresses, self.rows), recursion)[0]
        return y


# The rows of each chunk that the router was asked about, and its answer [N] on the device; None keeps them all.
Outcome = tuple[list[list[int]], Tensor | None]


def kept_rows(outcomes: Sequence[Outcome]) -> list[list[int]]:
    """The rows of each chunk that the router keeps, for all `outcomes` in order."""
    # The only place where a core batch waits for the device: one transfer, however many depths share the batch.
    asked = [kept for _, kept in outcomes if kept is not None]
    marks = iter(torch.cat(asked).tolist() if asked else ())
    return [[row for row in rows if kept is None or next(marks)] for chunks, kept in outcomes for rows in chunks]


class Runner:
    """A model and its KV cache.

    Each pool has one page more than the scheduler knows, for the padding rows of `graphs` to write to. With `full`,
    rows that have stopped are computed along with the others.
    """

    def __init__(
        self, model: Transformer, layers: Layers, page_size: int, num_pages: dict[str, int], num_slots: int, full: bool
    ) -> None:
        self.model, self.layers, self.page_size, self.full = model, layers, page_size, full
        weight, config = model.embed.weight, model.config.model
        self.device, self.dtype = weight.device, weight.dtype
        self.sliding = {segment.name: segment.sliding for segment in model.segments}
        self.window = config.sliding_window if any(self.sliding.values()) else None
        shape = (page_size, config.num_kv_heads, config.head_dim)
        self.pages = {
            pool: [
                tuple(torch.zeros(num_pages[pool] + 1, *shape, dtype=self.dtype, device=self.device) for _ in range(2))
                for _ in range(count)
            ]
            for pool, count in layers.in_pool.items()
        }
        self.num_slots = num_slots
        # Named tensors with one row per slot: what is known of the tokens in flight.
        self.state: dict[str, Tensor] = {}
        self.all_rows = torch.arange(num_slots, device=self.device)
        # By recursion. Only the weights that are numbers are used; those that differ between rows are in `state`.
        self.mixes: dict[int, Mix] = {}
        # The session of the last entry batch. It serves as the pattern for sessions of other rows.
        self.session: RoutingSession | None = None
        self.graphs: BatchGraphs | None = None

    def put(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Set the rows of `slots` [N] in the state tensor `name`, which is zero where nothing was set yet."""
        if name not in self.state:
            self.state[name] = values.new_zeros(self.num_slots, *values.shape[1:])
        self.state[name].index_copy_(0, slots, values)

    def get(self, name: str, slots: Tensor) -> Tensor:
        """The rows of `slots` [N] in the state tensor `name`."""
        return self.state[name].index_select(0, slots)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages, in the given order."""
        for copy in copies:
            for layer in self.pages[copy.pool]:
                for pages in layer:
                    pages[copy.target] = pages[copy.source]

    def enter(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """Embedding, prelude and routing; returns the rows of each chunk that take the first recursion."""
        slots = self.tensor([slot for chunk in chunks for slot in chunk.slots])
        ids = [token for c in chunks for token in c.sequence.tokens[c.start : c.start + c.length]]
        x = self.run_edge("prelude", self.model.embedded(self.tensor(ids)), chunks, first_layer=0)
        self.put("stream", slots, x)
        stage = self.model.stage
        if stage is None:
            return [[] for _ in chunks]
        self.put("input", slots, x)
        # Emitted outputs add up over the recursions, and the slot still has the sum of the token before.
        if "emitted" in self.state:
            self.put("emitted", slots, torch.zeros_like(x))
        rows = [list(range(chunk.length)) for chunk in chunks]
        positions = self.tensor([chunk.start + row for chunk in chunks for row in range(chunk.length)])
        context = self.context(chunks, rows, positions)
        if stage.router.reads_text:
            context = replace(context, text=self.text_keys(chunks))
        session = self.session = stage.begin(x, context)
        kept = self.route(session, 0, x, slots)
        return kept_rows([(rows, kept)])

    def core(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """One recursion for every chunk, in order of their recursions; returns the rows of each that take the next."""
        stage = self.model.stage
        assert stage is not None
        groups = self.group_by_depth(chunks)
        rows = [(c, row) for group in groups for c, rows in zip(group.chunks, group.rows, strict=True) for row in rows]
        slots, positions = self.tensor(
            [[chunk.slots[row] for chunk, row in rows], [chunk.start + row for chunk, row in rows]]
        )
        x = self.get("stream", slots)
        # What only the core's input has isn't in the stream that its output is combined with.
        entered = x
        if stage.injection is not None or stage.recursion_embedding is not None:
            first = self.get("input", slots)
            parts = [(group.recursion, slice(group.first, group.end)) for group in groups]
            x = torch.cat([stage.core_input(recursion, x[rows], first[rows]) for recursion, rows in parts])
        x = self.run_core(groups, x)
        outcomes = []
        for group in groups:
            tensors = [tensor[group.first : group.end] for tensor in (entered, x, slots, positions)]
            # Stopped rows were computed for nothing (policy full) and must not change their stream.
            if group.taking is not None:
                tensors = [tensor.index_select(0, group.taking) for tensor in tensors]
            outcomes.append(self.finish_recursion(group, *tensors))
        return kept_rows(outcomes)

    def exit(self, chunks: Sequence[Chunk]) -> Tensor:
        """The coda: [rows of all chunks, dim]."""
        slots = self.tensor([slot for chunk in chunks for slot in chunk.slots])
        name = "emitted" if "emitted" in self.state else "stream"
        return self.run_edge("coda", self.get(name, slots), chunks, len(self.model.prelude))

    def run_edge(self, name: str, x: Tensor, chunks: Sequence[Chunk], first_layer: int) -> Tensor:
        """x [N, dim], all rows of `chunks`, through the blocks of "prelude" or "coda"."""
        blocks = getattr(self.model, name)
        if not len(blocks):
            return x
        rows, table = KVRows([], [], []), self.layers.table_of[EVERY_TOKEN]
        for chunk in chunks:
            # In the edge's table a token's index is its position.
            pages, entries = chunk.sequence.tables[table].pages, range(chunk.start, chunk.start + chunk.length)
            rows.positions.extend(entries)
            rows.addresses.extend(self.address(pages, entry) for entry in entries)
            begins = [max(0, entry + 1 - self.window) for entry in entries] if self.window else []
            rows.views.append(KVView(pages, [entry + 1 for entry in entries], begins))
        slides = [block in self.sliding[name] for block in range(len(blocks))]
        stores = self.pages["edge"][first_layer : first_layer + len(blocks)]
        return self.run_chain(Chain(name, blocks, stores, slides), x, rows)

    def run_core(self, groups: Sequence[DepthGroup], x: Tensor) -> Tensor:
        """x [N, dim], the rows of `groups`, through the blocks of the core."""
        stage, schedule, access = self.model.stage, self.layers.schedule, self.layers.access
        assert stage is not None
        if self.layers.uniform:
            stores = [self.pages["core"][application.layer] for application in access[0]]
            rows = self.core_rows(groups, [access[group.recursion][0] for group in groups])
            blocks, sliding = [stage.blocks[b] for b in schedule[0]], [b in stage.sliding for b in schedule[0]]
            return self.run_chain(Chain("core", blocks, stores, sliding), x, rows)
        # Most blocks of a batch read and write the same tables. Building a call can cost more than the block computes.
        calls: dict[tuple[Any, ...], BlockCall] = {}
        for index in range(len(schedule[0])):
            outs = []
            for block, run in self.layers.runs(index, groups, lambda group: group.recursion):
                first, end = run[0].first, run[-1].end
                accesses = [access[group.recursion][index] for group in run]
                key = (first, end, *((access.table, access.writes) for access in accesses))
                if key not in calls:
                    calls[key] = self.block_call(self.core_rows(run, accesses))
                store = self.pages["core"][accesses[0].layer]
                slides = block in stage.sliding
                outs.append(calls[key].apply(stage.blocks[block], x[first:end], store, slides, run[0].recursion))
            x = outs[0] if len(outs) == 1 else torch.cat(outs)
        return x

    def run_chain(self, chain: Chain, x: Tensor, rows: KVRows) -> Tensor:
        """x [N, dim] through blocks that all write the keys of the same `rows`, by a graph if there is one for them."""
        if self.graphs is not None and self.graphs.fits(len(x)):
            return self.graphs.run(chain, x, rows)
        call = self.block_call(rows)
        for block, store, slides in zip(chain.blocks, chain.stores, chain.slides, strict=True):
            x = call.apply(block, x, store, slides, recursion=0)
        return x

    def block_call(self, rows: KVRows) -> BlockCall:
        """How blocks are called on `rows`."""
        writers = [row for row, address in enumerate(rows.addresses) if address is not None]
        positions, config = self.tensor(rows.positions), self.model.config.model
        return BlockCall(
            [
                (
                    rotary_angles(positions, config, self.dtype, slides),
                    paged_layout(rows.views, self.page_size, self.dtype, self.device, slides),
                )
                for slides in ((False, True) if self.window else (False,))
            ],
            self.tensor([rows.addresses[row] for row in writers]),
            None if len(writers) == len(rows.addresses) else self.tensor(writers),
        )

    def group_by_depth(self, chunks: Sequence[Chunk]) -> list[DepthGroup]:
        """The rows of a core batch, recursion by recursion."""
        groups, first = [], 0
        for recursion, run in groupby(chunks, key=lambda chunk: chunk.recursion):
            members = list(run)
            rows = [list(range(c.length)) if self.full else c.active for c in members]
            end = first + sum(map(len, rows))
            taking = None
            if self.full:
                marks = [row in active for c in members for active in [set(c.active)] for row in range(c.length)]
                taking = self.tensor([index for index, mark in enumerate(marks) if mark])
            groups.append(DepthGroup(recursion, first, end, members, rows, taking))
            first = end
        return groups

    def core_rows(self, groups: Sequence[DepthGroup], accesses: Sequence[LayerAccess]) -> KVRows:
        """The rows of `groups` for blocks with these `accesses`, one for each group."""
        result = KVRows([], [], [])
        for group, access in zip(groups, accesses, strict=True):
            for chunk, rows in zip(group.chunks, group.rows, strict=True):
                entries, stored = chunk.entries[access.table], chunk.sequence.tables[self.layers.table_of[access.table]]
                result.positions.extend(chunk.start + row for row in rows)
                # A stopped row has no entry, and nothing is written for it. What it reads doesn't matter, but attention
                # needs at least one entry.
                ends = [entries.get(row, stored.length) + 1 for row in rows]
                for row, end in zip(rows, ends, strict=True):
                    writes = access.writes and row in entries
                    result.addresses.append(self.address(stored.pages, end - 1) if writes else None)
                begins = [
                    end - (chunk.seen(row, access.table, self.window) if row in entries else 1)
                    for row, end in zip(rows, ends, strict=True)
                    if self.window
                ]
                if rows:
                    result.views.append(KVView(stored.pages, ends, begins))
        return result

    def finish_recursion(
        self, group: DepthGroup, before: Tensor, y: Tensor, slots: Tensor, positions: Tensor
    ) -> Outcome:
        """Combine the core's output y [N, dim] with the stream `before` it, and ask the router who continues."""
        rows = [chunk.active for chunk in group.chunks]
        if len(y) == 0:
            return rows, None  # policy full: all rows of the group have stopped
        assert self.session is not None
        # The session of the last entry batch, given the state of these rows: they may have entered in other batches.
        state = {name: self.get(f"router.{name}", slots) for name in self.session.state()}
        session = self.session.regrouped(self.context(group.chunks, rows, positions), state)
        mix = self.mixes[group.recursion]
        tensors = [name for name in MIX_WEIGHTS if isinstance(getattr(mix, name), Tensor)]
        stored: dict[str, Any] = {name: self.get(f"mix.{name}", slots) for name in tensors}
        plan = RoutingPlan(TokenSet.all(len(slots), 1), None, replace(mix, **stored))
        mix = session.mix(group.recursion, plan, y)
        if mix.emit is not None:
            emitted = weighted(mix.emit, y).to(y.dtype)
            if "emitted" in self.state:
                emitted = emitted + self.get("emitted", slots)
            self.put("emitted", slots, emitted)
        stage_input = before if mix.from_input is None else self.get("input", slots)
        x = combine(mix, before, y, stage_input, plan)
        self.put("stream", slots, x)
        if group.recursion + 1 == self.layers.num_recursions:
            return [[] for _ in rows], None
        return rows, self.route(session, group.recursion + 1, x, slots)

    def route(self, session: RoutingSession, recursion: int, x: Tensor, slots: Tensor) -> Tensor | None:
        """Which rows take `recursion`, [N], given the stream x [N, dim] of the rows in `slots`; None for all.

        Raises:
            ConfigError: the router selects other tokens than those it was given.
        """
        plan = session.route(recursion, x, MarkedSet.of(self.all_rows[: len(slots)]))
        # The rows that take this recursion together may have been routed in different batches. So weights that differ
        # between rows are stored by slot. Which weights those are depends on the router alone.
        self.mixes[recursion] = plan.mix
        for name in MIX_WEIGHTS:
            weight = getattr(plan.mix, name)
            if isinstance(weight, Tensor):
                self.put(f"mix.{name}", slots, weight)
        if not isinstance(plan.tokens, MarkedSet) or plan.tokens.index is not None:
            raise ConfigError(FOREIGN_SET.format(recursion=recursion))
        for name, value in session.state().items():
            self.put(f"router.{name}", slots, value)
        return plan.tokens.kept

    def context(self, chunks: Sequence[Chunk], rows: Sequence[Sequence[int]], positions: Tensor) -> RoutingContext:
        """The routing context of `rows` of each chunk, at `positions` [N]."""
        bounds = None
        # Bounds only where a row has any: most batches have none, and routers skip the comparison then.
        if any(c.start < len(c.sequence.depths) or c.sequence.max_depth < self.layers.num_recursions for c in chunks):
            pairs = [c.sequence.bounds(c.start + row) for c, some in zip(chunks, rows, strict=True) for row in some]
            bounds = DepthBounds(*self.tensor([*zip(*pairs, strict=True)]))
        return RoutingContext(len(positions), 1, "causal", 0, positions, bounds)

    def text_keys(self, chunks: Sequence[Chunk]) -> Tensor:
        """`RoutingContext.text` of all rows of `chunks`."""
        texts = [chunk.sequence.tokens[: chunk.start + chunk.length] for chunk in chunks]
        ids, order = self.tensor([[i for text in texts for i in text], [n for text in texts for n in range(len(text))]])
        keys = torch.split(text_keys(ids, order), [len(text) for text in texts])
        return torch.cat([found[-chunk.length :] for found, chunk in zip(keys, chunks, strict=True)])

    def address(self, pages: Sequence[int], entry: int) -> int:
        """Where an entry of a table is stored, counted through all pages of the pool."""
        return pages[entry // self.page_size] * self.page_size + entry % self.page_size

    def tensor(self, numbers: Sequence[Any]) -> Tensor:
        """Integers on the device."""
        return to_device(numbers, self.device)
