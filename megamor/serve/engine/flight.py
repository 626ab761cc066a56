"""What is in flight: sequences, their chunks, and NumPy arrays about their tokens that persist from batch to batch.

Each token in flight has a *slot*, each resident sequence a *seat*. The scheduler changes the rows that change; a batch
is built from the rows of its slots, without a loop over its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megamor.serve.engine.pages import PageTable, TableSpec
from megamor.serve.engine.prefix import PageCopy, PrefixBlock

Ints = NDArray[np.int64]
Marks = NDArray[np.bool_]
PageIds = NDArray[np.int32]

# The rows of `Flight.rows`, and of `Flight.launch` with those that say where a row writes and what it reads. In exits,
# ROW and DRAWER have the rows that predict a token, one after the other, and the seats it is drawn for.
SLOT, POSITION, SEAT, RECURSION, LEAST, MOST, TOKEN, DEPTH, ACTIVE, OWNER, ADDRESS, END, BEGIN, TEXT = range(14)
ROW, DRAWER = range(14, 16)
NUM_KEPT, NUM_COLUMNS = OWNER, DRAWER + 1
# In place of a token that was drawn but not read from the device yet.
UNREAD_TOKEN = -1


@dataclass(eq=False, slots=True)
class Chunk:
    """Tokens `start` to `start` + `length` of a sequence, in flight in `slots`. `stage` is the batch they wait for.

    What is known of each token is in `Flight`.
    """

    sequence: SequenceState
    start: int
    length: int
    slots: list[int]
    stage: Literal["entry", "core", "exit"] = "entry"


@dataclass(eq=False, slots=True)
class SequenceState:
    """A prompt and one continuation: the one with `index` of `request`. `number` is its order of arrival.

    `num_read` of its tokens are in the tables. `depths` are those of all tokens that were ever read, which are more
    after a preemption. `leader` is an earlier sequence with the same prompt, which this one waits for in order to find
    the prompt in the prefix cache. `reuse` False means that every prompt token must be read here, because the client
    wants to see what each predicts. What it has read is numbers up to token `checked`.
    """

    number: int
    tokens: list[int]
    prompt_length: int
    max_depth: int
    leader: SequenceState | None = None
    reuse: bool = True
    request: int = 0
    index: int = 0
    num_read: int = 0
    depths: list[int] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    chunk: Chunk | None = None
    seat: int = -1
    block: PrefixBlock | None = None
    cached_tokens: int | None = None
    checked: int = 0
    state: Literal["waiting", "resident", "doomed", "gone"] = "waiting"

    @property
    def unread(self) -> int:
        """Tokens that are not in the tables yet."""
        return len(self.tokens) - self.num_read

    @property
    def num_new(self) -> int:
        """Tokens of the continuation so far."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class ScheduledBatch:
    """What the engine runs next: the tokens in `slots`, chunk by chunk, after `copies` of pages.

    A core batch is in the order of recursions: those of recursion r are at `bounds[r]` to `bounds[r + 1]` of `slots`.
    It doesn't list its `chunks`.
    """

    kind: Literal["entry", "core", "exit"]
    slots: Ints
    chunks: Sequence[Chunk] = ()
    copies: Sequence[PageCopy] = ()
    bounds: Sequence[int] = ()

    @property
    def depths(self) -> list[int]:
        """The different recursions of a core batch."""
        return [r for r, (first, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)) if first < end]


def integers(parts: Iterable[Iterable[int]]) -> Ints:
    """The integers of all `parts`, in order."""
    return np.fromiter(chain.from_iterable(parts), np.int64)


def slots_of(chunks: Iterable[Chunk]) -> Ints:
    """The slots of all tokens of `chunks`."""
    return integers(chunk.slots for chunk in chunks)


