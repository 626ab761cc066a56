"""The KV cache on the device: pages of keys and values, page tables, and what blocks are told about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megamor.model import Transformer
from megamor.model.blocks import RotaryAngles, rotary_angles
from megamor.routing import DepthBounds, RoutingContext
from megamor.routing.plan import to_device
from megamor.serve.engine import attention
from megamor.serve.engine.attention import GatherLayout, Layout, PagedKeysValues, fixed_layout
from megamor.serve.engine.cpu_kernels import LANES, Sight
from megamor.serve.engine.flight import (
    ADDRESS,
    BEGIN,
    END,
    LEAST,
    MOST,
    OWNER,
    POSITION,
    SLOT,
    Flight,
    Ints,
    Marks,
    integers,
)
from megamor.serve.engine.layers import Layers
from megamor.serve.engine.prefix import PageCopy

# Of page tables, in memory that is there already, from which a graph takes all of them.
MOST_CHANGES = 256


class Rows(NamedTuple):
    """`Flight.launch` on the device: `numbers` [NUM_COLUMNS, N]. Only if `bounded` may depths have bounds."""

    numbers: Tensor
    bounded: bool

    @property
    def slots(self) -> Tensor:
        return self.numbers[SLOT]

    @property
    def context(self) -> RoutingContext:
        """What the router is told."""
        # Without bounds where no row has any, which is the rule: routers skip the comparison then.
        bounds = DepthBounds(*self.numbers[LEAST : MOST + 1]) if self.bounded else None
        return RoutingContext(self.numbers.shape[1], 1, "causal", 0, self.numbers[POSITION], bounds)


@dataclass(frozen=True)
class BlockCall:
    """What a block is told about its rows: angles and what they see, without a sliding window and with one; and which
    `rows` (None: all) write to `addresses`."""

    sights: list[tuple[RotaryAngles, Layout | Sight]]
    addresses: Tensor
    rows: Tensor | None

    def apply(self, block: nn.Module, x: Tensor, store: Sequence[Tensor], slides: bool, recursion: int = 0) -> Tensor:
        """x [N, dim] to [N, dim]."""
        k, v = store
        y: Tensor = block(x, *self.sights[slides], PagedKeysValues(k, v, self.addresses, self.rows), recursion)[0]
        return y


class SentNumbers:
    """Numbers [n, width] on a device, at a fixed place that a graph may read."""

    def __init__(self, numbers: Ints, device: torch.device) -> None:
        self.there = to_device(numbers, device)
        # Pinned, and used again for each batch: allocating it and copying twice took longer than launching the graph.
        self.here = torch.empty(self.there.shape, dtype=self.there.dtype, pin_memory=device.type == "cuda")
        self.array: Ints = self.here.numpy()
        self.sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, numbers: Ints, padding: Ints) -> None:
        """Copy `numbers` [n, N], and `padding` [n, width or more] in the columns behind them."""
        if self.sent is not None:
            self.sent.synchronize()  # the host may be ahead of the copy before
        count = numbers.shape[1]
        self.array[:, :count], self.array[:, count:] = numbers, padding[:, count : self.array.shape[1]]
        self.there.copy_(self.here, non_blocking=True)
        if self.sent is not None:
            self.sent.record()


class PagedCache:
    """The pages of all layers, and the page tables of `flight`. Each pool has one page more than the scheduler knows.

    The padding rows of graphs write to it, and with `transposed` keys, for the kernels of a CPU, rows that don't write.
    """

    def __init__(
        self, model: Transformer, layers: Layers, flight: Flight, num_pages: dict[str, int], transposed: bool = False
    ) -> None:
        self.flight, self.num_recursions, self.transposed = flight, layers.num_recursions, transposed
        weight, config = model.embed.weight, model.config.model
        self.device, self.dtype = weight.device, weight.dtype
        self.sliding = {segment.name: segment.sliding for segment in model.segments}
        self.window = config.sliding_window or 0 if any(self.sliding.values()) else 0
        size, heads = flight.page_size, config.num_kv_heads
        values = size, heads, config.head_dim
        keys = (heads, size // LANES, config.head_dim, LANES) if transposed else values
        self.pages = {
            pool: [
                tuple(
                    torch.zeros(num_pages[pool] + 1, *shape, dtype=self.dtype, device=self.device)
                    for shape in (keys, values)
                )
                for _ in range(count)
            ]
            for pool, count in layers.in_pool.items()
        }
        # Addresses on the spare page of each pool.
        self.nowhere = {pool: count * flight.page_size for pool, count in num_pages.items()}
        # On a CPU this is the scheduler's own memory; elsewhere a copy, to which only changes are sent.
        self.tables = torch.from_numpy(flight.pages)
        if self.device.type != "cpu":
            self.tables = torch.zeros_like(self.tables, dtype=torch.int64, device=self.device)
        # Places and pages: by default, page 0 at the end of the table that belongs to no sequence.
        self.no_changes = np.tile([[self.tables.numel() - 1], [0]], MOST_CHANGES)
        self.changes = SentNumbers(self.no_changes, self.device)
        positions = torch.arange(config.max_seq_len, device=self.device)
        angles = [rotary_angles(positions, config, self.dtype, slides) for slides in self.sights]
        self.angles = [(own.cos, own.signed_sin) for own in angles]

    @property
    def sights(self) -> tuple[bool, ...]:
        """Which kinds of blocks there are: without a sliding window, and with one."""
        return (False, True) if self.window else (False,)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages, in the given order."""
        for copy in copies:
            for layer in self.pages[copy.pool]:
                for pages in layer:
                    pages[copy.target] = pages[copy.source]

    def send_tables(self, in_graph: bool = False) -> None:
        """Send the changes of page tables to the device; `in_graph`: the entry that is replayed next applies them."""
        changes, self.flight.changes = self.flight.changes, {}
        if self.device.type == "cpu" or not changes:
            return  # applied again, the last ones change nothing
        numbers = integers((changes.keys(), changes.values())).reshape(2, -1)
        if len(changes) > MOST_CHANGES:  # long prompts
            self.tables.view(-1).index_copy_(0, *self.tensor(numbers))
            numbers = numbers[:, :0]
        self.changes.send(numbers, self.no_changes)
        if not in_graph:
            self.apply_changes()

    def apply_changes(self) -> None:
        """Write the changes that were sent last to the page tables on the device."""
        if self.device.type != "cpu":
            self.tables.view(-1).index_copy_(0, *self.changes.there)

    def block_call(self, rows: Rows, numbers: Ints | None = None, nowhere: int = -1) -> BlockCall:
        """How blocks are called on `rows`, whose `numbers` may depend on the batch. In a graph (None) they may not."""
        sights, addresses, writers, positions = [], rows.numbers[ADDRESS], None, rows.numbers[POSITION]
        for slides, (cos, sin) in zip(self.sights, self.angles, strict=True):
            angles = RotaryAngles(cos.index_select(0, positions), sin.index_select(0, positions))
            sights.append((angles, self.layout(rows, numbers, slides)))
        if not self.transposed and numbers is not None and not (writes := numbers[ADDRESS] != nowhere).all():
            writers = self.tensor(writes.nonzero()[0])
            addresses = addresses.index_select(0, writers)
        return BlockCall(sights, addresses, writers)

    def layout(self, rows: Rows, numbers: Ints | None, slides: bool) -> Layout | Sight:
        """What `rows` see in blocks with a sliding window (`slides`) or without."""
        size, chosen = self.flight.page_size, (OWNER, END, BEGIN) if slides else (OWNER, END)
        if self.transposed:
            own = rows.numbers.numpy() if numbers is None else numbers
            return Sight.of(self.flight.pages, own[ADDRESS], *(own[column] for column in chosen))
        if numbers is None or attention.reads_in_place(self.device):
            seen, known = (rows.numbers[column] for column in chosen), None if numbers is None else numbers[OWNER]
            return fixed_layout(self.tables, *seen, size=size, dtype=self.dtype, known=known)
        columns = (numbers[column] for column in chosen)
        return GatherLayout.of(self.flight.pages, *columns, size=size, dtype=self.dtype, device=self.device)

    def rows(self, numbers: Ints) -> Rows:
        """`numbers` on the device, in one transfer."""
        most = self.num_recursions
        bounded = bool(numbers[LEAST].any() or numbers[MOST].min() < most)
        return Rows(self.tensor(numbers), bounded)

    def tensor(self, numbers: Sequence[Any] | Ints | Marks) -> Tensor:
        """Integers on the device."""
        return to_device(numbers, self.device)
