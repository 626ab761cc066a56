"""What the engine has done and what it cost: statistics for the server, costs of launches for the prediction."""

from __future__ import annotations

from collections import Counter, defaultdict

from megamor.serve.engine.costs import Costs, LineFit
from megamor.serve.engine.request import EngineStats
from megamor.serve.engine.scheduler import Launch, Scheduler


class Accounting:
    """Counts the launches of `scheduler`. `total` holds the counters, `core` and `boundary` the seconds by width."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.limits = scheduler, scheduler.limits
        self.total = EngineStats(depth_counts=[0] * (self.limits.num_recursions + 1))
        self.launches, self.rows = Counter[str](), Counter[str]()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.core, self.boundary = LineFit(), LineFit()
        self.last_exit = (0, 0.0)

    def count(self, launch: Launch, seconds: float) -> None:
        """A launch that has run and isn't completed yet."""
        kind, total = launch.kind, self.total
        everything = kind != "core" or self.limits.policy == "full"
        rows = sum(piece.length if everything else len(piece.active) for piece in launch.pieces)
        self.launches[kind] += 1
        self.rows[kind] += rows
        self.seconds[kind] += seconds
        if kind == "core":
            depths = len({piece.recursion for piece in launch.pieces})
            total.width_counts[rows] = total.width_counts.get(rows, 0) + 1
            total.mixed_depths[depths] = total.mixed_depths.get(depths, 0) + 1
            self.core.add(rows, seconds)
        elif kind == "exit":
            for depth in (depth for piece in launch.pieces for depth in piece.depths):
                total.depth_counts[depth] += 1
                total.rows_saved += self.limits.num_recursions - depth
            self.last_exit = rows, seconds
        else:
            left, before = self.last_exit
            if left == rows:
                self.boundary.add(rows, before + seconds)
            self.last_exit = 0, 0.0

    def forget_costs(self) -> None:
        """Start the measurement of costs again."""
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
        """How long to hold exits with the residents there are, by the costs so far."""
        residents = len(self.scheduler.residents)
        if not (residents and self.mean_depth and self.boundary.samples):
            return self.scheduler.hold
        costs = Costs(self.core.line(), self.boundary.line())
        return costs.best_hold(residents, self.limits.num_recursions, self.mean_depth)

    def snapshot(self) -> EngineStats:
        """Counters, and where the scheduler stands."""
        scheduler, stats = self.scheduler, EngineStats(**vars(self.total))
        stats.resident, stats.waiting = len(scheduler.residents), len(scheduler.waiting)
        stats.in_core = [0] * self.limits.num_recursions
        for piece in scheduler.in_core:
            stats.in_core[piece.recursion] += len(piece.active)
        stats.held_exits = sum(piece.length for piece in scheduler.leaving)
        stats.pages_by_depth = scheduler.pages_by_depth()
        stats.preemptions = scheduler.num_preempted
        stats.launches, stats.rows, stats.seconds = dict(self.launches), dict(self.rows), dict(self.seconds)
        for name in ("depth_counts", "width_counts", "mixed_depths"):
            setattr(stats, name, getattr(self.total, name).copy())
        held: dict[str, set[int]] = {pool: set() for pool in scheduler.book.pools}
        for sequence in scheduler.residents:
            for spec, table in zip(self.limits.tables, sequence.tables, strict=True):
                held[spec.pool].update(table.pages)
        stats.pages_total = dict(scheduler.book.num_pages)
        stats.pages_used = {pool: len(pages) for pool, pages in held.items()}
        stats.pages_cached = {
            pool: stats.pages_total[pool] - len(scheduler.book.pools[pool].free) - len(held[pool]) for pool in held
        }
        return stats
