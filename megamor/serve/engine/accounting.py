"""What the engine has done and what it cost: statistics for the server, costs of batches for the prediction."""

from __future__ import annotations

from copy import deepcopy

from megamor.serve.engine.costs import Costs, LineFit
from megamor.serve.engine.flight import ACTIVE, DEPTH, RECURSION, ScheduledBatch
from megamor.serve.engine.pages import EVERY_TOKEN
from megamor.serve.engine.request import EngineStats
from megamor.serve.engine.scheduler import Scheduler


class Accounting:
    """Counts the batches of `scheduler`. `total` has the counters, `core` and `boundary` the seconds by width."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.total = EngineStats(depth_counts=[0] * (scheduler.num_recursions + 1))
        self.core, self.boundary = LineFit(), LineFit()
        self.last_exit = (0, 0.0)

    def count(self, batch: ScheduledBatch, seconds: float, timed: bool = True) -> None:
        """Count a batch that has run and isn't completed yet. `timed`: nothing else ran in these seconds."""
        kind, total, rows = batch.kind, self.total, len(batch.slots)
        total.launches[kind] += 1
        total.rows[kind] += rows
        total.seconds[kind] += seconds
        if kind == "core":
            total.width_counts[rows] += 1
            total.mixed_depths[len(batch.depths)] += 1
            if timed:
                self.core.add(rows, seconds)
        elif kind == "exit":
            for depth in self.scheduler.flight.rows[DEPTH, batch.slots].tolist():
                total.depth_counts[depth] += 1
                total.rows_saved += self.scheduler.num_recursions - depth
            self.last_exit = rows, seconds
        else:
            # The prediction is about decoding, where as many tokens enter as have left. A boundary with a prompt chunk
            # in its entry batch is wider on one side and would distort the line.
            left, before = self.last_exit
            if left == rows and timed:
                self.boundary.add(rows, before + seconds)
            self.last_exit = 0, 0.0

    def forget_costs(self) -> None:
        """Start measuring costs again."""
        self.core, self.boundary = LineFit(), LineFit()

    @property
    def num_read(self) -> int:
        """Tokens that have passed the exit."""
        return sum(self.total.depth_counts)

    @property
    def mean_depth(self) -> float:
        """Recursions per token read."""
        return sum(depth * count for depth, count in enumerate(self.total.depth_counts)) / max(1, self.num_read)

    def best_hold(self) -> int:
        """Core batches between boundaries that cost least, for the present residents and the costs so far."""
        residents = len(self.scheduler.residents)
        if not (residents and self.mean_depth and self.boundary.samples):
            return self.scheduler.hold
        costs = Costs(self.core.line(), self.boundary.line())
        return costs.best_hold(residents, self.scheduler.num_recursions, self.mean_depth)

    def snapshot(self) -> EngineStats:
        """The counters, and the scheduler's present state."""
        scheduler, book, stats = self.scheduler, self.scheduler.book, deepcopy(self.total)
        stats.resident, stats.waiting = len(scheduler.residents), len(scheduler.waiting)
        stats.in_core, stats.pages_by_depth = [0] * scheduler.num_recursions, [0] * scheduler.num_recursions
        rows = scheduler.flight.rows[:, scheduler.core]
        for recursion in rows[RECURSION, rows[ACTIVE] > 0].tolist():
            stats.in_core[recursion] += 1
        stats.held_exits = sum(chunk.length for chunk in scheduler.leaving)
        stats.preemptions = scheduler.num_preempted
        # Sets: residents share the pages of a common prefix, which must not be counted twice.
        held: dict[str, set[int]] = {pool: set() for pool in book.pools}
        for sequence in scheduler.residents:
            for spec, table in zip(book.specs, sequence.tables, strict=True):
                held[spec.pool].update(table.pages)
                if spec.recursion != EVERY_TOKEN:
                    stats.pages_by_depth[spec.recursion] += len(table.pages)
        stats.pages_total = dict(book.num_pages)
        stats.pages_used = {pool: len(pages) for pool, pages in held.items()}
        stats.pages_cached = {
            pool: total - len(book.pools[pool].free) - len(held[pool]) for pool, total in stats.pages_total.items()
        }
        return stats