class Flight:
    """See the module docstring.

    `rows` [NUM_KEPT, slots] has for each slot: the token's POSITION in its text, its sequence's SEAT, the next
    RECURSION of its chunk, the bounds LEAST and MOST of its depth, its TOKEN id, the recursions it has taken (DEPTH),
    and whether it takes the next one (ACTIVE).

    `pages` [tables · seats + 1, P] has the page tables, that of `table` and `seat` in row table · seats + seat; the
    last row belongs to no sequence. `before` [tables + 1, seats, context + 1] counts the tokens before a position that
    have an entry in a table: for a token that has one, this is its index. The last table is the one of recursions that
    have none.
    """

    def __init__(
        self, num_slots: int, num_seats: int, specs: Sequence[TableSpec], num_recursions: int, context: int, size: int
    ) -> None:
        self.num_slots, self.num_seats, self.specs, self.page_size = num_slots, num_seats, tuple(specs), size
        self.rows = np.zeros((NUM_KEPT, num_slots), np.int64)
        self.rows[SLOT] = np.arange(num_slots)
        self.pages = np.zeros((len(specs) * num_seats + 1, -(-context // size)), np.int32)
        # Memory that was never written to costs nothing, and few texts are as long as the context.
        self.before = np.zeros((len(specs) + 1, num_seats, context + 1), np.int32)
        self.every_token = [table for table, spec in enumerate(specs) if spec.recursion < 0]
        self.table_of = np.full(num_recursions + 1, len(specs))
        for table, spec in enumerate(specs):
            if spec.recursion >= 0:
                self.table_of[spec.recursion] = table
        # What has changed in `pages`, by place in the flattened array, for a copy on a device.
        self.changes: dict[int, int] = {}

    def seat(self, seat: int, tables: Sequence[PageTable], depths: Sequence[int]) -> None:
        """A sequence takes `seat`; `depths` are those of the tokens in its `tables`."""
        known = np.array(depths, np.int64)
        for table, spec in enumerate(self.specs):
            self.before[table, seat, 1 : len(known) + 1] = (known > spec.recursion).cumsum()
            self.set_pages(table, seat, tables[table].pages, 0)

    def set_pages(self, table: int, seat: int, pages: list[int], first: int) -> None:
        """Take over the pages of a table from index `first` on."""
        row = table * self.num_seats + seat
        self.pages[row, first : len(pages)] = pages[first:]
        begin = row * self.pages.shape[1]
        self.changes.update(zip(range(begin + first, begin + len(pages)), pages[first:], strict=True))

    def enter(self, slots: Ints, seats: Ints, starts: Ints, positions: Ints, tokens: Ints, most: Ints) -> None:
        """Tokens without a lower bound enter, in chunks that begin at `starts`; nothing says yet what they take."""
        rows = np.zeros((NUM_KEPT, len(slots)), np.int64)
        rows[SLOT], rows[POSITION], rows[SEAT], rows[TOKEN], rows[MOST] = slots, positions, seats, tokens, most
        self.rows[:, slots] = rows
        self.before[:-1, seats, positions + 1] = self.before[:-1, seats, starts]
        for table in self.every_token:
            self.before[table, seats, positions + 1] = positions + 1

    def places(self, table: int | Ints, seats: Ints, positions: Ints) -> Ints:
        """Where `before` has these, as one index: NumPy takes one in a third of the time that it needs for three."""
        found: Ints = (table * self.num_seats + seats) * self.before.shape[2] + positions
        return found

    def launch(self, slots: Ints, table: int | Ints, writes: bool | Marks, nowhere: int, window: int) -> Ints:
        """The numbers [NUM_COLUMNS, N] of a batch of `slots` whose blocks read `table`, one for all or one for each.

        An ADDRESS is page · page_size + offset in a pool; rows that don't write have `nowhere`. A row sees the first
        END entries of the pages in row OWNER of `pages`, in blocks with a sliding `window` only those from BEGIN on.
        """
        numbers = np.zeros((NUM_COLUMNS, len(slots)), np.int64)
        np.take(self.rows, slots, 1, numbers[:NUM_KEPT], "clip")
        seats, positions = numbers[SEAT], numbers[POSITION]
        owners = numbers[OWNER] = table * self.num_seats + seats
        before, places = self.before.reshape(-1), self.places(table, seats, positions)
        entries = before.take(places)
        page, offset = np.divmod(entries, self.page_size)
        pages = self.pages.reshape(-1).take(owners * self.pages.shape[1] + page)
        addresses = pages * np.int64(self.page_size) + offset
        numbers[ADDRESS] = addresses if writes is True else np.where(writes, addresses, nowhere)
        # A stopped row (policy full) has no entry. What it reads doesn't matter, but attention needs one, and one that
        # its chunk has written: what was there before may be NaN, and would reach the chunk's other rows.
        numbers[END] = np.maximum(before.take(places + 1), 1)
        if window:
            numbers[BEGIN] = before.take(places - positions + np.maximum(positions + 1 - window, 0))
        return numbers
