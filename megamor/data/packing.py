"""Best-fit decreasing bin packing, as a function of how many items there are of each size.

Items are taken from the largest to the smallest, each into the fullest bin that still has room for it, or into a new
one (Johnson 1973; used to avoid cutting documents by Ding et al. 2024, arXiv 2404.10830). Bins that hold the same sizes
are kept as one group with a count, so the work grows with the number of different sizes, not of items: a million
documents take about as long as ten thousand. The result is the same as placing items one by one, up to the order of
bins with equal contents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NO_STEP = -1


def count_bins(counts: NDArray[np.int64]) -> int:
    """Bins that best-fit decreasing needs for `counts[s]` items of each size s, with bins of size `len(counts) - 1`."""
    return sum(number for _, number in _Groups.fill(counts).all())


def best_fit(sizes: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack items of `sizes` [n], each from 1 to `capacity`, into bins of `capacity`; returns items and bounds.

    `items` [n] lists the items bin by bin, the largest of a bin first; those of bin b are `items[bounds[b]]` to
    `items[bounds[b + 1] - 1]`, with `bounds` [bins + 1].
    """
    counts = np.bincount(sizes, minlength=capacity + 1)
    groups = _Groups.fill(counts)
    # Items of one size are interchangeable, so each step takes the next ones of its size, in ascending order.
    by_size = np.argsort(sizes.astype(np.uint16 if capacity < 2**16 else np.int64), kind="stable")
    next_of_size = (np.cumsum(counts) - counts).tolist()
    first_bins, firsts, per_bin, numbers = [], [], [], []
    num_bins = 0
    for step, number in groups.all():
        while step != _NO_STEP:  # walk back through the steps that filled these bins
            size, copies, step = groups.steps[step]
            first_bins.append(num_bins)
            firsts.append(next_of_size[size])
            per_bin.append(copies)
            numbers.append(number)
            next_of_size[size] += number * copies
        num_bins += number
    copies_of = np.array(per_bin, np.int64)
    totals = copies_of * np.array(numbers, np.int64)
    positions, within = ranges(np.array(firsts, np.int64), totals)
    # `within` counts the items of a step through all bins of its group; each bin takes `copies_of` of them.
    bins = np.repeat(np.array(first_bins, np.int64), totals) + within // np.repeat(copies_of, totals)
    items = by_size[positions]
    order = np.lexsort((items, -sizes[items], bins))
    bounds = np.zeros(num_bins + 1, np.int64)
    np.cumsum(np.bincount(bins, minlength=num_bins), out=bounds[1:])
    return items[order], bounds


def ranges(firsts: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Concatenated ranges of `lengths[i]` numbers from `firsts[i]` up, and each number's index within its range."""
    before = np.cumsum(lengths) - lengths
    within = np.arange(lengths.sum()) - np.repeat(before, lengths)
    return np.repeat(firsts, lengths) + within, within


class _Groups:
    """Bins with equal contents, by the room left in them.

    A group is (last step, number of bins). Its contents are the steps that led to it, as a linked list: `steps[i]` is
    (size, copies put into each bin, previous step).
    """

    def __init__(self, capacity: int) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self._by_room: list[list[tuple[int, int]]] = [[] for _ in range(capacity + 1)]
        # Bit r is set if there are bins with room r: finding the tightest fit is then one operation on an integer.
        self._rooms = 0

    @classmethod
    def fill(cls, counts: NDArray[np.int64]) -> _Groups:
        """Pack `counts[s]` items of each size s."""
        capacity = len(counts) - 1
        groups = cls(capacity)
        for size in range(capacity, 0, -1):
            count = int(counts[size])
            while count:
                room, step, number = groups._tightest(size) or (capacity, _NO_STEP, count)
                # After an item goes in, that bin is again the tightest for the next one of this size, until there is no
                # room for one more. So each bin takes `copies` at once, and `used` equal bins are filled in one step.
                copies = room // size
                used = min(number, count // copies)
                if used:
                    groups._add(step, size, copies, used, room)
                    count -= used * copies
                # What is left doesn't fill a whole bin's worth: it goes into one more bin of the group.
                rest = count if used < number else 0
                if rest and rest < copies:
                    groups._add(step, size, rest, 1, room)
                    count, used = 0, used + 1
                if step != _NO_STEP and used < number:
                    groups._put(room, step, number - used)
        return groups

    def all(self) -> list[tuple[int, int]]:
        """Every group, the fullest first."""
        return [group for groups in self._by_room for group in groups]

    def _tightest(self, size: int) -> tuple[int, int, int] | None:
        """Take out a group (room, last step, number) with the least room for `size`."""
        fitting = self._rooms >> size
        if not fitting:
            return None
        room = size + (fitting & -fitting).bit_length() - 1
        step, number = self._by_room[room].pop()
        if not self._by_room[room]:
            self._rooms ^= 1 << room
        return room, step, number

    def _add(self, step: int, size: int, copies: int, number: int, room: int) -> None:
        self.steps.append((size, copies, step))
        self._put(room - size * copies, len(self.steps) - 1, number)

    def _put(self, room: int, step: int, number: int) -> None:
        self._by_room[room].append((step, number))
        if room:  # a full bin is never searched for again
            self._rooms |= 1 << room
