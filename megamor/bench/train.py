"""Time, memory and FLOPs of a training step, for models or activation checkpointing policies that are compared.

Models of one configuration are all kept in memory and take turns: a round runs one step of each on the same batch, in
an order that rotates. Published sizes are measured one at a time, each for a few windows of steps, with vanilla before
and after the others. Ratios are taken round by round (window by window), so that other load on the machine affects
both sides of them. docs/benchmarks.md explains the fields of the report.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from megamor.bench.cases import (
    CASES,
    PUBLISHED_DEFAULT,
    REFERENCE,
    Case,
    cases_of_config,
    cases_of_size,
    micro_batch_of,
    with_policy,
)
from megamor.bench.measure import (
    Training,
    Window,
    peak_in_fresh_process,
    profile_steps,
    release,
    within_memory,
    world_for,
)
from megamor.bench.report import Column, Row, Table, device_name, number, provenance, quartiles, spread, text
from megamor.config import config_to_dict
from megamor.metrics import peak_flops, peak_memory, reset_peak_memory
from megamor.parallel import World, close_world
from megamor.plan.memory import step_memory

SCHEMA = "megamor-bench-train/1"
OLD_SCHEMA = "megamor-bench-checkpointing/1"
"""Files of a former subcommand, which compared policies."""
WARMUP_STEPS, WARMUP_STEPS_ALONE = 2, 6


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure every comparison and put it into `report["settings"]`, saving whenever something is done.

    Raises:
        ConfigError: an unknown case, size or policy, or a configuration that can't be built.
    """
    started = time.perf_counter()
    if args.static_shapes:
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 64
    # All configurations are loaded first: a mistake in any of them ends the command before time is spent.
    planned = [[(case, case.config()) for case in cases] for cases in comparisons(args)]
    report |= {"cuda": torch.version.cuda, "settings": []}
    world = world_for(planned[0][0][1], torch.device(args.device))
    try:
        for cases in planned:
            config = cases[0][1]
            setting: dict[str, Any] = {
                "seq_len": config.data.seq_len,
                "batch_size": config.train.micro_batch_size,
                "precision": config.train.precision,
                "backend": config.parallel.backend,
                "config": config_to_dict(config),
                "cases": [],
            }
            report["settings"].append(setting)
            results = setting["cases"]
            for group in [[case] for case, _ in cases] if args.sizes else [[case for case, _ in cases]]:
                if args.sizes:
                    results.append(measure_alone(group[0], results, args, world, started))
                else:
                    results += measure(group, args, world)
                setting["rounds"] = max(len(result.get("round_seconds", ())) for result in results)
                compare(results)
                save()
    finally:
        close_world()


def comparisons(args: argparse.Namespace) -> Iterator[list[Case]]:
    """Groups of cases; each is compared with the first of its group.

    Raises:
        ConfigError: an unknown case or size.
    """
    common = [*args.overrides, f"parallel.backend={args.backend or ('fsdp2' if args.sizes else 'single')}"]
    for models in _models(args, common):
        if not args.policies:
            yield models
            continue
        for model in dict.fromkeys(models):  # each is compared with itself: on the same tokens, under each policy
            yield [with_policy(model, policy) for policy in args.policies]


def _models(args: argparse.Namespace, common: Sequence[str]) -> Iterator[list[Case]]:
    lengths = [[f"data.seq_len={length}", f"model.max_seq_len={length}"] for length in args.seq_len or ()] or [[]]
    modes = [True, False] if args.sizes and args.compile is None else [args.compile]
    for compiled, size, length in product(modes, args.sizes or [None], lengths):
        own = [] if compiled is None else [f"train.compile={str(compiled).lower()}"]
        batch = args.micro_batch or (size and micro_batch_of(size))
        if batch:
            own += [f"train.micro_batch_size={batch}", f"train.global_batch_size={batch}"]
        overrides = [*own, *length, *common]
        if size:
            default = (REFERENCE, "mor3_expert") if args.policies else PUBLISHED_DEFAULT
            yield cases_of_size(size, overrides, args.cases or default)
        elif args.policies and not args.cases:
            yield [Case("configured", Path(args.config).stem, Path(args.config), tuple(overrides))]
        else:
            yield cases_of_config(args.config, overrides, args.cases or list(CASES), args.baseline)


