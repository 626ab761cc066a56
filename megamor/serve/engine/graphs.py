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
from megamor.serve.engine.cache import SentNumbers
from megamor.serve.engine.flight import ADDRESS, DRAWER, END, NUM_COLUMNS, OWNER, RECURSION, SLOT, Ints

Kind = Literal["entry", "core", "exit"]
NO_RECURSION = -1
Results = tuple[Tensor, ...]
# Runs and records a function. Returns its results and a replay, which computes them again into the same memory.
Record = Callable[[Callable[[], Results]], tuple[Results, Callable[[], object]]]


class RecordedGraph(NamedTuple):
    """A recorded batch of fixed width: its `numbers` and its results `out`, up to a row for each."""

    numbers: SentNumbers
    out: Results
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

    `nowhere` are the addresses that padding rows write to; `slot`, `owner` and `seat` their state, page table and what
    they draw a token for.
    """

    def __init__(
        self,
        compute: Callable[[Kind, Tensor], Results],
        nowhere: Mapping[Kind, int],
        slot: int,
        owner: int,
        seat: int,
        widest: int,
        device: torch.device,
        record: Record,
    ) -> None:
        self.widths = graph_widths(widest)
        self.padding = {kind: np.zeros((NUM_COLUMNS, self.widths[-1]), np.int64) for kind in nowhere}
        self.recorded: dict[tuple[Kind, int], RecordedGraph] = {}
        for kind, numbers in self.padding.items():
            padding = {SLOT: slot, OWNER: owner, ADDRESS: nowhere[kind], END: 1, RECURSION: NO_RECURSION, DRAWER: seat}
            numbers[[*padding]] = np.array([*padding.values()])[:, None]
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

    def run(self, kind: Kind, numbers: Ints) -> list[Tensor]:
        """The results for the rows with these `numbers` [NUM_COLUMNS, N], which last until the next batch."""
        count = numbers.shape[1]
        width = next(width for width in self.widths if width >= count)
        graph = self.recorded[kind, width]
        graph.numbers.send(numbers, self.padding[kind])
        graph.replay()
        return [result[:count] for result in graph.out]


def cuda_recorder(device: torch.device) -> Record:
    """A `Record` of CUDA graphs on `device`, which share one memory pool for what they compute."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Results]) -> tuple[Results, Callable[[], object]]:
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
