"""Launches on the training model's own modules: blocks, router sessions, norms and head.

Rows under way keep their state in tables of tensors with one row per slot (the stream, what the router knows, how the
next recursion will be combined), so that a launch can bring together rows that stand before different recursions.
Where recursions share a block, rows of all depths go through it in one call; where they don't (a sequence of blocks,
separate norms, LoRA), there is one call for each run of recursions that do.
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
from megamor.serve.engine.graphs import LaunchGraphs
from megamor.serve.engine.layers import LayerAccess, Layers
from megamor.serve.engine.paged_attention import KernelLayout, PagedKeysValues, PagedLayout, Reading, paged_layout
from megamor.serve.engine.pages import EVERY_TOKEN
from megamor.serve.engine.prefix import Copy
from megamor.serve.engine.scheduler import Piece
from megamor.serve.engine.transfer import to_device

Layout = PagedLayout | KernelLayout
FOREIGN_SET = (
    "the plan for recursion {recursion} (counted from 0) has tokens that aren't from the candidates: when serving, a "
    "router must select with candidates.where, see docs/routers.md"
)
WEIGHTS = tuple(field.name for field in fields(Mix))


class SlotTable:
    """Named tensors with one row per slot, made when something is first put there (zeros before)."""

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
class Part:
    """The rows `first` to `end` of a core launch stand before `recursion`; `rows` of each piece are in it.

    Under the policy full there are rows among them that nobody needs; `taking` are the others, as places [n] in the
    part, None for all.
    """

    recursion: int
    first: int
    end: int
    pieces: list[Piece]
    rows: list[list[int]]
    taking: Tensor | None


@dataclass(frozen=True)
class Binding:
    """Neighbouring parts on their way through a block: the rows' angles, what they read, who of them writes where."""

    angles: RotaryAngles
    layout: Layout
    places: Tensor
    rows: Tensor | None


Outcome = tuple[list[list[int]], Tensor | None]
"""Rows of each piece, and which of all these go on, [N]; None for all."""


def chosen(outcomes: Sequence[Outcome]) -> list[list[int]]:
    """The rows of each piece that go on. The device is asked once."""
    asked = [kept for _, kept in outcomes if kept is not None]
    marks = iter(torch.cat(asked).tolist() if asked else ())
    return [[row for row in some if kept is None or next(marks)] for rows, kept in outcomes for some in rows]


