"""Time, memory and FLOPs of a training step, for models or activation checkpointing policies that are compared.

The models are all kept in memory and take turns: a round runs one step of each on the same batch, in an order that
rotates. `megamor.bench.gpu` measures the published sizes one at a time, with the same steps and the same figures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from megamor.bench.cases import CASES, Case, cases_of_config, with_padding, with_policy
from megamor.bench.measure import (
    NUM_BATCHES,
    Training,
    Window,
    fill_of_batch,
    peak_in_fresh_process,
    release,
    world_for,
)
from megamor.bench.report import Column, Row, Table, device_name, number, provenance, quartiles, rotated, spread, text
from megamor.config import config_to_dict
from megamor.metrics import peak_flops
from megamor.parallel import World, close_world, compiles
from megamor.plan.memory import step_memory

SCHEMA = "megamor-bench-train/1"


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure every comparison and put it into `report["settings"]`, saving whenever something is done.

    Raises:
        ConfigError: an unknown case or policy, or a configuration that can't be built.
    """
    # All configurations are loaded first: a mistake in any of them ends the command before time is spent.
    planned = [[(case, case.config()) for case in cases] for cases in comparisons(args)]
    report |= {"cuda": torch.version.cuda, "settings": []}
    world = world_for(planned[0][0][1], torch.device(args.device))
    try:
        for comparison in planned:
            cases, config, results = [case for case, _ in comparison], comparison[0][1], list[dict[str, Any]]()
            setting = {
                "seq_len": config.data.seq_len,
                "batch_size": config.train.micro_batch_size,
                "precision": config.train.precision,
                "backend": config.parallel.backend,
                "config": config_to_dict(config),
                "cases": results,
            }
            report["settings"].append(setting)
            results += measure(cases, args, world, config.train.micro_batch_size)
            release(world.device)
            setting["rounds"] = max(len(result["round_seconds"]) for result in results)
            compare(results)
            save()
    finally:
        close_world()


def comparisons(args: argparse.Namespace) -> Iterator[list[Case]]:
    """Groups of cases; each is compared with the first of its group.

    Raises:
        ConfigError: an unknown case.
    """
    lengths = [[f"data.seq_len={length}", f"model.max_seq_len={length}"] for length in args.seq_len or ()] or [[]]
    for length, batch in product(lengths, args.micro_batch or [None]):
        overrides = [f"parallel.backend={args.backend}", *length, *args.overrides]
        if args.compile is not None:
            overrides.append(f"train.compile={str(args.compile).lower()}")
        if batch:
            overrides = [f"train.micro_batch_size={batch}", f"train.global_batch_size={batch}", *overrides]
        if args.policies and not args.cases:
            models = [Case("configured", Path(args.config).stem, Path(args.config), tuple(overrides))]
        else:
            models = cases_of_config(args.config, overrides, args.cases or list(CASES), args.baseline)
        if args.fill:
            yield from (with_padding(model, args.fill) for model in models)
        elif args.policies:  # each model is compared with itself: on the same tokens, under each policy
            yield from ([with_policy(model, policy) for policy in args.policies] for model in dict.fromkeys(models))
        else:
            yield models


def measure(cases: Sequence[Case], args: argparse.Namespace, world: World, micro_batch: int) -> list[dict[str, Any]]:
    """Measure cases that are in memory together and take turns."""
    from rich.console import Console

    device = world.device
    with Console(stderr=True).status("memory") as status:
        peaks: list[int | None] = [None] * len(cases)
        if not args.no_memory:
            peaks = [peak_in_fresh_process(case, device, torch.get_num_threads(), micro_batch) for case in cases]
        status.update("warm-up")
        trainings = [Training.of(case, world, micro_batch) for case in cases]
        for training in trainings:
            training.window(at_least=2)
        status.update("rounds")
        windows = take_turns(trainings, args.rounds, args.seconds)
    return [summary(*of_case) for of_case in zip(cases, trainings, windows, peaks, strict=True)]


def take_turns(trainings: Sequence[Training], rounds: int | None, seconds: float) -> list[list[Window]]:
    """A window of each training in each of `rounds`, or of as many as fit into `seconds` (at least one)."""
    found: list[list[Window]] = [[] for _ in trainings]
    done, started = 0, time.perf_counter()
    while done < rounds if rounds else done == 0 or time.perf_counter() - started < seconds:
        for index in rotated(range(len(trainings)), done):
            found[index].append(trainings[index].window())
        done += 1
    return found


