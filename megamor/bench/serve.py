"""The serving engine alone: policies side by side on the same requests, beside what the costs of batches predict.

Every case has an engine of its own, which always has more requests than slots; the engines take turns, and ratios are
taken within a turn. The prediction (serve/engine/costs.py) knows only the residents, the mean depth, and what batches
cost in further engines with other numbers of residents, which take turns with the rest.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from megamor.bench.cases import check_names
from megamor.bench.measure import release
from megamor.bench.report import Column, Row, Table, device_name, number, provenance, rotated, text
from megamor.config import config_to_dict, load_config
from megamor.errors import ConfigError
from megamor.load import cast, load_model
from megamor.model import Transformer, build_model
from megamor.serve.engine.costs import Costs, LineFit
from megamor.serve.engine.engine import ServingEngine
from megamor.serve.engine.layers import Layers
from megamor.serve.engine.request import SamplingParams
from megamor.serve.options import POLICIES, EngineOptions

SCHEMA = "megamor-bench-serve-offline/2"
EQUAL_BYTES = "depthwise, equal KV bytes"
"""The case with as many residents as fit into the keys and values of `residents` sequences at full depth."""
VANILLA = "vanilla"
"""The case of another model: one without recursions, of equal effective depth."""
CALIBRATION = (1 / 4, 1 / 2, 3 / 4, 1.0)
"""Residents of the engines that measure what batches cost, as fractions of the residents of a case."""
WARMUP_TURNS = 8
"""Turns before the first that counts, in which sequences get out of step."""


@dataclass(frozen=True)
class Workload:
    """`residents` slots are kept busy for `turns`; prompts and continuations are random within their lengths.

    `page_size` and `cuda_graphs` are the engines'; `hold` is that of `depthwise`, in core batches
    (0: the best for the costs that are measured).
    """

    residents: int
    turns: int
    prompt_tokens: int
    new_tokens: tuple[int, int]
    hold: int
    page_size: int
    cuda_graphs: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.prompt_tokens + self.new_tokens[1]

    def requests(self, vocab_size: int) -> Iterator[tuple[list[int], SamplingParams]]:
        """An endless stream of requests, the same for every engine."""
        rng = random.Random(0)
        while True:
            prompt, seed = rng.choices(range(vocab_size), k=self.prompt_tokens), rng.getrandbits(32)
            settings = {"max_tokens": rng.randint(*self.new_tokens), "ignore_eos": True, "seed": seed}
            yield prompt, SamplingParams.model_validate(settings)


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure every model with every number of residents.

    Raises:
        ConfigError: an unknown policy, overrides for a checkpoint, or texts that don't fit into the model's context.
    """
    check_names(args.policies, POLICIES, "policy")
    report["settings"] = []
    vanilla = build(args.vanilla, args) if args.vanilla else None
    for kv_policy in args.kv_policies or [None]:
        model = build(args.config, args, *([f"recursion.kv_policy={kv_policy}"] if kv_policy else []))
        context = min(other.config.model.max_seq_len for other in (model, vanilla or model))
        for residents in args.residents:
            lengths = args.prompt_tokens, args.new_tokens
            work = Workload(residents, args.turns, *lengths, args.hold, args.page_size, not args.no_cuda_graphs)
            if work.longest > context:
                raise ConfigError(
                    f"--prompt-tokens {work.prompt_tokens} and --new-tokens up to {work.new_tokens[1]} don't fit into "
                    f"the model's context of {context}"
                )
            setting = {"model": model.config.run.name, "config": config_to_dict(model.config)}
            report["settings"].append(setting | measure(model, args.policies, work, vanilla))
            save()
            release(torch.device(args.device))


