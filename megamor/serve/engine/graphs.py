"""Small batches as CUDA graphs: recorded once for a width, replayed for every batch that fits.

Launching the kernels of a few rows one by one takes longer than running them. A graph launches all kernels of a chain
of blocks at once, but its shapes and addresses are fixed. So a batch is padded to one of a few widths and its page
tables to a power of two, and everything that differs between batches (the rows, their positions, where they read and
write) is copied into the buffers that the graph was recorded with. Padding rows write to the spare last page of a pool
and read one entry of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megamor.config import ModelConfig
from megamor.model.blocks import rotary_angles
from megamor.routing.plan import to_device
from megamor.serve.engine.attention import KVRows, PagedKeysValues, single_rows_layout

# Keys and values of a layer, [pages, page_size, kv_heads, head_dim] each.
Store = tuple[Tensor, ...]
# Runs and records a function. Returns its result and a replay, which computes it again into the same memory.
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]


class Chain(NamedTuple):
    """Blocks that run one after another, their keys and values, and which of them have a sliding window."""

    name: str
    blocks: Sequence[nn.Module]
    stores: Sequence[Store]
    slides: Sequence[bool]


@dataclass(frozen=True)
class RecordedGraph:
    """A recorded chain of fixed width: inputs x [width, dim] and `numbers` [4 + pages, width], result `out` like x.

    `numbers` has for each row its position, the address it writes to, how many entries it sees, the first of them in
    blocks with a sliding window, and their pages.
    """

    x: Tensor
    numbers: Tensor
    out: Tensor
    replay: Callable[[], object]


class BatchGraphs:
    """Graphs of chains of blocks for up to `widest` rows, each recorded when a batch first needs it."""

    def __init__(self, config: ModelConfig, page_size: int, widest: int, record: Record) -> None:
        self.config, self.page_size, self.record = config, page_size, record
        # Steps of 8 keep padding small. A wider range of widths would take more GPU memory and more time to record.
        self.widths: list[int] = sorted({1, 2, 4, *range(8, widest, 8), widest})
        self.recorded: dict[tuple[str, int, int], RecordedGraph] = {}

    def fits(self, num_rows: int) -> bool:
        """Whether there is a graph for so many rows."""
        return num_rows <= self.widths[-1]

    def run(self, chain: Chain, x: Tensor, rows: KVRows) -> Tensor:
        """x [N, dim], the given rows, through the blocks of `chain`."""
        spare = len(chain.stores[0][0]) - 1
        seen = [
            (view.pages, end, begin)
            for view in rows.views
            for end, begin in zip(view.ends, view.begins or [0] * len(view.ends), strict=True)
        ]
        width = next(width for width in self.widths if width >= len(x))
        # Longer tables are rounded up to a power of two, so that a growing text needs a new graph only log₂ n times.
        num_pages = 1 << (-(-max(end for _, end, _ in seen) // self.page_size) - 1).bit_length()
        nowhere = spare * self.page_size
        numbers = [
            [position, nowhere if address is None else address, end, begin, *(pages + [spare] * num_pages)[:num_pages]]
            for position, address, (pages, end, begin) in zip(rows.positions, rows.addresses, seen, strict=True)
        ]
        padding = [0, nowhere, 1, 0, *[spare] * num_pages]
        graph = self.recorded.get((chain.name, width, num_pages))
        if graph is None:
            graph = self.make(chain, x.new_zeros(width, x.shape[1]), to_device([padding] * width, x.device).T)
            self.recorded[chain.name, width, num_pages] = graph
        graph.numbers.copy_(to_device(numbers + [padding] * (width - len(x)), x.device).T)
        graph.x[: len(x)] = x
        graph.replay()
        # All graphs share one memory pool: the next replay, of another chain or width, may overwrite `out`.
        return graph.out[: len(x)].clone()

    def make(self, chain: Chain, x: Tensor, numbers: Tensor) -> RecordedGraph:
        """Record the blocks on x [width, dim] with `numbers`, all of padding rows."""
        numbers = numbers.contiguous()

        def run() -> Tensor:
            (positions, addresses, ends, begins), tables = numbers[:4].unbind(), numbers[4:].T
            sights = {
                slides: (
                    rotary_angles(positions, self.config, x.dtype, slides),
                    single_rows_layout(tables, ends, self.page_size, x.dtype, begins if slides else None),
                )
                for slides in {*chain.slides}
            }
            y = x
            for block, (k, v), slides in zip(chain.blocks, chain.stores, chain.slides, strict=True):
                y, _ = block(y, *sights[slides], PagedKeysValues(k, v, addresses, None))
            return y

        return RecordedGraph(x, numbers, *self.record(run))


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
