"""Runs batches on the model's modules: blocks (packed for inference, or the training model's own), routers, head.

Tokens in flight keep their state between batches in tensors with one row per slot: the residual stream, what the router
knows about them, how their next recursion will be combined. A batch gathers the rows of its slots, so it can bring
together tokens that began at different times and are at different recursions. Everything else that a batch needs to
know of its rows is one matrix of integers (`Flight.launch`), so that a graph can be replayed with another.

Where recursions share a block, rows of all depths go through it in one call. Where they don't (a sequence of blocks,
separate norms, LoRA) there is one call for each run of recursions that do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.model.recursion import combine, weighted
from megamor.routing import MarkedSet, Mix, RoutingPlan, RoutingSession
from megamor.routing.plan import Incoming
from megamor.routing.random import text_keys
from megamor.serve.engine.cache import BlockCall, PagedCache, Rows
from megamor.serve.engine.flight import (
    ACTIVE,
    DRAWER,
    RECURSION,
    ROW,
    SEAT,
    TEXT,
    TOKEN,
    UNREAD_TOKEN,
    Chunk,
    Flight,
    Ints,
    Marks,
    ScheduledBatch,
    integers,
)
from megamor.serve.engine.graphs import NO_RECURSION, BatchGraphs, Kind, Record
from megamor.serve.engine.layers import Layers
from megamor.serve.engine.pages import EVERY_TOKEN
from megamor.serve.engine.sampler import most_likely

FOREIGN_SET = (
    "the plan for recursion {recursion} (counted from 0) has tokens that aren't among the candidates: when serving, a "
    "router must select with candidates.where, see docs/routers.md"
)
MIX_WEIGHTS = tuple(field.name for field in fields(Mix))


class DepthGroup(NamedTuple):
    """Rows of a core batch that are at the same `recursion`: the stream before it and the core's input, [N, dim].

    Only those with `marks` take it (None: all). The others are computed for nothing and must not change.
    """

    recursion: int
    rows: Rows
    stream: Tensor
    marks: Tensor | None


class Exit(NamedTuple):
    """What an exit batch has computed: the coda's result `x` [N, dim], and of the n rows that predict a token, their
    `logits` [n, vocab] and the most likely `tokens` [n]. `finite` [N] are the rows without NaN or infinity.
    """

    x: Tensor
    finite: Tensor
    logits: Tensor
    tokens: Tensor


class Runner:
    """A model, its KV cache and what is known of the tokens in flight.

    The state of tokens has one slot more than the scheduler knows, for the padding rows of `graphs`.
    """

    def __init__(
        self, model: Transformer, layers: Layers, flight: Flight, num_pages: dict[str, int], transposed: bool = False
    ) -> None:
        self.model, self.layers, self.flight = model, layers, flight
        self.device = model.embed.weight.device
        self.cache = PagedCache(model, layers, flight, num_pages, transposed)
        # [index][recursion]: the table that the block at `index` reads, and whether it writes to it.
        by_index = list(zip(*layers.access, strict=True))
        self.reads = [np.array([layers.table_of[access.table] for access in row]) for row in by_index]
        self.writes = [np.array([access.writes for access in row]) for row in by_index]
        self.chains = {name: list(self.chain(name)) for name in ("prelude", "core", "coda")}
        stage = model.stage
        # What only the core's input has isn't in the stream that its output is combined with.
        self.changes_input = stage is not None and (
            stage.injection is not None or stage.recursion_embedding is not None
        )
        # Named tensors with one row per slot: what is known of the tokens in flight.
        self.state: dict[str, Tensor] = {}
        self.all_rows = torch.arange(max(flight.num_slots, 1), device=self.device)
        # By recursion. Only the weights that are numbers are used; those that differ between rows are in `state`.
        self.mixes: dict[int, Mix] = {}
        # The session of the last entry batch. It serves as the pattern for sessions of other rows.
        self.session: RoutingSession | None = None
        # Whether the router decides who takes the first recursion.
        self.asks_first = True
        # By seat, the last token of each sequence, if the host may not have read it when the sequence enters again.
        self.drawn: Tensor | None = None
        self.graphs: BatchGraphs | None = None

    def chain(self, name: str) -> Iterator[tuple[nn.Module, Sequence[Tensor], bool]]:
        """Block, pages and whether it has a sliding window, for all of "prelude", "coda" or, if uniform, "core"."""
        stage = self.model.stage
        if name != "core":
            blocks, layers = getattr(self.model, name), self.cache.pages.get("edge", [])
            for number, block in enumerate(blocks):
                layer = number + (len(self.model.prelude) if name == "coda" else 0)
                yield block, layers[layer], number in self.cache.sliding[name]
        elif stage is not None and self.layers.uniform:
            for block, access in zip(self.layers.schedule[0], self.layers.access[0], strict=True):
                yield stage.blocks[block], self.cache.pages["core"][access.layer], block in stage.sliding

    def put(self, name: str, slots: Tensor, values: Tensor, marks: Tensor | None = None) -> None:
        """Set the rows of `slots` [N] in the state tensor `name`, only those with `marks` [N] if there are any.

        The state is zero where nothing was set yet.
        """
        if name not in self.state:
            self.state[name] = values.new_zeros(self.flight.num_slots + 1, *values.shape[1:])
        if marks is not None:
            values = torch.where(marks.view(-1, *(1,) * (values.dim() - 1)), values, self.get(name, slots))
        self.state[name].index_copy_(0, slots, values)

    def get(self, name: str, slots: Tensor) -> Tensor:
        """The rows of `slots` [N] in the state tensor `name`."""
        return self.state[name].index_select(0, slots)

    @torch.inference_mode()
    def record_graphs(self, widest: int, record: Record) -> None:
        """From now on replay batches of up to `widest` rows as graphs.

        Raises:
            ConfigError: a batch can't be recorded.
        """
        nowhere: dict[Kind, int] = dict.fromkeys(("entry", "exit"), self.cache.nowhere.get("edge", 0))
        if self.layers.uniform and self.layers.num_recursions:
            nowhere["core"] = self.cache.nowhere["core"]
        spare = self.flight.num_slots, len(self.flight.pages) - 1, self.flight.num_seats
        try:
            self.graphs = BatchGraphs(self.recorded, nowhere, *spare, widest, self.device, record)
        except RuntimeError as error:  # such as a router that reads from the device
            raise ConfigError(
                f"batches can't be recorded as CUDA graphs; start with --no-cuda-graphs: {error}"
            ) from error

    # Batches.

    def enter(self, batch: ScheduledBatch) -> IncomingMarks:
        """Embedding, prelude and routing; returns which rows take the first recursion."""
        count = len(batch.slots)
        replayed = self.graphs is not None and self.graphs.fits(count)
        self.cache.send_tables(in_graph=replayed)
        self.cache.copy(batch.copies)
        numbers, stage = self.edge_numbers(batch.slots), self.model.stage
        if stage is not None and stage.router.reads_text:
            numbers[TEXT] = text_column(batch.chunks)
        kept: Tensor | None
        if self.graphs is not None and replayed:
            (kept,) = self.graphs.run("entry", numbers)
        else:
            kept = self.enter_rows(*self.edge_call(numbers))
        if stage is None:
            return IncomingMarks(count, [])
        # A graph answers for every row, even if the router isn't asked.
        return IncomingMarks(count, [(count, kept if self.asks_first else None)])

    def core(self, batch: ScheduledBatch) -> IncomingMarks:
        """One recursion for every row; returns which rows take the next."""
        count = len(batch.slots)
        # Nobody has to ask who takes a recursion after the last.
        ends = batch.bounds[self.layers.num_recursions - 1]
        numbers = self.core_numbers(batch.slots, 0)
        if self.layers.uniform and self.graphs is not None and self.graphs.fits(count):
            # Stopped rows (policy full) belong to no recursion here.
            numbers[RECURSION, numbers[ACTIVE] == 0] = NO_RECURSION
            (found,) = self.graphs.run("core", numbers)
            return IncomingMarks(count, [(ends, found[:ends])] if ends else [])
        rows = self.cache.rows(numbers)
        groups = self.group_by_depth(batch, rows, numbers)
        parts = torch.split(self.run_core(groups, batch, rows, numbers), [len(group.stream) for group in groups])
        outcomes = [(len(y), self.finish_recursion(group, y)) for group, y in zip(groups, parts, strict=True)]
        return IncomingMarks(count, outcomes if ends == count else outcomes[:-1])

    def exit(self, batch: ScheduledBatch, predicting: Sequence[int], seats: Sequence[int]) -> Exit:
        """The coda of all rows, norm and head of those that are `predicting` a token for the sequences in `seats`."""
        numbers, count = self.edge_numbers(batch.slots), len(predicting)
        if self.graphs is not None and self.graphs.fits(len(batch.slots)):
            numbers[DRAWER] = self.flight.num_seats
            numbers[ROW, :count], numbers[DRAWER, :count] = predicting, seats
            x, finite, logits, tokens = self.graphs.run("exit", numbers)
            return Exit(x, finite, logits[:count], tokens[:count])
        x = self.exit_rows(*self.edge_call(numbers))
        places = self.cache.tensor([predicting, seats])
        return self.predict(x, None if count == len(x) else places[0], places[1])

    def predict(self, x: Tensor, rows: Tensor | None, seats: Tensor) -> Exit:
        """Norm and head of `rows` [n] of x (None: all); other rows, inside prompts, predict what is known."""
        logits = self.model.readout(x if rows is None else x.index_select(0, rows))
        tokens = most_likely(logits)
        self.note_drawn(seats, tokens)
        return Exit(x, x.isfinite().all(1), logits, tokens)

    def note_drawn(self, seats: Tensor, tokens: Tensor) -> None:
        """Keep `tokens` [n] for the next entry, where the host may not have read them by then."""
        if self.drawn is not None:
            # Where there is none, the sequence ends, but it may enter once more before the host knows.
            self.drawn.index_copy_(0, seats, tokens.clamp(min=0))

    def edge_numbers(self, slots: Ints) -> Ints:
        """What blocks outside the core are told of `slots`."""
        table = self.layers.table_of.get(EVERY_TOKEN, 0)
        return self.flight.launch(slots, table, True, self.cache.nowhere.get("edge", 0), self.cache.window)

    def core_numbers(self, slots: Ints, index: int) -> Ints:
        """What the block at `index` of every recursion is told of `slots`."""
        flight, recursions = self.flight, self.flight.rows[RECURSION, slots]
        writes = self.writes[index][recursions] & (flight.rows[ACTIVE, slots] > 0)
        return flight.launch(
            slots, self.reads[index][recursions], writes, self.cache.nowhere["core"], self.cache.window
        )

    def edge_call(self, numbers: Ints) -> tuple[Rows, BlockCall]:
        """The rows with these `numbers`, and what blocks outside the core are told of them."""
        rows = self.cache.rows(numbers)
        return rows, self.cache.block_call(rows, numbers, self.cache.nowhere.get("edge", 0))

    def recorded(self, kind: Kind, numbers: Tensor) -> tuple[Tensor, ...]:
        """What a graph computes for the rows with these `numbers` [NUM_COLUMNS, width] on the device."""
        rows = Rows(numbers, bounded=True)
        call = self.cache.block_call(rows)
        if kind == "exit":
            # A sequence predicts one token at a time.
            predicting, seats = numbers[ROW : DRAWER + 1, : self.flight.num_seats]
            return self.predict(self.exit_rows(rows, call), predicting, seats)
        if kind == "entry":
            self.cache.apply_changes()
            kept = self.enter_rows(rows, call)
            return (rows.slots >= 0 if kept is None else kept,)
        # The rows of a recursion aren't known when the graph is recorded. So every recursion is finished for all rows,
        # and changes its own.
        stream = self.get("stream", rows.slots)
        groups = [
            DepthGroup(recursion, rows, stream, rows.numbers[RECURSION] == recursion)
            for recursion in range(self.layers.num_recursions)
        ]
        x = stream
        for group in groups if self.changes_input else ():
            assert group.marks is not None
            x = torch.where(group.marks.unsqueeze(1), self.core_input(group), x)
        y = self.run_blocks("core", x, call)
        kept = torch.zeros_like(rows.slots, dtype=torch.bool)
        for group in groups:
            continues = self.finish_recursion(group, y)
            if continues is not None:
                kept = kept | continues
        return (kept,)

    def enter_rows(self, rows: Rows, call: BlockCall) -> Tensor | None:
        """Which rows [N] take the first recursion; None for all, and for a model without a core."""
        tokens = rows.numbers[TOKEN]
        if self.drawn is not None:
            tokens = tokens.where(tokens != UNREAD_TOKEN, self.drawn.index_select(0, rows.numbers[SEAT]))
        x = self.run_blocks("prelude", self.model.embedded(tokens), call)
        self.put("stream", rows.slots, x)
        stage = self.model.stage
        if stage is None:
            return None
        self.put("input", rows.slots, x)
        # Emitted outputs add up over the recursions, and the slot still has the sum of the token before.
        if "emitted" in self.state:
            self.put("emitted", rows.slots, torch.zeros_like(x))
        context = replace(rows.context, text=rows.numbers[TEXT]) if stage.router.reads_text else rows.context
        session = self.session = stage.begin(x, context)
        kept = self.route(session, 0, x, rows, None)
        self.asks_first = kept is not None
        return kept

    def exit_rows(self, rows: Rows, call: BlockCall) -> Tensor:
        """The coda's result [N, dim]."""
        x = self.get("emitted" if "emitted" in self.state else "stream", rows.slots)
        return self.run_blocks("coda", x, call)

    # Blocks.

    def run_blocks(self, name: Kind | str, x: Tensor, call: BlockCall) -> Tensor:
        """x [N, dim] through the blocks of "prelude", "coda" or, if it is uniform, "core"."""
        for block, store, slides in self.chains[name]:
            x = call.apply(block, x, store, slides)
        return x

    def run_core(self, groups: Sequence[DepthGroup], batch: ScheduledBatch, rows: Rows, numbers: Ints) -> Tensor:
        """The `rows` of `groups`, those of `batch`, through the blocks of the core, [N, dim]."""
        parts, nowhere = [self.core_input(group) for group in groups], self.cache.nowhere["core"]
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.layers.uniform:
            return self.run_blocks("core", x, self.cache.block_call(rows, numbers, nowhere))
        stage, access = self.model.stage, self.layers.access
        assert stage is not None
        # Most blocks of a batch read and write the same tables. Building a call can cost more than the block computes.
        calls: dict[tuple[Any, ...], BlockCall] = {}
        for index in range(len(self.layers.schedule[0])):
            outs = []
            for block, depths in self.layers.runs(index, batch.depths):
                first, end = batch.bounds[depths[0]], batch.bounds[depths[-1] + 1]
                accesses = [access[recursion][index] for recursion in depths]
                key = (first, end, *((access.table, access.writes) for access in accesses))
                if key not in calls:
                    numbers = self.core_numbers(batch.slots[first:end], index)
                    calls[key] = self.cache.block_call(self.cache.rows(numbers), numbers, nowhere)
                store, slides = self.cache.pages["core"][accesses[0].layer], block in stage.sliding
                outs.append(calls[key].apply(stage.blocks[block], x[first:end], store, slides, depths[0]))
            x = outs[0] if len(outs) == 1 else torch.cat(outs)
        return x

    # Routing.

    def group_by_depth(self, batch: ScheduledBatch, rows: Rows, numbers: Ints) -> list[DepthGroup]:
        """The `rows` of a core batch, recursion by recursion."""
        active = numbers[ACTIVE] > 0
        stream, marks = self.get("stream", rows.slots), None if active.all() else self.cache.tensor(active).bool()
        if len(batch.depths) == 1:
            return [DepthGroup(batch.depths[0], rows, stream, marks)]
        sizes = [end - first for first, end in pairwise(batch.bounds) if end > first]
        parts = zip(batch.depths, torch.split(rows.numbers, sizes, 1), torch.split(stream, sizes), strict=True)
        # Only under the policy full are there rows that don't take their recursion, and there all have the same.
        return [DepthGroup(recursion, Rows(own, rows.bounded), x, None) for recursion, own, x in parts]

    def core_input(self, group: DepthGroup) -> Tensor:
        """What the core's blocks see of a group's stream."""
        if not self.changes_input:
            return group.stream
        assert self.model.stage is not None
        return self.model.stage.core_input(group.recursion, group.stream, self.get("input", group.rows.slots))

    def finish_recursion(self, group: DepthGroup, y: Tensor) -> Tensor | None:
        """Combine the core's output y [N, dim] with the stream before it, and ask the router who continues, [N].

        None if it doesn't ask: all continue, or none after the last recursion.
        """
        assert self.session is not None
        recursion, rows, before, marks = group
        slots = rows.slots
        # The session of the last entry batch, given the state of these rows: they may have entered in other batches.
        state = {name: self.get(f"router.{name}", slots) for name in self.session.state()}
        session = self.session.regrouped(rows.context, state)
        mix = self.mixes[recursion]
        tensors = [name for name in MIX_WEIGHTS if isinstance(getattr(mix, name), Tensor)]
        stored: dict[str, Any] = {name: self.get(f"mix.{name}", slots) for name in tensors}
        candidates = self.candidates(len(y), marks)
        plan = RoutingPlan(candidates, None, replace(mix, **stored))
        mix = session.mix(recursion, plan, y)
        if mix.emit is not None:
            emitted = weighted(mix.emit, y).to(y.dtype)
            if "emitted" in self.state:
                emitted = emitted + self.get("emitted", slots)
            self.put("emitted", slots, emitted, marks)
        stage_input = before if mix.from_input is None else self.get("input", slots)
        x = combine(mix, before, y, stage_input, plan)
        self.put("stream", slots, x, marks)
        if recursion + 1 == self.layers.num_recursions:
            return None
        return self.route(session, recursion + 1, x, rows, marks)

    def route(
        self, session: RoutingSession, recursion: int, x: Tensor, rows: Rows, marks: Tensor | None
    ) -> Tensor | None:
        """Which of the marked rows take `recursion`, [N], given the stream x [N, dim] of all `rows`; None for all.

        Raises:
            ConfigError: the router selects other tokens than those it was given.
        """
        plan = session.route(recursion, x, self.candidates(len(x), marks))
        # The rows that take this recursion together may have been routed in different batches. So weights that differ
        # between rows are stored by slot. Which weights those are depends on the router alone.
        self.mixes[recursion] = plan.mix
        for name in MIX_WEIGHTS:
            weight = getattr(plan.mix, name)
            if isinstance(weight, Tensor):
                self.put(f"mix.{name}", rows.slots, weight, marks)
        if not isinstance(plan.tokens, MarkedSet) or plan.tokens.index is not None:
            raise ConfigError(FOREIGN_SET.format(recursion=recursion))
        for name, value in session.state().items():
            self.put(f"router.{name}", rows.slots, value, marks)
        return plan.tokens.kept

    def candidates(self, count: int, marks: Tensor | None) -> MarkedSet:
        """The marked ones (None: all) of `count` rows, for the router to select among."""
        return replace(MarkedSet.of(self.all_rows[:count]), kept=marks)


