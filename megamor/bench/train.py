"""Step time of several training cases in interleaved rounds, and what follows from it.

Every round runs one step of every case on the same batch, in an order that rotates from round to round. Ratios are
taken within rounds, so that whatever else the machine does meanwhile falls on both sides of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megamor.bench.cases import REFERENCE, Case, TrainingStep, make_batch
from megamor.bench.memory import step_memory

WARMUP_ROUNDS = 2


@dataclass
class Measurements:
    """What the rounds saw of one case, a number a round. `depth` is recursions per token, None without recursions."""

    parameters: int
    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    depth: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Budget:
    """How long to measure: `rounds`, or as many as fit into `seconds` (at least one)."""

    seconds: float
    rounds: int | None = None

    def allows(self, done: int, started: float) -> bool:
        """Whether another round may begin."""
        if self.rounds is not None:
            return done < self.rounds
        return done == 0 or time.perf_counter() - started < self.seconds


def measure_rounds(
    cases: Sequence[Case], device: torch.device, budget: Budget, progress: Callable[[int], None]
) -> dict[str, Measurements]:
    """Measurements by case; `progress` is told the number of rounds done."""
    steps = [TrainingStep(case, device) for case in cases]
    for number in range(WARMUP_ROUNDS):
        for step in steps:
            step.run(*make_batch(step.case.config, number, device))
    found = {step.case.name: Measurements(step.num_parameters()) for step in steps}
    done, started = 0, time.perf_counter()
    while budget.allows(done, started):
        shift = done % len(steps)
        for step in steps[shift:] + steps[:shift]:
            _measure_step(step, WARMUP_ROUNDS + done, device, found[step.case.name])
        done += 1
        progress(done)
    return found


def _measure_step(step: TrainingStep, number: int, device: torch.device, into: Measurements) -> None:
    batch = make_batch(step.case.config, number, device)
    _synchronize(device)
    start = time.perf_counter()
    out = step.run(*batch)
    _synchronize(device)
    into.seconds.append(time.perf_counter() - start)
    into.flops.append(step.flops(out))
    into.depth.append(None if out.depth is None else float(out.depth.double().mean()))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_setting(
    cases: Sequence[Case],
    device: torch.device,
    budget: Budget,
    progress: Callable[[int], None],
    *,
    memory: bool,
) -> dict[str, Any]:
    """One setting of the report: all `cases` at one sequence length. The fields are those of benchmarks/README.md."""
    threads = torch.get_num_threads()
    peaks = {case.name: step_memory(case, device, threads) if memory else None for case in cases}
    measured = measure_rounds(cases, device, budget, progress)
    config = cases[0].config
    reference = measured[REFERENCE]
    return {
        "seq_len": config.data.seq_len,
        "batch_size": config.train.micro_batch_size,
        "precision": config.train.precision,
        "rounds": len(reference.seconds),
        "cases": [_summary(case, measured[case.name], reference, peaks) for case in cases],
    }


def _summary(
    case: Case, measured: Measurements, reference: Measurements, peaks: dict[str, int | None]
) -> dict[str, Any]:
    ratios = [mine / theirs for mine, theirs in zip(measured.seconds, reference.seconds, strict=True)]
    time_ratio = quartiles(ratios)
    flops = statistics.mean(measured.flops)
    flops_ratio = flops / statistics.mean(reference.flops)
    depths = [depth for depth in measured.depth if depth is not None]
    mine, theirs = peaks[case.name], peaks[REFERENCE]
    return {
        "name": case.name,
        "label": case.label,
        "overrides": list(case.overrides),
        "parameters": measured.parameters,
        "mean_depth": statistics.mean(depths) if depths else None,
        "step_seconds": quartiles(measured.seconds),
        "time_ratio": time_ratio,
        "training_flops": flops,
        "flops_ratio": flops_ratio,
        "time_over_flops": time_ratio["median"] / flops_ratio,
        "peak_memory_bytes": mine,
        "memory_ratio": mine / theirs if mine and theirs else None,
        "round_seconds": measured.seconds,
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (inclusive method; all equal for a single value)."""
    if len(values) == 1:
        return {"q1": values[0], "median": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}