def measure(
    cases: Sequence[Case], args: argparse.Namespace, world: World, micro_batch: int | None = None
) -> list[dict[str, Any]]:
    """A result for each case. All are in memory at once and take turns; a single one does several steps a turn."""
    from rich.console import Console

    alone, device = bool(args.sizes), world.device
    with Console(stderr=True).status("memory") as status:
        peaks: list[int | None] = [None] * len(cases)
        if not alone and not args.no_memory:
            peaks = [peak_in_fresh_process(case, device, torch.get_num_threads()) for case in cases]
        counters.clear()
        status.update("warm-up")
        trainings = [Training.of(case, world, micro_batch) for case in cases]
        warmup = [training.window(at_least=WARMUP_STEPS_ALONE if alone else WARMUP_STEPS) for training in trainings]
        graphs = counters["stats"]["unique_graphs"]
        reset_peak_memory(device)  # compilation takes memory of its own
        if alone:
            count = args.rounds or 3
            windows = take_turns(trainings, count, 0, status.update, (args.seconds or 9.0) / count, 2)
        else:
            windows = take_turns(trainings, args.rounds, args.seconds or 60.0, status.update)
    results = [summary(*of_case) for of_case in zip(cases, trainings, windows, strict=True)]
    for result, training, peak in zip(results, trainings, peaks, strict=True):
        result |= of_memory(training, training.peak_bytes() if alone else peak)
    if alone:
        reserved = peak_memory(device)["memory/peak_reserved_gib"]
        results[0] |= {
            "warmup_seconds": warmup[0].seconds,
            "peak_reserved_bytes": None if reserved is None else round(reserved * 2**30),
            "graphs": graphs,
            "recompilations_after_warmup": counters["stats"]["unique_graphs"] - graphs,
            "recompile_limit_hit": recompile_limit_hit(),
        }
    if args.profile:
        results = [
            result | {"profile": profile_steps(training)} for result, training in zip(results, trainings, strict=True)
        ]
    return results


def measure_alone(
    case: Case, results: Sequence[Mapping[str, Any]], args: argparse.Namespace, world: World, started: float
) -> dict[str, Any]:
    """The result of a case that has the device to itself: halved until it fits, or why there is none.

    A failure is recorded, so that the other cases are still measured; so is a case that would end after `--time-limit`.
    """
    begun, config = time.perf_counter(), case.config()
    result = {"name": case.name, "label": case.label, "policy": case.policy, "compiled": config.train.compile}
    expected = max((other.get("wall_seconds", 0) for other in results), default=0)
    if args.time_limit is not None and begun - started + expected > args.time_limit:
        return result | {"skipped": f"{args.time_limit:.0f} s would not have been enough"}

    def attempt(micro_batch: int) -> dict[str, Any]:
        return measure([case], args, world, micro_batch)[0]

    try:
        result |= within_memory(attempt, config.train.micro_batch_size, world.device)
        said = f"{result['tokens_per_second']:,.0f} tokens/s"
    except Exception as error:
        traceback.print_exc()
        said = result["error"] = f"{type(error).__name__}: {error}"[:2000]
    print(f"{case.label}{', compiled' if result['compiled'] else ''}: {said}", file=sys.stderr, flush=True)
    release(world.device)
    return result | {"wall_seconds": time.perf_counter() - begun}


def take_turns(
    trainings: Sequence[Training],
    rounds: int | None,
    seconds: float,
    progress: Callable[[str], None],
    window_seconds: float = 0,
    at_least: int = 1,
) -> list[list[Window]]:
    """A window of each training in each of `rounds`, or of as many as fit into `seconds` (at least one).

    The order rotates from round to round, so that no case is always measured after the same one.
    """
    found: list[list[Window]] = [[] for _ in trainings]
    done, started = 0, time.perf_counter()
    while done < rounds if rounds else done == 0 or time.perf_counter() - started < seconds:
        first = done % len(trainings)
        for index in [*range(first, len(trainings)), *range(first)]:
            found[index].append(trainings[index].window(window_seconds, at_least))
        done += 1
        progress(f"{done} rounds")
    return found


def recompile_limit_hit() -> bool:
    """Whether torch.compile has given up on a function since the counters were cleared: it then runs uncompiled."""
    reasons = [*counters["unimplemented"], *counters["graph_break"]]
    return any("limit exceeded" in reason for reason in reasons)


def summary(case: Case, training: Training, windows: Sequence[Window]) -> dict[str, Any]:
    """What was measured of a case in its windows."""
    config, device = training.config, training.device
    tokens = config.train.micro_batch_size * config.data.seq_len
    flops = [step for window in windows for step in window.flops]
    executed = statistics.mean(step.training for step in flops)
    recomputed = statistics.mean(step.recomputed(config.train) for step in flops)
    seconds = quartiles([window.step_seconds for window in windows])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = peak_flops(gpu, config.train.precision)
    depths = [window.depth for window in windows if window.depth is not None]
    return {
        "name": case.name,
        "label": case.label,
        "policy": case.policy,
        "overrides": list(case.overrides),
        "compiled": config.train.compile,
        "batch_size": config.train.micro_batch_size,
        "parameters": training.num_parameters,
        "mean_depth": statistics.mean(depths) if depths else None,
        "steps": len(flops),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds["median"],
        "training_flops": executed,
        "recomputed_flops_ratio": recomputed / executed,
        "mfu": executed / seconds["median"] / peak if peak else None,
        "hfu": (executed + recomputed) / seconds["median"] / peak if peak else None,
        "round_seconds": [window.step_seconds for window in windows],
    }


