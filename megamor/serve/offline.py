"""The engine alone against the clock: policies in turns on the same requests, beside what launch costs predict.

Everything is counted that a token costs: prompts, every layer, all work on keys and values, head, sampling, scheduling.
A run is timed as long as requests wait, so that all places are taken. The prediction (`costs.py`) knows no more than
the costs of launches, measured in the same round at other numbers of residents, the mean depth, and the residents.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from megamor.model import Transformer
from megamor.serve.costs import Costs, LineFit
from megamor.serve.engine import EngineOptions, ServingEngine
from megamor.serve.layers import Layers
from megamor.serve.request import SamplingParams
from megamor.serve.scheduler import POLICIES

EQUAL_BYTES = "depthwise, equal KV bytes"
"""The case with as many residents as fit into the keys and values of `residents` sequences at full depth."""
CALIBRATION = (1 / 4, 1 / 2, 3 / 4, 1.0)
"""Residents of the runs that tell what launches cost, as shares of the residents measured."""


@dataclass(frozen=True)
class Workload:
    """`rounds` times, `residents` places are kept busy; prompts and continuations are random within their lengths."""

    residents: int = 32
    requests_per_place: int = 3
    prompt_tokens: int = 4
    new_tokens: tuple[int, int] = (40, 60)
    rounds: int = 3
    hold: int = 1

    def requests(self, vocab_size: int, residents: int) -> list[tuple[list[int], SamplingParams]]:
        """The same for everybody, as many as keep `residents` places busy."""
        rng = random.Random(0)
        return [
            (
                rng.choices(range(vocab_size), k=self.prompt_tokens),
                SamplingParams(max_tokens=rng.randint(*self.new_tokens), ignore_eos=True, seed=number),
            )
            for number in range(residents * self.requests_per_place)
        ]


@dataclass(frozen=True)
class Run:
    """One policy in one round: seconds per token read, their mean depth, and what part scheduling took of the core."""

    seconds: float
    tokens: int
    depth: float
    core_width: float
    scheduler_share: float
    mixed_share: float
    """Core launches with rows of several depths, of all."""


def run(model: Transformer, policy: str, residents: int, work: Workload) -> tuple[Run, ServingEngine]:
    """Serve until no request waits."""
    options = EngineOptions(
        policy=policy,  # type: ignore[arg-type]
        hold=work.hold,
        max_resident=residents,
        kv_memory=kv_memory(model, residents),
        prefix_caching=False,
    )
    engine = ServingEngine(model, options)
    for prompt, params in work.requests(model.config.model.vocab_size, residents):
        engine.add_request(prompt, params)
    begin = time.perf_counter()
    while engine.scheduler.waiting:
        engine.step()
    seconds = time.perf_counter() - begin
    stats = engine.stats()
    tokens, launches = sum(stats.depth_counts), stats.launches.get("core", 0)
    mixed = sum(count for depths, count in stats.mixed_depths.items() if depths > 1)
    found = Run(
        seconds / tokens,
        tokens,
        engine.mean_depth(),
        stats.rows.get("core", 0) / max(1, launches),
        stats.seconds["scheduler"] / max(1e-9, stats.seconds.get("core", 0.0)),
        mixed / max(1, launches),
    )
    return found, engine


def kv_memory(model: Transformer, residents: int) -> int:
    """Bytes in which every resident's longest context fits at full depth, and some to spare."""
    config, layers = model.config.model, Layers.of(model)
    entries = sum(layers.in_pool[spec.pool] for spec in layers.tables)
    per_token = entries * 2 * config.num_kv_heads * config.head_dim * model.embed.weight.element_size()
    return 2 * (residents + 2) * (config.max_seq_len + 16) * per_token


def calibrate(model: Transformer, work: Workload) -> Costs:
    """What launches cost between a quarter of the residents and all of them."""
    core, boundary = LineFit(), LineFit()
    for share in CALIBRATION:
        short = replace(work, requests_per_place=2, hold=1, new_tokens=(8, 16))
        residents = max(1, round(share * work.residents))
        _, engine = run(model, "depthwise", residents, short)
        for target, source in ((core, engine.core_costs), (boundary, engine.boundary_costs)):
            for width, seconds in source.samples.items():
                # Prompts make a few launches wider than any that the prediction is about.
                if width <= work.residents:
                    target.samples[width] += seconds
    return Costs(core.line(), boundary.line())


def residents_of_equal_bytes(model: Transformer, residents: int, depth: float) -> int:
    """How many sequences have the keys and values of mean depth `depth` where `residents` have those of full depth."""
    layers = Layers.of(model)
    edge, core = (layers.in_pool.get(pool, 0) for pool in ("edge", "core"))
    tables = sum(spec.pool == "core" for spec in layers.tables)
    kept = min(depth, tables) if tables > 1 else tables
    return round(residents * (edge + core * layers.num_recursions) / (edge + core * kept))


def measure(model: Transformer, policies: Sequence[str], work: Workload) -> dict[str, Any]:
    """All policies, round by round in rotating order; see benchmarks/README.md for the fields."""
    layers = Layers.of(model)
    _, warm = run(model, "depthwise", work.residents, replace(work, requests_per_place=2, new_tokens=(4, 8)))
    cases = {policy: (policy, work.residents) for policy in policies}
    if layers.num_recursions > 1 and "depthwise" in policies:
        cases[EQUAL_BYTES] = "depthwise", residents_of_equal_bytes(model, work.residents, warm.mean_depth())
    runs: dict[str, list[Run]] = {case: [] for case in cases}
    predicted: dict[str, list[float]] = {case: [] for case in cases}
    costs = []
    for turn in range(work.rounds):
        costs.append(calibrate(model, work))
        names = list(cases)
        for case in names[turn % len(names) :] + names[: turn % len(names)]:
            policy, residents = cases[case]
            found, _ = run(model, policy, residents, work)
            runs[case].append(found)
            predicted[case].append(
                costs[-1].token_seconds(policy, residents, layers.num_recursions, found.depth, work.hold)
            )
    return {
        "workload": asdict(work),
        "costs": [asdict(cost) | {"boundary_over_core": cost.ratio(work.residents)} for cost in costs],
        "cases": [
            {"case": case, "policy": cases[case][0], "residents": cases[case][1]}
            | summary(runs[case], predicted[case], runs.get("full"), predicted.get("full"))
            for case in cases
        ],
    }


def summary(
    runs: list[Run], predicted: list[float], full: list[Run] | None, predicted_full: list[float] | None
) -> dict[str, Any]:
    """Medians over the rounds; ratios to the policy full are taken within a round."""
    measured = [run.seconds for run in runs]
    report: dict[str, Any] = {
        "tokens_per_second": 1 / median(measured),
        "mean_depth": median(run.depth for run in runs),
        "core_width": median(run.core_width for run in runs),
        "mixed_launches": median(run.mixed_share for run in runs),
        "scheduler_over_core": median(run.scheduler_share for run in runs),
        "predicted_tokens_per_second": 1 / median(predicted),
        "of_prediction": median(p / m for p, m in zip(predicted, measured, strict=True)),
        "round_seconds_per_token": measured,
    }
    if full is not None and predicted_full is not None:
        report["over_full"] = median(f.seconds / m for f, m in zip(full, measured, strict=True))
        report["predicted_over_full"] = median(f / p for f, p in zip(predicted_full, predicted, strict=True))
    return report


__all__ = ["EQUAL_BYTES", "POLICIES", "Workload", "measure"]
