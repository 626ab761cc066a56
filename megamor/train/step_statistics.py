"""Statistics of one optimizer step: summed over micro-batches on the device, over ranks in one reduction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megamor.model import ModelOutput


@dataclass(frozen=True)
class StepSummary:
    """Global figures of a step. `work` holds (tokens, pairs) per recursion, `totals` the router's own sums."""

    loss: float
    num_tokens: int
    router_losses: dict[str, float]
    ratios: dict[str, float]
    depth_counts: list[float]
    work: list[tuple[float, float]]
    totals: dict[str, Tensor]
    score_gradient: float | None = None
    """Largest gradient at the router's scores, summed over ranks; None if nobody looked."""
    pairs: float | None = None
    """Query-key pairs of a block that sees every token."""

    @property
    def mean_depth(self) -> float | None:
        """Recursions per token; None without a recursion stage."""
        tokens = sum(self.depth_counts)
        return sum(d * n for d, n in enumerate(self.depth_counts)) / tokens if tokens else None

    def routing_metrics(self) -> dict[str, float]:
        """Depth histogram and what it says about the router, ready to log."""
        tokens = sum(self.depth_counts)
        if not tokens:
            return {}
        shares = [count / tokens for count in self.depth_counts]
        used = shares[1:]
        metrics = {f"depth/{depth}": share for depth, share in enumerate(shares)}
        metrics["routing/mean_depth"] = sum(depth * share for depth, share in enumerate(shares))
        metrics["routing/entropy"] = -sum(share * math.log(share) for share in shares if share > 0)
        metrics["routing/dead_depths"] = sum(share < DEAD_SHARE for share in used) / len(used)
        metrics["routing/max_violation"] = max(used) * len(used) / max(sum(used), 1e-30) - 1
        return metrics | {f"routing/{name}": value for name, value in self.ratios.items()}


DEAD_SHARE = 1e-3
"""A depth at which fewer tokens than this share end is called dead."""


class StepStatistics:
    """Adds up what `ModelOutput`s say, without synchronising with the device."""

    def __init__(self, num_recursions: int) -> None:
        self.num_depths = num_recursions + 1
        self.sums: dict[str, Tensor] = {}

    def add(self, out: ModelOutput) -> None:
        """One micro-batch."""
        assert out.loss_sum is not None
        assert out.num_tokens is not None
        self._sum("loss", torch.stack((out.loss_sum.detach().double(), out.num_tokens.double())))
        for name, loss in out.router_losses.items():
            self._sum(f"router_loss/{name}", torch.stack((loss.detach().double(), torch.ones_like(loss).double())))
        for name, ratio in out.ratios.items():
            self._sum(f"ratio/{name}", torch.stack((ratio.numerator.double(), ratio.denominator.double())))
        for name, total in out.totals.items():
            self._sum(f"total/{name}", total.double())
        if out.pairs is not None:
            self._sum("pairs", out.pairs.double())
        if out.depth is not None and out.work is not None:
            self._sum("depth", torch.bincount(out.depth.flatten(), minlength=self.num_depths).double())
            self._sum("work", out.work.double())

    def add_score_gradient(self, largest: Tensor | None) -> None:
        """Of the whole step, this rank's."""
        if largest is not None:
            self._sum("score_gradient", largest.double())

    def reduce(self) -> StepSummary:
        """Sum over ranks (collective) and bring the figures to the host (synchronises)."""
        flat = torch.cat([value.flatten() for value in self.sums.values()])
        if dist.is_initialized():
            dist.all_reduce(flat)
        sizes = [value.numel() for value in self.sums.values()]
        found = {
            name: part.view_as(value).cpu()
            for (name, value), part in zip(self.sums.items(), flat.split(sizes), strict=True)
        }
        return StepSummary(
            loss=_quotient(found["loss"]),
            num_tokens=int(found["loss"][1]),
            router_losses={name: _quotient(value) for name, value in _under("router_loss/", found).items()},
            ratios={name: _quotient(value) for name, value in _under("ratio/", found).items()},
            depth_counts=found["depth"].tolist() if "depth" in found else [],
            work=[(tokens, pairs) for tokens, pairs in found["work"].tolist()] if "work" in found else [],
            totals=_under("total/", found),
            score_gradient=float(found["score_gradient"]) if "score_gradient" in found else None,
            pairs=float(found["pairs"]) if "pairs" in found else None,
        )

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def _under(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _quotient(pair: Tensor) -> float:
    return float(pair[0] / pair[1])
