"""The engine alone against the clock: policies side by side on the same requests, beside what launch costs predict.

Every case has an engine of its own, which always has more requests than places. They take turns, some launches each, so
that what else the machine does meets all of them; ratios are taken within a turn. Everything is counted that a token
costs: prompts, every layer, all work on keys and values, head, sampling, scheduling. The prediction (`costs.py`) knows
no more than the residents, the mean depth, and what launches cost in engines with other numbers of residents, which
take turns with the rest.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from megamor.model import Transformer
from megamor.serve.engine.costs import Costs, LineFit
from megamor.serve.engine.engine import ServingEngine
from megamor.serve.engine.layers import Layers
from megamor.serve.engine.request import SamplingParams
from megamor.serve.options import EngineOptions

EQUAL_BYTES = "depthwise, equal KV bytes"
"""The case with as many residents as fit into the keys and values of `residents` sequences at full depth."""
VANILLA = "vanilla"
"""The case of another model: one without recursions, of equal effective depth."""
CALIBRATION = (1 / 4, 1 / 2, 3 / 4, 1.0)
"""Residents of the engines that tell what launches cost, as shares of the residents measured."""
WARM_TURNS = 8
"""Turns before the first that counts, in which sequences get out of step."""


@dataclass(frozen=True)
class Workload:
    """`residents` places are kept busy for `turns`; prompts and continuations are random within their lengths.

    `page_size` and `cuda_graphs` are the engines'.
    """

    residents: int = 32
    turns: int = 30
    prompt_tokens: int = 4
    new_tokens: tuple[int, int] = (40, 60)
    hold: int = 1
    page_size: int = 16
    cuda_graphs: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.prompt_tokens + self.new_tokens[1]

    def requests(self, vocab_size: int) -> Iterator[tuple[list[int], SamplingParams]]:
        """The same for every engine, without end."""
        rng = random.Random(0)
        while True:
            prompt, seed = rng.choices(range(vocab_size), k=self.prompt_tokens), rng.getrandbits(32)
            yield prompt, SamplingParams(max_tokens=rng.randint(*self.new_tokens), ignore_eos=True, seed=seed)


@dataclass
class Contestant:
    """An engine and the seconds per token of its turns."""

    engine: ServingEngine
    requests: Iterator[tuple[list[int], SamplingParams]]
    residents: int
    seconds: list[float] = field(default_factory=list)

    @staticmethod
    def of(model: Transformer, policy: str, residents: int, work: Workload, *, gauge: bool = False) -> Contestant:
        """With memory for everybody's longest text at full depth. A `gauge` tells what its launches cost."""
        config, layers = model.config.model, Layers.of(model)
        entries = sum(layers.in_pool[spec.pool] for spec in layers.tables)
        per_token = entries * 2 * config.num_kv_heads * config.head_dim * model.embed.weight.element_size()
        options = EngineOptions(
            policy=policy,  # type: ignore[arg-type]
            hold=work.hold,
            max_resident=residents,
            page_size=work.page_size,
            kv_memory=2 * ((residents + 2) * (work.longest + work.page_size) + config.max_seq_len) * per_token,
            prefix_caching=False,
            cuda_graphs=work.cuda_graphs,
            synchronize=gauge,
        )
        return Contestant(ServingEngine(model, options), work.requests(config.vocab_size), residents)

    def turn(self) -> None:
        """Read at least two tokens for each resident, and go on to the next boundary."""
        engine = self.engine
        while len(engine.scheduler.waiting) < 2 * self.residents:
            engine.add_request(*next(self.requests))
        before, tokens = engine.accounting.num_read, 0
        begin = time.perf_counter()
        while tokens < 2 * self.residents:
            engine.step()
            tokens = engine.accounting.num_read - before
        self.seconds.append((time.perf_counter() - begin) / tokens)


def residents_of_equal_bytes(model: Transformer, residents: int, depth: float) -> int:
    """How many sequences have the keys and values of mean depth `depth` where `residents` have those of full depth."""
    layers = Layers.of(model)
    edge, core = (layers.in_pool.get(pool, 0) for pool in ("edge", "core"))
    tables = sum(spec.pool == "core" for spec in layers.tables)
    kept = min(depth, tables) if tables > 1 else tables
    return round(residents * (edge + core * layers.num_recursions) / (edge + core * kept))


