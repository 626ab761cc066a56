"""Figures of one optimizer step: summed over micro-batches on the device, then over ranks in one reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from megamor.config.batches import BatchShape
from megamor.config.segments import Segment
from megamor.data.loader import MicroBatch
from megamor.model import ModelOutput

DEAD_SHARE = 1e-3
"""A depth is called dead if fewer than this fraction of the tokens end there."""


@dataclass(frozen=True)
class StepSummary:
    """Figures of a step over all ranks. `work` holds (tokens, query-key pairs) of each recursion."""

    loss: float
    num_tokens: int
    router_losses: dict[str, float]
    ratios: dict[str, float]
    depth_counts: list[float]
    work: list[tuple[float, float]]
    score_gradients: list[float] = field(default_factory=list)
    """Largest gradient at the scores of each router that is watched, summed over ranks."""
    pairs: float | None = None
    """Query-key pairs of a block that sees every token."""
    grad_norm: float = math.nan
    """Global norm before clipping."""
    teacher_work: list[float] = field(default_factory=list)
    """Of a teacher: query-key pairs as above, then tokens and pairs of each of its recursions."""
    router_grad_norm: float | None = None
    """The same of the routers' gradients alone; None where `Backend.router_square` is."""

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

    def counts_by_stage(self, stages: Sequence[Segment]) -> dict[str, list[float]]:
        """Tokens at each depth in each stage, by `Segment.prefix`."""
        tokens, work = sum(self.depth_counts), iter(self.work)
        # Whoever takes a recursion has taken those before it.
        reached = {s.prefix: [tokens, *(next(work)[0] for _ in s.schedule), 0.0] for s in stages if tokens}
        return {prefix: [now - later for now, later in pairwise(counts)] for prefix, counts in reached.items()}

    def stage_metrics(self, stages: Sequence[Segment]) -> dict[str, float]:
        """The depth histogram and mean depth of each stage, where there are several; ready to log."""
        metrics: dict[str, float] = {}
        for prefix, counts in self.counts_by_stage(stages).items() if len(stages) > 1 else ():
            shares = [count / sum(counts) for count in counts]
            metrics |= {f"depth/{prefix}{depth}": share for depth, share in enumerate(shares)}
            metrics[f"routing/{prefix}mean_depth"] = sum(depth * share for depth, share in enumerate(shares))
        return metrics


