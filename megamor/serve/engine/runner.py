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
from torch import Tensor
from torch.nn import functional as F

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.model.blocks import RotaryAngles, rotary_angles
from megamor.model.recursion import combine, weighted
from megamor.routing import DepthBounds, MarkedSet, Mix, RoutingContext, RoutingPlan, RoutingSession, TokenSet
from megamor.serve.engine.attention import KVView, Layout, PagedKeysValues, paged_layout, to_device
from megamor.serve.engine.graphs import BatchGraphs
from megamor.serve.engine.layers import LayerAccess, Layers
from megamor.serve.engine.pages import EVERY_TOKEN
from megamor.serve.engine.prefix import PageCopy
from megamor.serve.engine.scheduler import Chunk

FOREIGN_SET = (
    "the plan for recursion {recursion} (counted from 0) has tokens that aren't among the candidates: when serving, a "
    "router must select with candidates.where, see docs/routers.md"
)
MIX_WEIGHTS = tuple(field.name for field in fields(Mix))


class SlotTable:
    """Named tensors with one row per slot. A tensor is created, with zeros, when something is first put there."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.tensors: dict[str, Tensor] = {}

    def put(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Set the rows of `slots` [N]."""
        if name not in self.tensors:
            self.tensors[name] = values.new_zeros(self.num_slots, *values.shape[1:])
        self.tensors[name].index_copy_(0, slots, values)

    def get(self, name: str, slots: Tensor) -> Tensor:
        """The rows of `slots` [N]."""
        return self.tensors[name].index_select(0, slots)


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
    """One call of a block on neighbouring groups: angles, what the rows read, and where which of them write."""

    angles: RotaryAngles
    layout: Layout
    addresses: Tensor
    rows: Tensor | None