def measure(
    model: Transformer, policies: Sequence[str], work: Workload, vanilla: Transformer | None = None
) -> dict[str, Any]:
    """All policies in turns, and the `vanilla` model if there is one; see benchmarks/README.md for the fields."""
    cases = {policy: Contestant.of(model, policy, work.residents, work) for policy in policies}
    if vanilla is not None:
        cases[VANILLA] = Contestant.of(vanilla, "full", work.residents, work)
    widths = [max(1, round(share * work.residents)) for share in CALIBRATION]
    gauges = [Contestant.of(model, "depthwise", width, work, gauge=True) for width in widths]
    for turn in range(WARM_TURNS + work.turns):
        if turn == WARM_TURNS // 2 and "depthwise" in policies and Layers.of(model).num_recursions > 1:
            depth = cases["depthwise"].engine.accounting.mean_depth
            residents = residents_of_equal_bytes(model, work.residents, depth)
            cases[EQUAL_BYTES] = Contestant.of(model, "depthwise", residents, work)
        if turn == WARM_TURNS:
            for contestant in (*cases.values(), *gauges):
                contestant.seconds.clear()
                contestant.engine.accounting.forget_costs()
        order = [*cases.values(), *gauges]
        for contestant in order[turn % len(order) :] + order[: turn % len(order)]:
            contestant.turn()
    costs = launch_costs([gauge.engine for gauge in gauges], work.residents)
    return {
        "workload": asdict(work),
        "costs": asdict(costs) | {"boundary_over_core": costs.ratio(work.residents)},
        "cases": [summary(name, case, costs, cases, work) for name, case in cases.items()],
    }


def launch_costs(engines: Sequence[ServingEngine], widest: int) -> Costs:
    """What launches of up to `widest` rows cost; prompts make a few wider than any that the prediction is about."""
    fits = LineFit(), LineFit()
    for engine in engines:
        for fit, source in zip(fits, (engine.accounting.core, engine.accounting.boundary), strict=True):
            for width, seconds in source.samples.items():
                if width <= widest:
                    fit.samples[width] += seconds
    return Costs(fits[0].line(), fits[1].line())


def summary(name: str, case: Contestant, costs: Costs, cases: dict[str, Contestant], work: Workload) -> dict[str, Any]:
    """Medians over the turns; ratios to other cases are taken within a turn."""
    stats, depth = case.engine.stats(), case.engine.accounting.mean_depth
    launches = max(1, stats.launches.get("core", 0))
    num_recursions, policy = case.engine.layers.num_recursions, case.engine.options.policy

    def predicted(other: Contestant) -> float:
        args = (
            other.engine.options.policy,
            other.residents,
            num_recursions,
            other.engine.accounting.mean_depth,
            work.hold,
        )
        return costs.token_seconds(*args)

    # Nothing is predicted for a model whose launches nobody has gauged.
    seconds = None if name == VANILLA else predicted(case)
    report: dict[str, Any] = {
        "case": name,
        "policy": policy,
        "residents": case.residents,
        "tokens_per_second": 1 / median(case.seconds),
        "mean_depth": depth,
        "core_width": stats.rows.get("core", 0) / launches,
        "mixed_launches": sum(count for depths, count in stats.mixed_depths.items() if depths > 1) / launches,
        "scheduler_over_core": stats.seconds["scheduler"] / stats.seconds["core"] if num_recursions else None,
        "predicted_tokens_per_second": seconds and 1 / seconds,
        "of_prediction": seconds and seconds / median(case.seconds),
        "turn_seconds_per_token": case.seconds,
    }
    for other in ("full", "shrink", VANILLA):
        if other in cases:
            ratios = [a / b for a, b in zip(cases[other].seconds, case.seconds, strict=True)]
            report[f"over_{other}"] = median(ratios)
            if seconds and other != VANILLA:
                report[f"predicted_over_{other}"] = predicted(cases[other]) / seconds
    return report