class Runner:
    """A model with its pages, of which the last of each pool is nobody's.

    `full` computes rows that have left their recursion along with the others. Launches that are narrow enough go
    through `graphs`, if there are any.
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
        self.all_places = torch.arange(num_slots, device=self.device)
        self.mixes: dict[int, Mix] = {}
        self.session: RoutingSession | None = None
        self.graphs: LaunchGraphs | None = None

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy pages, in the given order."""
        for copy in copies:
            for layer in self.pages[copy.pool]:
                for pages in layer:
                    pages[copy.target] = pages[copy.source]

    def enter(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Embedding, prelude and the router's first word; the rows of each piece that take the first recursion."""
        slots = self.tensor([slot for piece in pieces for slot in piece.slots])
        ids = [token for p in pieces for token in p.sequence.tokens[p.start : p.start + p.length]]
        x = self.run_edge("prelude", self.model.embed(self.tensor(ids)), pieces, first_layer=0)
        self.slots.put("stream", slots, x)
        stage = self.model.stage
        if stage is None:
            return [[] for _ in pieces]
        self.slots.put("input", slots, x)
        if "emitted" in self.slots.tensors:
            self.slots.put("emitted", slots, torch.zeros_like(x))
        rows = [list(range(piece.length)) for piece in pieces]
        positions = self.tensor([piece.start + row for piece in pieces for row in range(piece.length)])
        session = self.session = stage.router.begin(x, self.context(pieces, rows, positions))
        kept = self.route(session, 0, x, slots)
        for name in session.per_row:
            self.slots.put(f"router.{name}", slots, getattr(session, name))
        return chosen([(rows, kept)])

    def core(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """One recursion for every piece, which are sorted by it; the rows of each that take the next."""
        stage = self.model.stage
        assert stage is not None
        parts = self.parts(pieces)
        rows = [(p, row) for part in parts for p, rows in zip(part.pieces, part.rows, strict=True) for row in rows]
        slots, positions = self.tensor(
            [[piece.slots[row] for piece, row in rows], [piece.start + row for piece, row in rows]]
        )
        x = self.slots.get("stream", slots)
        entered = x
        if stage.recursion_embedding is not None:
            added = [stage.recursion_embedding[part.recursion].expand(part.end - part.first, -1) for part in parts]
            x = x + torch.cat(added)
        x = self.replay_core(parts, rows, x) if self.fits(len(rows)) else self.run_core(parts, x, positions)
        outcomes = []
        for part in parts:
            tensors = [tensor[part.first : part.end] for tensor in (entered, x, slots, positions)]
            if part.taking is not None:
                tensors = [tensor.index_select(0, part.taking) for tensor in tensors]
            outcomes.append(self.finish_recursion(part, *tensors))
        return chosen(outcomes)

    def run_core(self, parts: Sequence[Part], x: Tensor, positions: Tensor) -> Tensor:
        """The core's blocks on x [N, dim], the rows of `parts` with their `positions` [N]."""
        stage = self.model.stage
        assert stage is not None
        angles = self.angles(positions)
        bindings: dict[tuple[Any, ...], Binding] = {}
        for place in range(self.layers.num_places):
            outs = []
            for block, run in self.layers.runs(place, parts, key=lambda part: part.recursion):
                first, end = run[0].first, run[-1].end
                accesses = [self.layers.access[part.recursion][place] for part in run]
                key = (first, end, *((access.table, access.writes) for access in accesses))
                if key not in bindings:
                    inside = None if end - first == len(x) else self.tensor(range(first, end))
                    places = self.written(run, accesses)
                    writers = [row for row, where in enumerate(places) if where is not None]
                    bindings[key] = Binding(
                        angles.select(inside),
                        self.paged(self.readings(run, accesses)),
                        self.tensor([where for where in places if where is not None]),
                        None if len(writers) == end - first else self.tensor(writers),
                    )
                bound = bindings[key]
                k, v = self.pages["core"][accesses[0].layer]
                store = PagedKeysValues(k, v, bound.places, bound.rows)
                y, _ = stage.blocks[block](x[first:end], bound.angles, bound.layout, store, run[0].recursion)
                outs.append(y)
            x = outs[0] if len(outs) == 1 else torch.cat(outs)
        return x

    def fits(self, num_rows: int) -> bool:
        """Whether a graph takes so many rows through the core."""
        return self.graphs is not None and num_rows <= self.graphs.widest and self.layers.uniform

    def replay_core(self, parts: Sequence[Part], rows: Sequence[tuple[Piece, int]], x: Tensor) -> Tensor:
        """What `run_core` does, by a graph."""
        stage, accesses = self.model.stage, [self.layers.access[part.recursion][0] for part in parts]
        assert stage is not None
        assert self.graphs is not None
        blocks = [stage.blocks[block] for block in self.layers.schedule[0]]
        stores = [self.pages["core"][access.layer] for access in self.layers.access[0]]
        positions = [piece.start + row for piece, row in rows]
        places, readings = self.written(parts, accesses), self.readings(parts, accesses)
        return self.graphs.run("core", blocks, stores, x, positions, places, readings)

    def exit(self, pieces: Sequence[Piece]) -> Tensor:
        """Coda and final norm: [rows of all pieces, dim]."""
        slots = self.tensor([slot for piece in pieces for slot in piece.slots])
        name = "emitted" if "emitted" in self.slots.tensors else "stream"
        return self.run_edge("coda", self.slots.get(name, slots), pieces, len(self.model.prelude))

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: [N, dim] to [N, vocab], in at least fp32."""
        logits = F.linear(self.model.norm(x), self.model.embed.weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def run_edge(self, part: str, x: Tensor, pieces: Sequence[Piece], first_layer: int) -> Tensor:
        """x [N, dim], all rows of `pieces`, through prelude or coda."""
        blocks = getattr(self.model, part)
        if not len(blocks):
            return x
        table = self.layers.table(EVERY_TOKEN)
        readings, places, positions = [], list[int](), list[int]()
        for piece in pieces:
            pages, entries = piece.sequence.tables[table].pages, range(piece.start, piece.start + piece.length)
            readings.append(Reading(pages, [entry + 1 for entry in entries]))
            places += self.places(pages, entries)
            positions += entries
        stores = self.pages["edge"][first_layer : first_layer + len(blocks)]
        if self.graphs is not None and len(x) <= self.graphs.widest:
            return self.graphs.run(part, blocks, stores, x, positions, places, readings)
        layout, angles, written = self.paged(readings), self.angles(self.tensor(positions)), self.tensor(places)
        for block, (k, v) in zip(blocks, stores, strict=True):
            x, _ = block(x, angles, layout, PagedKeysValues(k, v, written, None), 0)
        return x

    def parts(self, pieces: Sequence[Piece]) -> list[Part]:
        """The launch's rows, recursion by recursion."""
        parts, first = [], 0
        for recursion, group in groupby(pieces, key=lambda piece: piece.recursion):
            members = list(group)
            rows = [list(range(p.length)) if self.full else p.active for p in members]
            end = first + sum(map(len, rows))
            taking = None
            if self.full:
                marks = [row in active for p in members for active in [set(p.active)] for row in range(p.length)]
                taking = self.tensor([number for number, mark in enumerate(marks) if mark])
            parts.append(Part(recursion, first, end, members, rows, taking))
            first = end
        return parts

    def readings(self, parts: Sequence[Part], accesses: Sequence[LayerAccess]) -> list[Reading]:
        """What the rows of `parts` read. An idle row sees what there is, or the first page where nothing is."""
        readings = []
        for part, access in zip(parts, accesses, strict=True):
            table = self.layers.table(access.table)
            for piece, rows in zip(part.pieces, part.rows, strict=True):
                entries, stored = piece.places[access.table], piece.sequence.tables[table]
                ends = [entries.get(row, stored.length) + 1 for row in rows]
                if ends:
                    readings.append(Reading(stored.pages, ends))
        return readings

    def written(self, parts: Sequence[Part], accesses: Sequence[LayerAccess]) -> list[int | None]:
        """Where in the pages each row of `parts` writes; None for one that doesn't."""
        places: list[int | None] = []
        for part, access in zip(parts, accesses, strict=True):
            for piece, members in zip(part.pieces, part.rows, strict=True):
                if not access.writes:
                    places += [None] * len(members)
                    continue
                entries = piece.places[part.recursion]
                pages = piece.sequence.tables[self.layers.table(part.recursion)].pages
                places += [self.places(pages, [entries[row]])[0] if row in entries else None for row in members]
        return places

    def finish_recursion(self, part: Part, before: Tensor, y: Tensor, slots: Tensor, positions: Tensor) -> Outcome:
        """Combine the core's output [N, dim] with what went in, and ask the router who goes on."""
        rows = [piece.active for piece in part.pieces]
        if len(y) == 0:
            return rows, None
        assert self.session is not None
        state = {name: self.slots.get(f"router.{name}", slots) for name in self.session.per_row}
        session = self.session.regrouped(self.context(part.pieces, rows, positions), state)
        mix = self.mixes[part.recursion]
        tensors = [name for name in WEIGHTS if isinstance(getattr(mix, name), Tensor)]
        stored: dict[str, Any] = {name: self.slots.get(f"mix.{name}", slots) for name in tensors}
        plan = RoutingPlan(TokenSet.all(len(slots), 1), None, replace(mix, **stored))
        mix = session.mix(part.recursion, plan, y)
        if mix.emit is not None:
            emitted = weighted(mix.emit, y).to(y.dtype)
            if "emitted" in self.slots.tensors:
                emitted = emitted + self.slots.get("emitted", slots)
            self.slots.put("emitted", slots, emitted)
        stage_input = before if mix.from_input is None else self.slots.get("input", slots)
        x = combine(mix, before, y, stage_input, plan)
        self.slots.put("stream", slots, x)
        outcome: Outcome = [[] for _ in rows], None
        if part.recursion + 1 < self.layers.num_recursions:
            outcome = rows, self.route(session, part.recursion + 1, x, slots)
        for name in session.per_row:
            self.slots.put(f"router.{name}", slots, getattr(session, name))
        return outcome

    def route(self, session: RoutingSession, recursion: int, x: Tensor, slots: Tensor) -> Tensor | None:
        """Which rows take `recursion`, [N], those with stream x [N, dim] in `slots`; None for all."""
        plan = session.route(recursion, x, MarkedSet.of(self.all_places[: len(slots)]))
        self.mixes[recursion] = plan.mix
        for name in WEIGHTS:
            weight = getattr(plan.mix, name)
            if isinstance(weight, Tensor):
                self.slots.put(f"mix.{name}", slots, weight)
        if not isinstance(plan.tokens, MarkedSet) or plan.tokens.index is not None:
            raise ConfigError(FOREIGN_SET.format(recursion=recursion))
        return plan.tokens.kept

    def context(self, pieces: Sequence[Piece], rows: Sequence[Sequence[int]], positions: Tensor) -> RoutingContext:
        """For `rows` of each piece, at `positions` [N]; with bounds only where one of them has any."""
        bounds = None
        if any(p.start < len(p.sequence.depths) or p.sequence.max_depth < self.layers.num_recursions for p in pieces):
            pairs = [p.sequence.bounds(p.start + row) for p, some in zip(pieces, rows, strict=True) for row in some]
            bounds = DepthBounds(*self.tensor([*zip(*pairs, strict=True)]))
        return RoutingContext(len(positions), 1, "causal", 0, positions, bounds)

    def paged(self, readings: Sequence[Reading]) -> Layout:
        """The attention layout of rows that read these."""
        return paged_layout(readings, self.page_size, self.dtype, self.device)

    def places(self, pages: Sequence[int], entries: Sequence[int]) -> list[int]:
        """Where entries of a table lie, counted through all pages."""
        size = self.page_size
        return [pages[entry // size] * size + entry % size for entry in entries]

    def angles(self, positions: Tensor) -> RotaryAngles:
        """RoPE angles of `positions` [N]."""
        config = self.model.config.model
        return rotary_angles(positions, config.head_dim, config.rope_theta, self.dtype)

    def tensor(self, numbers: Sequence[Any]) -> Tensor:
        """Integers on the device."""
        return to_device(numbers, self.device)
