"""Narrow launches as CUDA graphs: recorded once for a width, replayed for every launch that fits.

Starting the kernels of a few rows takes longer than running them. A graph starts all of a chain of blocks at once, but
has fixed shapes and addresses. So a launch is filled up to the next of a few widths and its page tables to a power of
two; whatever differs from launch to launch (the rows, their positions, where they read and write) is copied into the
buffers that the graph was recorded with. Rows that fill up write into the last page, which is nobody's, and see one
entry of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megamor.config import ModelConfig
from megamor.model.blocks import rotary_angles
from megamor.serve.engine.paged_attention import PagedKeysValues, Reading, single_rows_layout
from megamor.serve.engine.transfer import to_device

Store = tuple[Tensor, ...]
"""Keys and values of a layer, [pages, page_size, kv_heads, head_dim] each."""
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""Runs and records a function; returns its result, and what computes it anew into the same place."""


@dataclass(frozen=True)
class Recorded:
    """A launch of fixed width: x [width, dim] and `numbers` [3 + pages, width] go in, `out` [width, dim] comes out.

    Of each row, `numbers` has its position, the place in the pages that it writes, the entries that it sees, and the
    pages that hold them.
    """

    x: Tensor
    numbers: Tensor
    out: Tensor
    replay: Callable[[], object]


class LaunchGraphs:
    """Graphs of chains of blocks, recorded when a launch first needs them. Launches have up to `widest` rows."""

    def __init__(self, config: ModelConfig, page_size: int, widest: int, record: Record) -> None:
        self.config, self.page_size, self.record = config, page_size, record
        self.widths = sorted({1, 2, 4, *range(8, widest, 8), widest})
        self.recorded: dict[tuple[str, int, int], Recorded] = {}

    @property
    def widest(self) -> int:
        """Rows of the widest launch."""
        return self.widths[-1]

    def run(
        self,
        chain: str,
        blocks: Sequence[nn.Module],
        stores: Sequence[Store],
        x: Tensor,
        positions: Sequence[int],
        places: Sequence[int | None],
        readings: Sequence[Reading],
    ) -> Tensor:
        """x [N, dim] through the `blocks` of a chain, always the same under its name, with their keys and values.

        `places` count entries through all pages; a row with None writes nothing.
        """
        spare = len(stores[0][0]) - 1
        rows = [(reading.pages, end) for reading in readings for end in reading.ends]
        width = next(width for width in self.widths if width >= len(x))
        num_pages = 1 << (-(-max(end for _, end in rows) // self.page_size) - 1).bit_length()
        nowhere = spare * self.page_size
        numbers = [
            [position, nowhere if place is None else place, end, *(pages + [spare] * num_pages)[:num_pages]]
            for position, place, (pages, end) in zip(positions, places, rows, strict=True)
        ]
        filler = [0, nowhere, 1, *[spare] * num_pages]
        launch = self.recorded.get((chain, width, num_pages))
        if launch is None:
            launch = self.make(blocks, stores, x.new_zeros(width, x.shape[1]), to_device([filler] * width, x.device).T)
            self.recorded[chain, width, num_pages] = launch
        launch.numbers.copy_(to_device(numbers + [filler] * (width - len(rows)), x.device).T)
        launch.x[: len(x)] = x
        launch.replay()
        return launch.out[: len(x)].clone()  # the next graph may use the memory

    def make(self, blocks: Sequence[nn.Module], stores: Sequence[Store], x: Tensor, numbers: Tensor) -> Recorded:
        """Record the blocks on x [width, dim] with `numbers`, which are of rows that do nothing."""
        numbers = numbers.contiguous()
        head_dim, theta = self.config.head_dim, self.config.rope_theta

        def launch() -> Tensor:
            (positions, places, ends), tables = numbers[:3].unbind(), numbers[3:].T
            angles = rotary_angles(positions, head_dim, theta, x.dtype)
            layout = single_rows_layout(tables, ends, self.page_size, x.dtype)
            y = x
            for block, (k, v) in zip(blocks, stores, strict=True):
                y, _ = block(y, angles, layout, PagedKeysValues(k, v, places, None))
            return y

        return Recorded(x, numbers, *self.record(launch))


class CudaRecorder:
    """A `Record` of CUDA graphs on `device`, which share the memory of what they compute."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """Record `run`."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries choose kernels and make workspaces before anything is recorded
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out = run()
            return out, graph.replay
