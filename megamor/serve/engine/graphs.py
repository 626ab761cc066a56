"""Small batches as CUDA graphs: recorded at the start for each kind of batch and a few widths, then replayed.

Launching the kernels of a few rows one by one takes longer than running them. A graph launches all of a batch at once,
from gathering the state of its tokens to asking the router and storing what it said, but its shapes and addresses are
fixed. So a batch is padded to the next width, and everything that differs between batches is one matrix of integers
(`Flight.launch`), which is copied to where the graph reads it. Page tables are on the device, as long as the context
requires, and the matrix says which of their rows to read. Padding rows have the spare slot, belong to no recursion,
write to the spare last page of a pool and read one entry of the page table that belongs to no sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megamor.routing.plan import to_device
from megamor.serve.engine.flight import ADDRESS, END, NUM_COLUMNS, OWNER, RECURSION, SLOT, Ints

Kind = Literal["entry", "core", "exit"]
NO_RECURSION = -1
# Runs and records a function. Returns its result and a replay, which computes it again into the same memory.
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]


class SentNumbers:
    """The numbers [NUM_COLUMNS, width] of a batch in memory that a graph reads."""

    def __init__(self, numbers: Ints, device: torch.device) -> None:
        self.there = to_device(numbers, device)
        # Pinned, and used again for each batch: allocating it and copying twice took longer than launching the graph.
        self.here = torch.empty(self.there.shape, dtype=self.there.dtype, pin_memory=device.type == "cuda")
        self.array: Ints = self.here.numpy()
        self.sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, numbers: Ints, padding: Ints) -> None:
        """Copy `numbers` [NUM_COLUMNS, N], and `padding` in the columns behind them."""
        if self.sent is not None:
            self.sent.synchronize()  # the host may be ahead of the copy before
        count = numbers.shape[1]
        self.array[:, :count], self.array[:, count:] = numbers, padding[:, count : self.array.shape[1]]
        self.there.copy_(self.here, non_blocking=True)
        if self.sent is not None:
            self.sent.record()


class RecordedGraph(NamedTuple):
    """A recorded batch of fixed width: its `numbers` and its result `out`, a row for each."""

    numbers: SentNumbers
    out: Tensor
    replay: Callable[[], object]


def graph_widths(widest: int) -> list[int]:
    """Widths of graphs for batches of up to `widest` rows: 1, 2, 4, multiples of 8, and from 64 on steps of a quarter
    to an eighth."""
    # Rows of padding cost little. More widths would take more GPU memory and more time to record.
    widths = [1, 2, 4, 8]
    while widths[-1] < widest:
        widths.append(widths[-1] + max(8, (1 << widths[-1].bit_length() - 1) // 4))
    return sorted({min(width, widest) for width in widths})


class BatchGraphs:
    """Graphs of `compute` for batches of each kind in `nowhere` and up to `widest` rows.

    `nowhere` are the addresses that padding rows write to, `slot` and `owner` their state and page table.
    """

    def __init__(
        self,
        compute: Callable[[Kind, Tensor], Tensor],
        nowhere: Mapping[Kind, int],
        slot: int,
        owner: int,
        widest: int,
        device: torch.device,
        record: Record,
    ) -> None:
        self.widths = graph_widths(widest)
        self.padding = {kind: np.zeros((NUM_COLUMNS, self.widths[-1]), np.int64) for kind in nowhere}
        self.recorded: dict[tuple[Kind, int], RecordedGraph] = {}
        for kind, numbers in self.padding.items():
            numbers[[SLOT, OWNER, ADDRESS, END, RECURSION]] = [[slot], [owner], [nowhere[kind]], [1], [NO_RECURSION]]
            # Once before anything is recorded: the first batch allocates the state of tokens, of which the graphs of
            # all kinds need to know.
            compute(kind, to_device(numbers[:, :1], device))
        for width in reversed(self.widths):  # The widest first: the others fit into the memory it needs.
            for kind, numbers in self.padding.items():
                sent = SentNumbers(numbers[:, :width], device)
                self.recorded[kind, width] = RecordedGraph(
                    sent,
                    *record(lambda kind=kind, buffer=sent.there: compute(kind, buffer)),  # type: ignore[misc]
                )

    def fits(self, num_rows: int) -> bool:
        """Whether there is a graph for so many rows."""
        return num_rows <= self.widths[-1]

    def run(self, kind: Kind, numbers: Ints) -> Tensor:
        """The result for the rows with these `numbers` [NUM_COLUMNS, N]. It lasts until the next batch of any kind."""
        count = numbers.shape[1]
        width = next(width for width in self.widths if width >= count)
        graph = self.recorded[kind, width]
        graph.numbers.send(numbers, self.padding[kind])
        graph.replay()
        return graph.out[:count]


def cuda_recorder(device: torch.device) -> Record:
    """A `Record` of CUDA graphs on `device`, which share one memory pool for what they compute."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            # Libraries choose their kernels and allocate workspaces in the first calls, which must not be recorded.
            with torch.cuda.stream(side):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = run()
            return out, graph.replay

    return record