@dataclass(frozen=True)
class PendingSummary:
    """The figures of a step that the device may still be computing.

    `totals` are the router's own sums over all ranks, on the device: the router can use them without waiting.
    """

    totals: dict[str, Tensor]
    _figures: dict[str, Tensor]
    _arrived: torch.cuda.Event | None

    def wait(self) -> StepSummary:
        """The figures, once the device has computed them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found = self._figures
        return StepSummary(
            loss=_quotient(found["loss"]),
            num_tokens=int(found["loss"][1]),
            router_losses={name: _quotient(value) for name, value in _under("router_loss/", found).items()},
            # A recursion that no token took has no mean gate.
            ratios={name: _quotient(value) for name, value in _under("ratio/", found).items() if value[1] > 0},
            depth_counts=found["depth"].tolist() if "depth" in found else [],
            work=[(tokens, pairs) for tokens, pairs in found["work"].tolist()] if "work" in found else [],
            score_gradients=found["score_gradients"].tolist() if "score_gradients" in found else [],
            pairs=float(found["pairs"]) if "pairs" in found else None,
            grad_norm=float(found["grad_norm"]),
            teacher_work=found["teacher"].tolist() if "teacher" in found else [],
            router_grad_norm=math.sqrt(found["router_square"]) if "router_square" in found else None,
        )


@dataclass(frozen=True)
class UnreadStep:
    """A step whose figures haven't been read yet, with all that its line of metrics needs beside them.

    `number` counts steps from 1; `tokens` are those of all ranks without padding; `seconds` is the time of its turn of
    the loop; `recursions` is the most that a token could take.
    """

    number: int
    shape: BatchShape
    tokens: int
    micro_batches: list[MicroBatch]
    lr: float
    tokens_seen: int
    epochs: dict[str, float]
    data_wait: float
    seconds: float
    recursions: int
    figures: PendingSummary


class StepStatistics:
    """Adds up what `ModelOutput`s report, without synchronising with the device."""

    def __init__(self, num_recursions: int) -> None:
        self.num_depths = num_recursions + 1
        self.sums: dict[str, Tensor] = {}

    def add(self, out: ModelOutput, tokens: int = 1) -> None:
        """Add one micro-batch, which weighs as much as it has tokens where means are averaged."""
        assert out.loss_sum is not None
        assert out.num_tokens is not None
        # fp64 counts exactly up to 2^53; fp32 would miscount from 2^24 tokens on.
        self._sum("loss", torch.stack((out.loss_sum.detach().double(), out.num_tokens.double())))
        for name, loss in out.router_losses.items():
            weighted = torch.stack((loss.detach().double(), torch.ones_like(loss).double())) * tokens
            self._sum(f"router_loss/{name}", weighted)
        for name, ratio in out.ratios.items():
            self._sum(f"ratio/{name}", torch.stack((ratio.numerator.double(), ratio.denominator.double())))
        for name, total in out.totals.items():
            self._sum(f"total/{name}", total.double())
        if out.z_loss_sum is not None:
            self._sum("router_loss/lm_z_loss", torch.stack((out.z_loss_sum.double(), out.num_tokens.double())))
        if out.distill_loss_sum is not None:
            self._sum("router_loss/distill_loss", torch.stack((out.distill_loss_sum.double(), out.num_tokens.double())))
        if out.pairs is not None:
            self._sum("pairs", out.pairs.double())
        if out.depth is not None and out.work is not None:
            # Padding has depth -1. Not `bincount`, which reads the smallest and the largest depth from the device.
            depths = torch.arange(self.num_depths, device=out.depth.device)
            self._sum("depth", (out.depth.flatten().unsqueeze(1) == depths).sum(0).double())
            self._sum("work", out.work.double())

    def add_teacher(self, work: Tensor) -> None:
        """Add `StepSummary.teacher_work` of a micro-batch."""
        self._sum("teacher", work.double())

    def add_score_gradients(self, largest: Tensor) -> None:
        """Add this rank's largest gradient at the scores of each watched router, of the whole step."""
        self._sum("score_gradients", largest.double())

    def reduce(self, grad_norm: Tensor, router_square: Tensor | None = None) -> PendingSummary:
        """Sum over ranks and start the copy to the host, without waiting for either. Collective.

        `grad_norm` is the same on every rank already and only travels along; `router_square` is `Backend`'s.
        """
        if router_square is not None:
            self._sum("router_square", router_square)
        # All sums travel in one vector: a reduction costs its latency, not its few hundred bytes. Ranks concatenate in
        # the same order because they run the same model.
        flat = torch.cat([value.flatten() for value in self.sums.values()])
        if dist.is_initialized():
            dist.all_reduce(flat)
        totals = _under("total/", self._split(flat))
        flat = torch.cat([flat, grad_norm.detach().double().reshape(1)])
        host = flat.to("cpu", non_blocking=True)
        arrived = None
        if flat.is_cuda:
            # The host's copy is only valid once this event has passed. Waiting for the event, unlike a blocking copy,
            # doesn't wait for the work of the next step, which is in the same stream by then.
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return PendingSummary(totals, {**self._split(host[:-1]), "grad_norm": host[-1]}, arrived)

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        """The concatenated sums by name."""
        parts = torch.split(flat, [value.numel() for value in self.sums.values()])
        return {name: part.view_as(value) for (name, value), part in zip(self.sums.items(), parts, strict=True)}

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def _under(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _quotient(pair: Tensor) -> float:
    return float(pair[0] / pair[1])
