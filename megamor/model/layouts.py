"""Where the rows of a batch are in their sequences and documents, and the attention layouts that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import ModelConfig
from megamor.model.attention import (
    KERNEL_TAKES_WINDOWS,
    AttentionLayout,
    Chunk,
    Grid,
    Ranges,
    Segments,
    has_packed_kernel,
    visibility_mask,
)
from megamor.model.blocks import RotaryAngles, rotary_angles
from megamor.model.buckets import Buckets
from megamor.model.multi_scale import BEYOND, Scales, reach
from megamor.routing import TokenSet
from megamor.routing.plan import to_device

DOCUMENT_MULTIPLE, LENGTH_MULTIPLE = 64, 128
"""On a GPU, the number of documents and the length of ragged grids are rounded up to multiples of these. Otherwise
nearly every step would have new shapes, for each of which a kernel may be planned or a block compiled."""
ROWS_PER_CHUNK, MAX_CHUNKS, MAX_FINE_CHUNKS, KEY_MULTIPLE = 64, 8, 32, 16
"""Fewest queries per chunk, most chunks (of full attention, and of any with limited reach), and the multiple to which a
chunk's number of keys is rounded up."""


@dataclass(frozen=True)
class Geometry:
    """Where the T rows of a stream are.

    `everything` are all tokens, and `window` lays them out as the [B, S] of the input. `order` [T] are their
    positions in their sequences, `positions` [T] those that RoPE encodes, `angles` their cosines and sines.
    `documents` [T] are ids that attention must not cross, and `begins` [T] the row at which each token's document
    begins. `dtype` is the type that attention computes in. Where attention can run packed (by a kernel, or
    `bucketed` on a CPU), `bounds` [segments + 1] are the rows at which the documents begin (without any, the
    sequences), and the end. `scales` is set for multi-scale attention, which never runs packed. A query's first fine
    key is at most `reach` rows before it (None: any number), under multi-scale attention and with a sliding window.

    `sliding` is the same stream as blocks with a sliding window see it: each query's document begins no earlier than
    its window, so `begins` differs from query to query.
    """

    everything: TokenSet
    window: Grid
    order: Tensor
    positions: Tensor
    angles: RotaryAngles
    documents: Tensor | None = None
    begins: Tensor | None = None
    dtype: torch.dtype = torch.float32
    bounds: Tensor | None = None
    bucketed: bool = False
    scales: Scales | None = None
    reach: int | None = None
    sliding: Geometry | None = None

    @staticmethod
    def of(
        tokens: Tensor,
        config: ModelConfig,
        dtype: torch.dtype,
        documents: Tensor | None = None,
        start: int | Tensor = 0,
        lengths: tuple[int, ...] | None = None,
        columns: tuple[int, ...] | None = None,
        num_documents: int | None = None,
    ) -> Geometry:
        """Geometry of token ids [B, S] (or embedded tokens [B, S, dim]).

        Positions count from `start` (one number, or [B]), or restart in each document if configured. `documents` [B, S]
        are ids, equal ones adjacent. Sequence b has `lengths[b]` tokens, the first in `columns[b]` (None: in column 0);
        the rest is padding. `dtype` is that of the weights; autocast may lower what attention computes in. There are
        at most `num_documents` (None: the device is asked).
        """
        (batch, seq_len), device = tokens.shape[:2], tokens.device
        everything = TokenSet.all(batch, seq_len, lengths, device)
        order = everything.rank_of(everything, device)
        cells = None if lengths is None else everything.sequences(device) * seq_len + order
        if cells is not None and columns is not None:
            cells = cells + to_device(columns, device)[everything.sequences(device)]
        window = Grid(batch, seq_len, cells)
        documents = None if documents is None else window.unpad(documents)
        begins = None if documents is None else document_begins(documents, order)
        sequence_begins = everything.rows(device) - order
        if isinstance(start, Tensor):
            order = start[everything.sequences(device)] + order
        elif start:
            order = order + start
        positions = order
        if begins is not None and config.document_positions == "restart":
            positions = everything.rows(device) - begins
        weights, angles = dtype, rotary_angles(positions, config, dtype)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        bounds, scales, far, kernel = None, None, None, has_packed_kernel(device, dtype, config.head_dim)
        bucketed = not kernel and device.type == "cpu"
        if config.attention == "multi_scale":
            alike, far = begins is None and lengths is None, reach(config)
            scales = Scales.of(everything, sequence_begins if begins is None else begins, config, alike)
        elif kernel or bucketed:
            count = None if bucketed else num_documents
            bounds = everything.bounds(device) if begins is None else segment_bounds(begins, count)
        geometry = Geometry(
            everything, window, order, positions, angles, documents, begins, dtype, bounds, bucketed, scales, far
        )
        if not config.sliding_window:
            return geometry
        slid = replace(geometry, angles=rotary_angles(positions, config, weights, slides=True))
        if isinstance(start, Tensor) or config.sliding_window < start + everything.max_length:
            windows = everything.rows(device) - (config.sliding_window - 1)
            windows = torch.maximum(windows, sequence_begins if begins is None else begins)
            bounds = bounds if kernel and KERNEL_TAKES_WINDOWS else None
            slid = replace(slid, begins=windows, bounds=bounds, reach=config.sliding_window - 1)
        return replace(geometry, sliding=slid)

    def seen_by(self, slides: bool) -> Geometry:
        """This stream as a block sees it that has a sliding window or hasn't."""
        return self.sliding if slides and self.sliding is not None else self

    def angles_of(self, tokens: TokenSet) -> RotaryAngles:
        """RoPE angles of the original positions of `tokens`."""
        return self.angles.select(tokens.index)

    def order_of(self, tokens: TokenSet) -> Tensor:
        """Positions [N] of `tokens` in their sequences; unlike `positions`, they never restart."""
        return tokens.gather(self.order)

    def layout(self, queries: TokenSet, keys: TokenSet) -> AttentionLayout:
        """Causal attention of `queries` to `keys`, inside documents and windows."""
        device = self.positions.device
        multiple = 1 if reads_freely(device) else LENGTH_MULTIPLE
        packs = queries.lengths is not None or self.documents is not None
        if self.reach is not None:
            # The kernel counts a window in rows. They are positions only if no token is missing.
            packs = queries.index is None
        if queries is keys and packs and self.bounds is not None:
            return AttentionLayout(Grid(1, len(queries)), None, segments=self.segments(queries, self.bounds))
        if queries is keys and self.documents is None and self.reach is None:
            # Padding sits at the end of each sequence, where a causal kernel shows it to padded queries alone.
            return AttentionLayout(Grid.of(queries, multiple), Grid.of(keys, multiple))
        # In rows, not positions: what a query sees is a range of rows, given by the first and the last.
        grid, key_grid = Grid.of(queries, multiple), Grid.of(keys, multiple)
        begins, first_row, pool = self.begins, self.begins, None
        if (scales := self.scales) is not None:
            begins, first_row, pool = scales.begins, scales.fine, scales.pool(keys)
        last, key_rows = grid.pad(queries.rows(device), -1), key_grid.pad(keys.rows(device), BEYOND)
        begin, first = (None if x is None else grid.pad(queries.gather(x)) for x in (begins, first_row))
        alike = self.documents is None and self.everything.lengths is None and queries.index is None
        if self.reach is not None and begin is not None and first is not None and alike:
            # One mask for all sequences.
            last, key_rows, begin, first = last[:1], key_rows[:1], begin[:1], first[:1]
        chunks = []
        for (start, end), (first_key, end_key) in self.query_chunks(queries, keys, grid, key_grid.length):
            queried, seen = slice(start, end), slice(first_key, end_key)
            fine = None if first is None else first[:, queried]
            ranges: Ranges = ((first_key, end_key),)
            mask = visibility_mask(last[:, queried], key_rows[:, seen], fine, self.dtype)
            if scales is not None and pool is not None and begin is not None and fine is not None:
                # The query before `end` is this far into its sequence at most: the others must follow it.
                most = self.everything.max_length - (0 if queries.lengths is not None else grid.length - end)
                count, total = scales.most_blocks(most), scales.ends.shape[1]
                coarse = pool.mask(begin[:, queried], fine - 1, scales.ends[: len(last), :count], self.dtype)
                ranges = ((0, count), (total + first_key, total + end_key))
                mask = torch.cat((coarse, mask), dim=-1)
            chunks.append(Chunk(ranges, mask))
        return AttentionLayout(grid, key_grid, tuple(chunks), pool=pool)

    def query_chunks(
        self, queries: TokenSet, keys: TokenSet, grid: Grid, most: int
    ) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Ranges of queries, and the range of the `most` keys that each needs; `grid` is that of the queries."""
        # SDPA computes all scores under a mask. Early queries see few keys, so giving each chunk only the keys that it
        # can see skips up to half of them; where their reach is limited, late queries see few keys too. Chunks of too
        # few rows would cost more in kernel launches than they save.
        length, ragged = grid.length, queries.lengths is not None
        on_cpu, back = reads_freely(self.positions.device), most if self.reach is None else self.reach
        if self.reach is not None:
            count = fine_chunks(length, self.reach)
        elif keys.index is None and (on_cpu or not ragged):
            count = max(1, min(MAX_CHUNKS, length // ROWS_PER_CHUNK))
        else:
            count = 1
        ends = [length * number // count for number in range(count + 1)]
        if on_cpu:
            # How many of the keys come before each query, in the sequences where that is the fewest and the most.
            ranks = keys.rank_of(queries, self.positions.device)
            before = grid.pad(ranks, most).amin(0)[ends[:-1]].tolist()
            last = grid.pad(ranks, -1).amax(0).cummax(0).values[[end - 1 for end in ends[1:]]] + 1
            needed = [min(most, -(-number // KEY_MULTIPLE) * KEY_MULTIPLE) for number in last.tolist()]
        else:
            # Reading positions would make the host wait for the device. Without reading: the j-th of the queries has at
            # least j keys before it, and in K keys at most K - Q + j, because Q - j more must follow it.
            before, needed = ends[:-1], [most - (0 if ragged else length - end) for end in ends[1:]]
        # Keys that lie so many keys before the first query lie at least as many positions before it.
        # Lengths that were rounded up leave chunks of padding alone, which see a key all the same (`visibility_mask`).
        spans = [(max(0, min(first - back, end - 1)), max(1, end)) for first, end in zip(before, needed, strict=True)]
        return list(zip(pairwise(ends), spans, strict=True))

    def segments(self, tokens: TokenSet, bounds: Tensor) -> Segments:
        """The segments among the rows of `tokens`, some perhaps empty; `bounds` are those of the whole stream."""
        if tokens.index is not None:
            bounds = torch.searchsorted(tokens.index, bounds)
        if self.bucketed:
            return Segments(bounds, tokens.max_length, Buckets.of(bounds))
        # A ragged set's own maximum changes from step to step, and would recompile whatever depends on it.
        longest = tokens.max_length if tokens.lengths is None else self.window.length
        return Segments(bounds.int(), longest, None, self.reach)

    def mean_pairs(self, queries: TokenSet, keys: TokenSet, slides: Sequence[bool]) -> Tensor:
        """`visible_pairs`, averaged over blocks some of which have a sliding window."""
        pairs = self.visible_pairs(queries, keys)
        if self.sliding is None or not any(slides):
            return pairs
        return pairs + (self.sliding.visible_pairs(queries, keys) - pairs) * (sum(slides) / len(slides))

    def visible_pairs(self, queries: TokenSet, keys: TokenSet) -> Tensor:
        """Pairs (query, key) that attention cannot skip, from which its FLOPs are counted.

        The key is not after the query and, where documents are kept apart, in its document. `queries` are among `keys`.
        A scalar in fp32 on the device; the host does not wait for it.
        """
        device, first_row = self.positions.device, self.begins if self.scales is None else self.scales.fine
        if first_row is not None:
            # Keys from the row at which a query's document (or window) begins to the query itself, for all queries.
            rows, first = queries.rows(device), queries.gather(first_row)
            pairs = rows - first + 1
            if keys.index is not None:
                pairs = torch.searchsorted(keys.index, rows, right=True) - torch.searchsorted(keys.index, first)
            if self.scales is not None:
                pairs = pairs + self.scales.coarse_pairs(queries, keys)
            return pairs.sum().float()
        if keys is not queries:
            return (keys.rank_of(queries, device) + 1).sum().float()
        if queries.lengths is None:
            total = queries.batch * queries.max_length * (queries.max_length + 1) / 2
            return torch.full((), total, device=device)
        lengths = queries.lengths.float()
        return (lengths * (lengths + 1) / 2).sum()


def fine_chunks(length: int, back: int) -> int:
    """In how many chunks `length` queries are computed whose keys are up to `back` rows before them."""
    return max(1, min(MAX_FINE_CHUNKS, length // max(ROWS_PER_CHUNK, back // 4)))


def reads_freely(device: torch.device) -> bool:
    """Whether the host need not wait for the device before it can read a tensor."""
    return device.type == "cpu"


def document_begins(documents: Tensor, order: Tensor) -> Tensor:
    """The row at which each token's document begins, [T].

    `documents` [T] are ids, equal ones adjacent; `order` [T] are the tokens' positions in their sequences.
    """
    first = order == 0
    first[1:] |= documents[1:] != documents[:-1]
    rows = torch.arange(len(documents), device=documents.device)
    return rows.masked_fill(~first, 0).cummax(dim=0).values


def segment_bounds(begins: Tensor, most: int | None = None) -> Tensor:
    """Rows at which documents begin, and the end; `begins` [T] is that row for each token.

    With `most`, the host's upper bound of the documents, empty ones follow up to a multiple of `DOCUMENT_MULTIPLE`.
    """
    if most is None:  # the host waits for their number
        starts: Tensor = begins.unique_consecutive()  # type: ignore[no-untyped-call]
        return F.pad(starts, (0, 1), value=len(begins))
    rows = torch.arange(len(begins), device=begins.device)
    count = -(-most // DOCUMENT_MULTIPLE) * DOCUMENT_MULTIPLE
    # The i-th document begins where i rows have been beginnings; behind the last, `searchsorted` gives the end.
    return torch.searchsorted((begins == rows).cumsum(0), torch.arange(1, count + 2, device=begins.device))