Outcome = tuple[list[list[int]], Tensor | None]
"""The rows of each chunk that the router was asked about, and its answer [N] on the device; None keeps them all."""


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
        shape = (page_size, config.num_kv_heads, config.head_dim)
        self.pages = {
            pool: [
                tuple(torch.zeros(num_pages[pool] + 1, *shape, dtype=self.dtype, device=self.device) for _ in range(2))
                for _ in range(count)
            ]
            for pool, count in layers.in_pool.items()
        }
        self.slots = SlotTable(num_slots)
        self.all_rows = torch.arange(num_slots, device=self.device)
        self.mixes: dict[int, Mix] = {}
        self.session: RoutingSession | None = None
        self.graphs: BatchGraphs | None = None

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
        x = self.run_edge("prelude", self.model.embed(self.tensor(ids)), chunks, first_layer=0)
        self.slots.put("stream", slots, x)
        stage = self.model.stage
        if stage is None:
            return [[] for _ in chunks]
        self.slots.put("input", slots, x)
        # Emitted outputs add up over the recursions, and the slot still has the sum of the token before.
        if "emitted" in self.slots.tensors:
            self.slots.put("emitted", slots, torch.zeros_like(x))
        rows = [list(range(chunk.length)) for chunk in chunks]
        positions = self.tensor([chunk.start + row for chunk in chunks for row in range(chunk.length)])
        session = self.session = stage.router.begin(x, self.context(chunks, rows, positions))
        kept = self.route(session, 0, x, slots)
        self.store_session(session, slots)
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
        x = self.slots.get("stream", slots)
        entered = x
        if stage.recursion_embedding is not None:
            added = [stage.recursion_embedding[group.recursion].expand(group.end - group.first, -1) for group in groups]
            x = x + torch.cat(added)
        if self.graphs is not None and len(rows) <= self.graphs.widest and self.layers.uniform:
            x = self.replay_core(self.graphs, groups, rows, x)
        else:
            x = self.run_core(groups, x, positions)
        outcomes = []
        for group in groups:
            tensors = [tensor[group.first : group.end] for tensor in (entered, x, slots, positions)]
            if group.taking is not None:
                tensors = [tensor.index_select(0, group.taking) for tensor in tensors]
            outcomes.append(self.finish_recursion(group, *tensors))
        return kept_rows(outcomes)

    def run_core(self, groups: Sequence[DepthGroup], x: Tensor, positions: Tensor) -> Tensor:
        """The core's blocks on x [N, dim], the rows of `groups` at `positions` [N]."""
        stage = self.model.stage
        assert stage is not None
        angles = self.angles(positions)
        # Most blocks of a batch read and write the same tables. Building a call costs more than some blocks compute.
        calls: dict[tuple[Any, ...], BlockCall] = {}
        for index in range(len(self.layers.schedule[0])):
            outs = []
            for block, run in self.layers.runs(index, groups, lambda group: group.recursion):
                first, end = run[0].first, run[-1].end
                accesses = [self.layers.access[group.recursion][index] for group in run]
                key = (first, end, *((access.table, access.writes) for access in accesses))
                if key not in calls:
                    inside = None if end - first == len(x) else self.tensor(range(first, end))
                    addresses = self.written(run, accesses)
                    writers = [row for row, address in enumerate(addresses) if address is not None]
                    calls[key] = BlockCall(
                        angles.select(inside),
                        self.layout(self.views(run, accesses)),
                        self.tensor([address for address in addresses if address is not None]),
                        None if len(writers) == end - first else self.tensor(writers),
                    )
                call = calls[key]
                k, v = self.pages["core"][accesses[0].layer]
                store = PagedKeysValues(k, v, call.addresses, call.rows)
                y, _ = stage.blocks[block](x[first:end], call.angles, call.layout, store, run[0].recursion)
                outs.append(y)
            x = outs[0] if len(outs) == 1 else torch.cat(outs)
        return x

    def replay_core(
        self, graphs: BatchGraphs, groups: Sequence[DepthGroup], rows: Sequence[tuple[Chunk, int]], x: Tensor
    ) -> Tensor:
        """As `run_core`, by a graph."""
        stage, accesses = self.model.stage, [self.layers.access[group.recursion][0] for group in groups]
        assert stage is not None
        blocks = [stage.blocks[block] for block in self.layers.schedule[0]]
        stores = [self.pages["core"][access.layer] for access in self.layers.access[0]]
        positions = [chunk.start + row for chunk, row in rows]
        addresses, views = self.written(groups, accesses), self.views(groups, accesses)
        return graphs.run("core", blocks, stores, x, positions, addresses, views)

    def exit(self, chunks: Sequence[Chunk]) -> Tensor:
        """The coda: [rows of all chunks, dim]."""
        slots = self.tensor([slot for chunk in chunks for slot in chunk.slots])
        name = "emitted" if "emitted" in self.slots.tensors else "stream"
        return self.run_edge("coda", self.slots.get(name, slots), chunks, len(self.model.prelude))

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: [N, dim] to [N, vocab], in at least fp32."""
        logits = F.linear(self.model.norm(x), self.model.embed.weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def run_edge(self, name: str, x: Tensor, chunks: Sequence[Chunk], first_layer: int) -> Tensor:
        """x [N, dim], all rows of `chunks`, through the blocks of "prelude" or "coda"."""
        blocks = getattr(self.model, name)
        if not len(blocks):
            return x
        table = self.layers.table_of[EVERY_TOKEN]
        views, addresses, positions = [], list[int](), list[int]()
        for chunk in chunks:
            # In the edge's table a token's index is its position.
            pages, entries = chunk.sequence.tables[table].pages, range(chunk.start, chunk.start + chunk.length)
            views.append(KVView(pages, [entry + 1 for entry in entries]))
            addresses += [self.address(pages, entry) for entry in entries]
            positions += entries
        stores = self.pages["edge"][first_layer : first_layer + len(blocks)]
        if self.graphs is not None and len(x) <= self.graphs.widest:
            return self.graphs.run(name, blocks, stores, x, positions, addresses, views)
        layout, angles, written = self.layout(views), self.angles(self.tensor(positions)), self.tensor(addresses)
        for block, (k, v) in zip(blocks, stores, strict=True):
            x, _ = block(x, angles, layout, PagedKeysValues(k, v, written, None), 0)
        return x

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

    def views(self, groups: Sequence[DepthGroup], accesses: Sequence[LayerAccess]) -> list[KVView]:
        """What the rows of `groups` see."""
        views = []
        for group, access in zip(groups, accesses, strict=True):
            table = self.layers.table_of[access.table]
            for chunk, rows in zip(group.chunks, group.rows, strict=True):
                entries, stored = chunk.entries[access.table], chunk.sequence.tables[table]
                # A stopped row has no entry; what it reads doesn't matter, but attention needs at least one entry.
                ends = [entries.get(row, stored.length) + 1 for row in rows]
                if ends:
                    views.append(KVView(stored.pages, ends))
        return views

    def written(self, groups: Sequence[DepthGroup], accesses: Sequence[LayerAccess]) -> list[int | None]:
        """The address that each row of `groups` writes to; None for a row that doesn't write."""
        addresses: list[int | None] = []
        for group, access in zip(groups, accesses, strict=True):
            for chunk, rows in zip(group.chunks, group.rows, strict=True):
                if not access.writes:
                    addresses += [None] * len(rows)
                    continue
                entries = chunk.entries[group.recursion]
                pages = chunk.sequence.tables[self.layers.table_of[group.recursion]].pages
                addresses += [self.address(pages, entries[row]) if row in entries else None for row in rows]
        return addresses

    def finish_recursion(
        self, group: DepthGroup, before: Tensor, y: Tensor, slots: Tensor, positions: Tensor
    ) -> Outcome:
        """Combine the core's output y [N, dim] with the stream `before` it, and ask the router who continues."""
        rows = [chunk.active for chunk in group.chunks]
        if len(y) == 0:
            return rows, None
        assert self.session is not None
        # The session of the last entry batch, given the state of these rows: they may have entered in other batches.
        state = {name: self.slots.get(f"router.{name}", slots) for name in self.session.per_row}
        session = self.session.regrouped(self.context(group.chunks, rows, positions), state)
        mix = self.mixes[group.recursion]
        tensors = [name for name in MIX_WEIGHTS if isinstance(getattr(mix, name), Tensor)]
        stored: dict[str, Any] = {name: self.slots.get(f"mix.{name}", slots) for name in tensors}
        plan = RoutingPlan(TokenSet.all(len(slots), 1), None, replace(mix, **stored))
        mix = session.mix(group.recursion, plan, y)
        if mix.emit is not None:
            emitted = weighted(mix.emit, y).to(y.dtype)
            if "emitted" in self.slots.tensors:
                emitted = emitted + self.slots.get("emitted", slots)
            self.slots.put("emitted", slots, emitted)
        stage_input = before if mix.from_input is None else self.slots.get("input", slots)
        x = combine(mix, before, y, stage_input, plan)
        self.slots.put("stream", slots, x)
        outcome: Outcome = [[] for _ in rows], None
        if group.recursion + 1 < self.layers.num_recursions:
            outcome = rows, self.route(session, group.recursion + 1, x, slots)
        self.store_session(session, slots)
        return outcome

    def route(self, session: RoutingSession, recursion: int, x: Tensor, slots: Tensor) -> Tensor | None:
        """Which rows take `recursion`, [N], given the stream x [N, dim] of the rows in `slots`; None for all.

        Raises:
            ConfigError: the router selects other tokens than those it was given.
        """
        plan = session.route(recursion, x, MarkedSet.of(self.all_rows[: len(slots)]))
        # Which weights of a mix are tensors is the same in every batch. Their rows are stored by slot, since the rows
        # that this recursion brings together later may have been routed in different batches.
        self.mixes[recursion] = plan.mix
        for name in MIX_WEIGHTS:
            weight = getattr(plan.mix, name)
            if isinstance(weight, Tensor):
                self.slots.put(f"mix.{name}", slots, weight)
        if not isinstance(plan.tokens, MarkedSet) or plan.tokens.index is not None:
            raise ConfigError(FOREIGN_SET.format(recursion=recursion))
        return plan.tokens.kept

    def store_session(self, session: RoutingSession, slots: Tensor) -> None:
        """Keep what the router knows about the rows in `slots`."""
        for name in session.per_row:
            self.slots.put(f"router.{name}", slots, getattr(session, name))

    def context(self, chunks: Sequence[Chunk], rows: Sequence[Sequence[int]], positions: Tensor) -> RoutingContext:
        """The routing context of `rows` of each chunk, at `positions` [N]."""
        bounds = None
        # Bounds only where a row has any: most batches have none, and routers skip the comparison then.
        if any(c.start < len(c.sequence.depths) or c.sequence.max_depth < self.layers.num_recursions for c in chunks):
            pairs = [c.sequence.bounds(c.start + row) for c, some in zip(chunks, rows, strict=True) for row in some]
            bounds = DepthBounds(*self.tensor([*zip(*pairs, strict=True)]))
        return RoutingContext(len(positions), 1, "causal", 0, positions, bounds)

    def layout(self, views: Sequence[KVView]) -> Layout:
        """The attention layout of rows that see `views`."""
        return paged_layout(views, self.page_size, self.dtype, self.device)

    def address(self, pages: Sequence[int], entry: int) -> int:
        """Where an entry of a table is stored, counted through all pages of the pool."""
        return pages[entry // self.page_size] * self.page_size + entry % self.page_size

    def angles(self, positions: Tensor) -> RotaryAngles:
        """RoPE angles of `positions` [N]."""
        config = self.model.config.model
        return rotary_angles(positions, config.head_dim, config.rope_theta, self.dtype)

    def tensor(self, numbers: Sequence[Any]) -> Tensor:
        """Integers on the device."""
        return to_device(numbers, self.device)