def build(config: str | None, args: argparse.Namespace, *own: str) -> Transformer:
    """The model of a configuration file, with random weights; of `--checkpoint` if there is none.

    Raises:
        ConfigError: overrides for a checkpoint.
    """
    # On a GPU in the precision that a server uses there; a CPU has no fast bf16.
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    if config:
        model = build_model(load_config(config, [*args.overrides, *own]), device=args.device)
        return cast(model, dtype).eval()
    if own or (args.overrides and not args.vanilla):
        raise ConfigError(f"{[*own, *args.overrides][0]}: a checkpoint has its settings; key=value is for --config")
    return load_model(args.checkpoint, args.device, dtype).model


@dataclass
class Contestant:
    """An engine and the seconds per token of its turns."""

    engine: ServingEngine
    requests: Iterator[tuple[list[int], SamplingParams]]
    residents: int
    seconds: list[float] = field(default_factory=list)

    @staticmethod
    def of(model: Transformer, policy: str, residents: int, work: Workload, *, gauge: bool = False) -> Contestant:
        """An engine with memory for every resident's longest text at full depth. A `gauge` times its batches."""
        config, layers = model.config.model, Layers.of(model)
        entries = sum(layers.in_pool[spec.pool] for spec in layers.tables)
        per_token = entries * 2 * config.num_kv_heads * config.head_dim * model.embed.weight.element_size()
        options = EngineOptions(
            policy=policy,  # type: ignore[arg-type]
            hold=work.hold or 1,
            max_resident=residents,
            page_size=work.page_size,
            # Twice what is needed: no case may be slowed down by a shortage of pages.
            kv_memory=2 * ((residents + 2) * (work.longest + work.page_size) + config.max_seq_len) * per_token,
            prefix_caching=False,
            cuda_graphs=work.cuda_graphs,
            synchronize=gauge,
        )
        return Contestant(ServingEngine(model, options), work.requests(config.vocab_size), residents)

    def turn(self) -> None:
        """Read at least two tokens for each resident, up to the end of a batch."""
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
    """How many sequences of mean depth `depth` have as many keys and values as `residents` sequences of full depth."""
    layers = Layers.of(model)
    edge, core = (layers.in_pool.get(pool, 0) for pool in ("edge", "core"))
    tables = sum(spec.pool == "core" for spec in layers.tables)
    kept = min(depth, tables) if tables > 1 else tables
    return round(residents * (edge + core * layers.num_recursions) / (edge + core * kept))


def measure(
    model: Transformer, policies: Sequence[str], work: Workload, vanilla: Transformer | None = None
) -> dict[str, Any]:
    """All policies in turns, and the `vanilla` model if there is one."""
    cases = {policy: Contestant.of(model, policy, work.residents, work) for policy in policies}
    if vanilla is not None:
        cases[VANILLA] = Contestant.of(vanilla, "full", work.residents, work)
    widths = [max(1, round(fraction * work.residents)) for fraction in CALIBRATION]
    gauges = [Contestant.of(model, "depthwise", width, work, gauge=True) for width in widths]
    for turn in range(WARMUP_TURNS + work.turns):
        if turn == WARMUP_TURNS // 2 and "depthwise" in policies and Layers.of(model).num_recursions > 1:
            # Equal bytes depend on the mean depth, which is known only now; the rest of the warm-up is for this engine.
            depth = cases["depthwise"].engine.accounting.mean_depth
            residents = residents_of_equal_bytes(model, work.residents, depth)
            cases[EQUAL_BYTES] = Contestant.of(model, "depthwise", residents, work)
        if turn == WARMUP_TURNS // 2 and not work.hold:
            costs = batch_costs([gauge.engine for gauge in gauges], work.residents)
            for case in cases.values():
                depth = case.engine.accounting.mean_depth or 1.0
                case.engine.scheduler.hold = costs.best_hold(case.residents, case.engine.layers.num_recursions, depth)
        if turn == WARMUP_TURNS:
            for contestant in (*cases.values(), *gauges):
                contestant.seconds.clear()
                contestant.engine.accounting.forget_costs()
        for contestant in rotated([*cases.values(), *gauges], turn):
            contestant.turn()
    costs = batch_costs([gauge.engine for gauge in gauges], work.residents)
    return {
        "workload": asdict(work),
        "costs": asdict(costs) | {"boundary_over_core": costs.ratio(work.residents)},
        "cases": [summary(name, case, costs, cases, work) for name, case in cases.items()],
    }