class IncomingMarks:
    """Which of the `count` rows of a batch take the next recursion: the marks of `outcomes`, each with their number, in
    order. None marks all; rows beyond the last outcome are not marked.
    """

    # A batch waits for the device in `read` only: for one transfer, however many depths share the batch.
    def __init__(self, count: int, outcomes: Sequence[tuple[int, Tensor | None]]) -> None:
        self.count, self.sizes = count, [(size, kept is not None) for size, kept in outcomes]
        asked = [kept for _, kept in outcomes if kept is not None]
        self.incoming = Incoming(torch.cat(asked) if len(asked) > 1 else asked[0]) if asked else None

    def read(self) -> Marks:
        """The marks [count], once they have arrived."""
        marks = np.zeros(self.count, np.bool_)
        found = np.array(self.incoming.tolist() if self.incoming else (), np.bool_)
        first = taken = 0
        for size, asked in self.sizes:
            marks[first : first + size] = found[taken : taken + size] if asked else True
            first, taken = first + size, taken + size * asked
        return marks


def text_column(chunks: Sequence[Chunk]) -> Ints:
    """`RoutingContext.text` of all rows of `chunks`."""
    texts = [chunk.sequence.tokens[: chunk.start + chunk.length] for chunk in chunks]
    order = np.concatenate([np.arange(len(text)) for text in texts])
    keys = text_keys(torch.from_numpy(integers(texts)), torch.from_numpy(order))
    found = torch.split(keys, [len(text) for text in texts])
    column: Ints = torch.cat([own[-chunk.length :] for own, chunk in zip(found, chunks, strict=True)]).numpy()
    return column