def of_memory(training: Training, peak: int | None) -> dict[str, Any]:
    """The measured peak beside the estimate for this configuration, both without the weights of the built model."""
    estimate = step_memory(training.config, 1, on_gpu=training.device.type == "cuda")
    estimated = round(estimate.total - 4 * training.num_parameters)
    return {"peak_memory_bytes": peak, "estimated_memory_bytes": estimated, "estimated_memory": asdict(estimate)}


def compare(results: Sequence[dict[str, Any]]) -> None:
    """Add to each result its ratios to the first case, per sequence, round by round.

    The first case may have been measured more than once; its rounds are then averaged.
    """
    measured = [result for result in results if "round_seconds" in result]
    first = [
        other for other in measured if (other["name"], other["policy"]) == (results[0]["name"], results[0]["policy"])
    ]
    if not first:
        return
    # The batch is smaller where memory ran out, so everything is compared per sequence.
    times = [[seconds / other["batch_size"] for seconds in other["round_seconds"]] for other in first]
    reference = [statistics.mean(of_a_round) for of_a_round in zip(*times, strict=True)]
    flops, memory = first[0]["training_flops"] / first[0]["batch_size"], first[0]["peak_memory_bytes"]
    for result in measured:
        size, peak = result["batch_size"], result["peak_memory_bytes"]
        ratios = [mine / size / other for mine, other in zip(result["round_seconds"], reference, strict=True)]
        result["time_ratio"] = quartiles(ratios)
        result["flops_ratio"] = result["training_flops"] / size / flops
        result["time_over_flops"] = result["time_ratio"]["median"] / result["flops_ratio"]
        result["memory_ratio"] = peak / memory if peak and memory and size == first[0]["batch_size"] else None


def _of_policy(path: str, form: str, scale: float = 1) -> Callable[[Row], str]:
    """Cells of what matters only where policies are compared."""
    show = number(path, form, scale)
    return lambda row: show(row) if row.get("policy") else ""


def _estimate_over_peak(row: Row) -> str:
    peak = row.get("policy") and row.get("peak_memory_bytes")
    return f"{row['estimated_memory_bytes'] / peak:.2f}" if peak else ""


def columns(first: str) -> list[Column]:
    """The columns of a comparison whose first case is called `first`."""
    return [
        Column("model", text("label"), left=True),
        Column("policy", lambda row: f"`{row['policy']}`" if row.get("policy") else "", left=True),
        Column("compiled", lambda row: "yes" if row.get("compiled") else "", left=True),
        Column("fitting batch", lambda row: str(row["batch_size"]) if row.get("out_of_memory_at") else ""),
        Column("parameters", lambda row: f"{row['parameters'] / 1e6:.2f}M" if "parameters" in row else ""),
        Column("step, ms (quartiles)", spread("step_seconds", ".0f", 1e3)),
        Column("tokens/s", number("tokens_per_second", ",.0f")),
        Column("MFU", number("mfu", ".1%")),
        Column("HFU", number("hfu", ".1%")),
        Column(f"time / {first}", number("time_ratio.median", ".3f")),
        Column(f"FLOPs / {first}", number("flops_ratio", ".3f")),
        Column("quotient", number("time_over_flops", ".3f")),
        Column("recomputed FLOPs", _of_policy("recomputed_flops_ratio", ".1%")),
        Column("peak MB", number("peak_memory_bytes", ".0f", 1e-6)),
        Column("estimated MB", _of_policy("estimated_memory_bytes", ".0f", 1e-6)),
        Column("estimate / peak", _estimate_over_peak),
        Column("mean depth", lambda row: number("mean_depth", ".2f")(row).replace("n/a", "")),
        Column("recompiled", number("recompilations_after_warmup", "d")),
        Column("given up", lambda row: "yes" if row.get("recompile_limit_hit") else ""),
        Column("", lambda row: "failed" if "error" in row else "skipped" if "skipped" in row else "", left=True),
    ]


def tables(report: Row) -> Iterator[Table]:
    """One table for each comparison."""
    for setting in report["settings"] if report["schema"] == SCHEMA else [_setting_of_policies(report)]:
        config, first = setting.get("config") or report["config"], setting["cases"][0]
        title = (
            f"Training step of {setting['batch_size']} × {setting['seq_len']} tokens, {config['model']['num_layers']} "
            f"effective layers, width {config['model']['dim']}, vocabulary {config['model']['vocab_size']:,}, "
            f"{setting['precision']}; {device_name(report)}; {setting['rounds']} rounds, {provenance(report, 'torch')}."
        )
        yield Table(columns(first.get("policy") or first["name"]), setting["cases"], title)


def _setting_of_policies(report: Row) -> dict[str, Any]:
    train = report["config"]["train"]
    return {
        "seq_len": report["config"]["data"]["seq_len"],
        "batch_size": train["micro_batch_size"],
        "precision": train["precision"],
        "rounds": report["rounds"],
        "cases": report["policies"],
    }