def batch_costs(engines: Sequence[ServingEngine], widest: int) -> Costs:
    """What batches of up to `widest` rows cost; prompts make a few of them wider, which the prediction ignores."""
    fits = LineFit(), LineFit()
    for engine in engines:
        for fit, source in zip(fits, (engine.accounting.core, engine.accounting.boundary), strict=True):
            for width, seconds in source.samples.items():
                if width <= widest:
                    fit.samples[width] += seconds
    return Costs(fits[0].line(), fits[1].line())


def summary(name: str, case: Contestant, costs: Costs, cases: dict[str, Contestant], work: Workload) -> dict[str, Any]:
    """Medians over the turns; ratios to other cases are taken within a turn."""
    stats, engine = case.engine.stats(), case.engine
    batches, num_recursions = max(1, stats.launches.get("core", 0)), engine.layers.num_recursions

    def predicted(other: Contestant) -> float:
        policy, depth = other.engine.options.policy, other.engine.accounting.mean_depth
        return costs.token_seconds(policy, other.residents, num_recursions, depth, other.engine.scheduler.hold)

    # The batches of vanilla were not timed, so nothing is predicted for it.
    seconds = None if name == VANILLA else predicted(case)
    report: dict[str, Any] = {
        "case": name,
        "policy": engine.options.policy,
        "residents": case.residents,
        "hold": engine.scheduler.hold,
        "tokens_per_second": 1 / median(case.seconds),
        "mean_depth": engine.accounting.mean_depth,
        "core_width": stats.rows.get("core", 0) / batches,
        "mixed_launches": sum(count for depths, count in stats.mixed_depths.items() if depths > 1) / batches,
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


def _of_recursions(path: str, form: str) -> Callable[[Row], str]:
    show = number(path, form)
    return lambda row: show(row) if row["mean_depth"] else ""


COLUMNS = (
    Column("policy", text("case"), left=True),
    Column("residents", text("residents")),
    Column("mean depth", _of_recursions("mean_depth", ".2f")),
    Column("rows per core batch", _of_recursions("core_width", ".1f")),
    Column("mixed batches", _of_recursions("mixed_launches", ".0%")),
    Column("scheduling / core", _of_recursions("scheduler_over_core", ".1%")),
    Column("tokens/s", number("tokens_per_second", ".0f")),
    Column("of predicted", number("of_prediction", ".0%")),
    Column("over full", number("over_full", ".2f")),
    Column("predicted", number("predicted_over_full", ".2f")),
    Column("over shrink", number("over_shrink", ".2f")),
    Column("predicted", number("predicted_over_shrink", ".2f")),
    Column("over vanilla", number("over_vanilla", ".2f")),
)


def tables(report: Row) -> Iterator[Table]:
    """One table for each model and number of residents."""
    for setting in report["settings"]:
        work, config, costs = setting["workload"], setting["config"], setting["costs"]
        model, recursion, (fixed, row) = config["model"], config["recursion"], costs["core"]
        title = (
            f"{model['num_layers']} effective layers, {recursion['num_recursions']} recursions, width {model['dim']}, "
            f"{recursion['sharing']}, vocabulary {model['vocab_size']:,}, {recursion['kv_policy']}; prompts of "
            f"{work['prompt_tokens']} tokens, {'–'.join(map(str, work['new_tokens']))} new ones; a core batch takes "
            f"{1e3 * fixed:.2f} ms + {1e3 * row:.3f} ms a row, a boundary {costs['boundary_over_core']:.2f} of it. "
            f"{device_name(report)}; {work['turns']} turns, {provenance(report, 'torch')}."
        )
        yield Table(COLUMNS, setting["cases"], title)