def summary(case: Case, training: Training, windows: Sequence[Window], peak: int | None) -> dict[str, Any]:
    """What was measured of a case in its windows."""
    config, device = training.config, training.device
    filled = [fill_of_batch(config, number, case.fill) for number in range(NUM_BATCHES)]
    real = statistics.mean(sum(lengths) for lengths in filled if lengths is not None) if case.fill else None
    tokens = training.accumulation * (real or config.train.micro_batch_size * config.data.seq_len)
    flops = [step for window in windows for step in window.flops]
    executed = statistics.mean(step.training for step in flops)
    recomputed = statistics.mean(step.recomputed(config.train) for step in flops)
    seconds = quartiles([window.step_seconds for window in windows])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak_rate = peak_flops(gpu, config.train.precision)
    depths = [window.depth for window in windows if window.depth is not None]
    result: dict[str, Any] = {
        "name": case.name,
        "label": case.label,
        "policy": case.policy,
        "compiled": compiles(config.train, device),
        "overrides": list(case.overrides),
        "batch_size": config.train.micro_batch_size,
        "fill": real and real / (config.train.micro_batch_size * config.data.seq_len),
        "parameters": training.num_parameters,
        "mean_depth": statistics.mean(depths) if depths else None,
        "steps": len(flops),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds["median"],
        "training_flops": executed,
        "mfu": executed / seconds["median"] / peak_rate if peak_rate else None,
        "hfu": (executed + recomputed) / seconds["median"] / peak_rate if peak_rate else None,
        "peak_memory_bytes": peak,
        "round_seconds": [window.step_seconds for window in windows],
    }
    if case.policy:
        estimate = step_memory(config, 1, on_gpu=device.type == "cuda")
        # The measured peak is above the built model, so the estimate is given without its fp32 weights.
        estimated = round(estimate.total - 4 * training.num_parameters)
        result |= {"recomputed_flops_ratio": recomputed / executed, "estimated_memory": asdict(estimate)}
        result |= {"estimated_memory_bytes": estimated, "estimate_over_peak": estimated / peak if peak else None}
    return result


def compare(results: Sequence[dict[str, Any]]) -> None:
    """Add to each result its ratios to the first case, per sequence, round by round.

    The first case may have been measured more than once; its rounds are then averaged.
    """
    first = [other for other in results if all(other[key] == results[0][key] for key in ("name", "policy"))]
    # The batch is smaller where memory ran out, so everything is compared per sequence.
    times = [[seconds / other["batch_size"] for seconds in other["round_seconds"]] for other in first]
    reference = [statistics.mean(of_a_round) for of_a_round in zip(*times, strict=True)]
    flops, memory = first[0]["training_flops"] / first[0]["batch_size"], first[0]["peak_memory_bytes"]
    for result in results:
        size, peak = result["batch_size"], result["peak_memory_bytes"]
        ratios = [mine / size / other for mine, other in zip(result["round_seconds"], reference, strict=True)]
        result["time_ratio"] = quartiles(ratios)
        result["flops_ratio"] = result["training_flops"] / size / flops
        result["time_over_flops"] = result["time_ratio"]["median"] / result["flops_ratio"]
        result["memory_ratio"] = peak / memory if peak and memory and size == first[0]["batch_size"] else None


def tables(report: Row) -> Iterator[Table]:
    """One table for each comparison."""
    for setting in report["settings"]:
        config, first = setting.get("config") or report["config"], setting["cases"][0]
        title = (
            f"Training step of {setting['batch_size']} × {setting['seq_len']} tokens, {config['model']['num_layers']} "
            f"effective layers, width {config['model']['dim']}, vocabulary {config['model']['vocab_size']:,}, "
            f"{setting['precision']}; {device_name(report)}; {setting['rounds']} rounds, {provenance(report, 'torch')}."
        )
        reference = first.get("policy") or first["name"]
        columns = (
            Column("model", text("label"), left=True),
            Column("policy", lambda row: f"`{row['policy']}`" if row.get("policy") else "", left=True),
            Column("compiled", lambda row: "yes" if row.get("compiled") else "", left=True),
            Column("M parameters", number("parameters", ".2f", 1e-6)),
            Column("step, ms (quartiles)", spread("step_seconds", ".0f", 1e3)),
            Column("tokens/s", number("tokens_per_second", ",.0f")),
            Column("MFU", number("mfu", ".1%")),
            Column("HFU", number("hfu", ".1%")),
            Column(f"time / {reference}", number("time_ratio.median", ".3f")),
            Column(f"FLOPs / {reference}", number("flops_ratio", ".3f")),
            Column("quotient", number("time_over_flops", ".3f")),
            Column("recomputed FLOPs", number("recomputed_flops_ratio", ".1%")),
            Column("peak MB", number("peak_memory_bytes", ".0f", 1e-6)),
            Column("estimated MB", number("estimated_memory_bytes", ".0f", 1e-6)),
            Column("estimate / peak", number("estimate_over_peak", ".2f")),
            Column("mean depth", number("mean_depth", ".2f", null="")),
        )
        yield Table(columns, setting["cases"], title)
