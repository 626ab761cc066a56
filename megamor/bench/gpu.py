"""What a GPU can do, in one call of some minutes: training steps, the whole trainer, and serving, decisive cases first.

Every case runs in a process of its own with a time limit, so that running out of memory, a device in an error state or
a crash costs one case. The report is written after each. The processes are forked: importing torch for each would take
a tenth of the time. So this process must not touch CUDA, whose state doesn't survive a fork.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from megamor.bench import serve
from megamor.bench.cases import MODELS, REFERENCE, SIZES, Case, case_of_size, check_names
from megamor.bench.loader import write_documents
from megamor.bench.measure import Training, within_memory
from megamor.bench.report import Column, Row, Table, number, provenance, text, write_report
from megamor.bench.train import summary
from megamor.config import ParallelConfig
from megamor.errors import ConfigError
from megamor.metrics import peak_memory, read_jsonl, reset_peak_memory
from megamor.parallel import compiles, init_world, share_compiled_code
from megamor.plan.estimate import USABLE
from megamor.plan.memory import step_memory
from megamor.train import build_trainer

SCHEMA = "megamor-bench-gpu/1"
DECISIVE = (REFERENCE, "mor3_expert")
VARIANTS: dict[str, tuple[str, ...]] = {
    "reference loss": ("train.loss_kernel=reference",),
    "torch's loss": ("train.loss_kernel=torch",),
    "documents": (),
    "eager": ("train.compile=false",),
    "single": ("parallel.backend=single",),
}
"""What else is measured of the decisive cases at the first size: one setting changed each."""
OTHERS = ("mor3_expert_share", "mor3_token", "mor2_expert", "mor4_expert", "rec3")
BASE = ("parallel.backend=fsdp2", "parallel.reshard_after_forward=false", "train.compile=true")
LARGEST, ACCUMULATION, LIMIT = 32, 4, 240.0
"""Most sequences of a micro-batch; micro-batches of a step; most seconds of a case."""
TOY = (
    *("model.vocab_size=64", "model.dim=32", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=64"),
    *("model.max_seq_len=32", "data.seq_len=32", "train.precision=fp32", "train.compile=false"),
)
"""Settings of `--toy`, which runs every case on a CPU within seconds and says nothing about speed."""
GOALS = {
    **{f"{size} vanilla": ("mfu", goal) for size, goal in (("135m", 0.45), ("360m", 0.50), ("1.7b", 0.55))},
    **{f"{size} mor3_expert": ("over_vanilla", 1.35) for size in ("135m", "360m", "1.7b")},
    "360m serving": ("of_prediction", 0.95),
}
"""By case: the figure and what it should reach. Besides, no case should compile anything after its warm-up."""


@dataclass(frozen=True)
class Task:
    """A case to measure: `run` in a process of its own, if there is time for the `seconds` that it should take."""

    size: str
    name: str
    run: Callable[[], dict[str, Any]]
    variant: str = ""
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """Such as `360m vanilla, eager`."""
        return f"{self.size} {self.name}" + (f", {self.variant}" if self.variant else "")


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure as many cases as fit into `args.minutes`; see the module docstring.

    Raises:
        ConfigError: there is a GPU, but it can't be used; there is no time; or a case is unknown.
    """
    if not args.minutes > 0:
        raise ConfigError(f"--minutes is {args.minutes}: give a number above 0")
    check_names(args.cases or (), [task.label for task in tasks(args.toy, args.profile)], "case")
    deadline = time.monotonic() + 60 * args.minutes
    share_compiled_code(Path(tempfile.gettempdir(), f"megamor_inductor_{os.getuid()}"))
    found = {} if args.toy else isolated(probe, LIMIT)
    if "error" in found:
        log = "" if found["error"].startswith("ConfigError") else f"\n{found['log']}"
        raise ConfigError(f"the GPU can't be used ({found['error']}); --toy tries the cases on the CPU{log}")
    report |= {"cuda": torch.version.cuda, "probe": found, "toy": "name" not in found, "settings": []}
    report["machine"]["accelerator"] = found.get("name")
    planned = tasks(report["toy"], args.profile)
    measure_all((task for task in planned if args.cases is None or task.label in args.cases), deadline, report, save)


def measure_all(
    planned: Iterable[Task], deadline: float, report: dict[str, Any], save: Callable[[], None]
) -> list[dict[str, Any]]:
    """A result for each task, in `report["settings"]` and saved as soon as it is there."""
    cases: list[dict[str, Any]] = []
    report["settings"] = [{"cases": cases}]
    for task in planned:
        left, begun = deadline - time.monotonic(), time.monotonic()
        result: dict[str, Any] = {"label": task.label, "size": task.size, "name": task.name, "variant": task.variant}
        if left < task.seconds:
            result["skipped"] = f"takes about {task.seconds:.0f} s, {max(0.0, left):.0f} s are left"
        else:
            result = isolated(task.run, min(LIMIT, left)) | result | {"wall_seconds": time.monotonic() - begun}
        cases.append(result)
        compare(cases)
        print(f"{task.label}: {outcome(result)}", file=sys.stderr, flush=True)
        save()
    return cases


def outcome(result: Row) -> str:
    """How a case ended, in a few words."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    return f"failed: {' '.join(result['error'].split())[:160]}" if "error" in result else "measured"


def isolated(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """`work()` in a process of its own; `error` instead if it raises, dies, or takes longer than `seconds`."""
    with tempfile.TemporaryDirectory(prefix="megamor_bench_") as directory:
        log, answer = Path(directory, "log"), Path(directory, "answer.json")
        process = multiprocessing.get_context("fork").Process(target=_answer, args=(work, answer, log))
        process.start()
        assert process.pid
        try:
            process.join(seconds)
        finally:  # Ctrl-C too
            late = process.is_alive()
            with suppress(ProcessLookupError):  # also the processes that it started to compile
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(10.0)  # one that waits for a broken driver can't be killed
        if answer.exists():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
        code = process.exitcode or 0
        ended = signal.Signals(-code).name if code < 0 else f"status {code}"
        reason = f"no result within {seconds:.0f} s" if late else f"the process ended with {ended}"
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
        return {"error": reason, "log": tail}


def _answer(work: Callable[[], dict[str, Any]], answer: Path, log: Path) -> None:
    os.setsid()
    sys.stdout = sys.stderr = open(log, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 - until the process ends
    for descriptor in (1, 2):  # of libraries that don't go through Python
        os.dup2(sys.stderr.fileno(), descriptor)
    torch.set_num_threads(1)  # threads of this process's parent don't survive the fork
    try:
        write_report(answer, work())
    except BaseException as error:  # SystemExit too
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:2000]
        write_report(answer, {"error": reason, "log": log.read_text(encoding="utf-8", errors="replace")[-2000:]})
    os._exit(0)  # with a device in an error state the interpreter's exit may hang or crash


def probe() -> dict[str, Any]:
    """The GPU's name and memory after a computation on it; nothing without a GPU."""
    device = init_world(ParallelConfig(backend="single")).device
    if device.type != "cuda":
        return {}
    (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item()
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": [properties.major, properties.minor],
    }


def tasks(toy: bool, profile: bool) -> Iterator[Task]:
    """All cases, decisive ones first."""

    def training(size: str, name: str, variant: str = "") -> Task:
        # The published vanilla models have up to two layers fewer: ratios are to one of MoR-3's effective depth.
        depth = case_of_size(size, "mor3_expert" if name == REFERENCE else name).config().model.num_layers
        settings = (
            *BASE,
            *VARIANTS.get(variant, ()),
            f"model.num_layers={depth}",
            *(toy_settings(name) if toy else ()),
        )
        case = replace(case_of_size(size, name, settings), documents=variant == "documents", accumulation=ACCUMULATION)
        return Task(size, name, partial(train_case, case, toy, profile), variant, 0 if toy else 45)

    yield from (training(size, name) for size in SIZES for name in DECISIVE)
    yield from (training(SIZES[0], name, variant) for variant in VARIANTS for name in DECISIVE)
    for name in DECISIVE:
        yield Task(SIZES[0], name, partial(trainer_case, name, toy), "whole trainer", 0 if toy else 45)
    yield Task(SIZES[0], "serving", partial(serve_case, toy), seconds=0 if toy else 30)
    yield from (training(SIZES[0], name) for name in OTHERS)


def toy_settings(name: str = "") -> tuple[str, ...]:
    """`TOY` with layers that the case's recursions can divide."""
    return (*TOY, f"model.num_layers={10 if name.startswith('mor4') else 8}")


def fitting_micro_batch(case: Case, memory: float) -> int:
    """The largest power of two of sequences that should fit into `memory` bytes, up to `LARGEST`; at least one."""
    sizes = [LARGEST >> halvings for halvings in range(LARGEST.bit_length())]
    fitting = (size for size in sizes if step_memory(case.config(size), 1).total <= USABLE * memory)
    return next(fitting, 1)


def train_case(case: Case, toy: bool, profile: bool) -> dict[str, Any]:
    """Steps of a model that has the device to itself, with the largest micro-batch that fits."""
    world = init_world(case.config(1).parallel, "cpu" if toy else None)
    largest = 2
    if world.device.type == "cuda":
        largest = fitting_micro_batch(case, torch.cuda.get_device_properties(world.device).total_memory)

    def measure(micro_batch: int) -> list[dict[str, Any]]:
        counters.clear()
        training = Training.of(case, world, micro_batch)
        training.window(at_least=1 if toy else 6)  # compiled blocks need some steps until they have seen all shapes
        graphs = counters["stats"]["unique_graphs"]
        reset_peak_memory(world.device)  # compilation takes memory of its own
        windows = [training.window(seconds=3.0, at_least=2) for _ in range(3)] if not toy else [training.window()]
        reserved = peak_memory(world.device)["memory/peak_reserved_gib"]
        result = summary(case, training, windows, training.peak_bytes()) | {
            "accumulation": training.accumulation,
            "peak_reserved_bytes": None if reserved is None else round(reserved * 2**30),
            "recompilations_after_warmup": counters["stats"]["unique_graphs"] - graphs,
            "unique_graphs": graphs,
        }
        return [result | ({"kernels": kernels(training)} if profile else {})]

    return within_memory(measure, largest, world.device)[0]


def kernels(training: Training, count: int = 25) -> list[dict[str, Any]]:
    """What takes most time in a step: name, calls, and seconds on the device (without one: on the host)."""
    gpu = training.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if gpu else activity.CPU]) as profiled:
        training.window(at_least=1)

    def seconds(event: Any) -> float:
        return float(event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6

    events = sorted(profiled.key_averages(), key=seconds, reverse=True)[:count]
    return [{"name": event.key[:200], "calls": event.count, "seconds": seconds(event)} for event in events]


def trainer_case(name: str, toy: bool) -> dict[str, Any]:
    """A run of `megamor pretrain`: loader, document masks, statistics, metrics and the last checkpoint included."""
    micro_batch, steps, size = (2, 4, "360m") if toy else (8, 30, "360m")
    batch = micro_batch * ACCUMULATION
    with tempfile.TemporaryDirectory(prefix="megamor_bench_run_") as directory:
        tokens, vocabulary = (steps + 1) * batch * (32 if toy else 2048), 64 if toy else 49152
        prefix = write_documents(Path(directory, "tokens"), tokens, vocabulary)
        settings = (*BASE, *(toy_settings() if toy else ()), f"train.micro_batch_size={micro_batch}")
        settings += (f"train.global_batch_size={batch}", f"run.dir={directory}", "metrics.progress=false")
        settings += (f"data.train=[{{prefix: {prefix}, weight: 1.0}}]", f"train.max_steps={steps}")
        config = replace(case_of_size(size, name, settings), documents=True).config()
        world = init_world(config.parallel, "cpu" if toy else None)
        build_trainer(config, world).fit()
        metrics = [row for row in read_jsonl(Path(directory, config.run.name, "metrics.jsonl")) if "train/loss" in row]
    # The second half: what is compiled has been, and the caches of files are warm.
    seconds = [row["throughput/training_seconds"] for row in metrics[len(metrics) // 2 - 1 :]]
    return {
        "batch_size": micro_batch,
        "accumulation": ACCUMULATION,
        "compiled": compiles(config.train, world.device),
        "tokens_per_second": batch * config.data.seq_len * (len(seconds) - 1) / (seconds[-1] - seconds[0]),
        "mfu": metrics[-1]["throughput/mfu"],
        "data_wait_seconds": statistics.median(row["throughput/data_wait_seconds"] for row in metrics),
    }


def serve_case(toy: bool) -> dict[str, Any]:
    """Depth-wise decoding beside vanilla, and the rate that the costs of its batches predict."""
    bench = MODELS.parent / "bench"
    device = init_world(ParallelConfig(backend="single"), "cpu" if toy else None).device
    args = argparse.Namespace(
        policies=["depthwise"], config=str(bench / "serve_360m.yaml"), vanilla=str(bench / "serve_360m_vanilla.yaml"),
        kv_policies=None, hold=0, page_size=16, no_cuda_graphs=False, device=str(device),
        overrides=[], residents=[128], turns=30, prompt_tokens=64, new_tokens=(96, 160),
    )  # fmt: skip
    if toy:
        small = {"overrides": [*toy_settings()], "residents": [2], "turns": 2, "prompt_tokens": 3, "new_tokens": (4, 9)}
        vars(args).update(small)
    report: dict[str, Any] = {}
    serve.run(args, report, lambda: None)
    names = ("tokens_per_second", "of_prediction", "over_vanilla", "mean_depth", "predicted_tokens_per_second", "hold")
    return {name: report["settings"][0]["cases"][0].get(name) for name in names}


def compare(cases: Sequence[dict[str, Any]]) -> None:
    """Add to each result its ratios to vanilla of the same size and variant."""
    measured = [case for case in cases if "training_flops" in case or case["variant"] == "whole trainer"]
    vanilla = {(c["size"], c["variant"]): c for c in measured if c["name"] == REFERENCE and "tokens_per_second" in c}
    for case in measured:
        other = vanilla.get((case["size"], case["variant"]))
        if other is None or "tokens_per_second" not in case:
            continue
        case["over_vanilla"] = case["tokens_per_second"] / other["tokens_per_second"]
        if "training_flops" in case:
            flops = [one["training_flops"] / one["batch_size"] for one in (other, case)]
            case["flops_allow"] = flops[0] / flops[1]


def tables(report: Row) -> Iterator[Table]:
    """All cases, then the goals and whether they are met."""
    cases, machine = report["settings"][0]["cases"], report["machine"]
    where = machine["accelerator"] or f"toy models on {machine['cpu']}, which say nothing about a GPU"
    columns = (
        Column("case", text("label"), left=True),
        Column(
            "micro-batches", lambda row: f"{row['accumulation']} × {row['batch_size']}" if "batch_size" in row else ""
        ),
        Column("tokens/s", number("tokens_per_second", ",.0f")),
        Column("MFU", number("mfu", ".1%")),
        Column("over vanilla", number("over_vanilla", ".2f")),
        Column("FLOPs allow", number("flops_allow", ".2f")),
        Column("of predicted", number("of_prediction", ".0%")),
        Column("peak GB", number("peak_reserved_bytes", ".1f", 1e-9)),
        Column("mean depth", number("mean_depth", ".2f", null="")),
        Column("recompiled", number("recompilations_after_warmup", "d")),
        Column("", lambda row: "" if outcome(row) == "measured" else outcome(row), left=True),
    )
    yield Table(columns, cases, f"{where}; {provenance(report, 'torch')}.")
    yield Table(
        (Column("goal", text("goal"), left=True), Column("measured", text("found")), Column("met", text("met"))),
        [*goals([] if report["toy"] else cases)],
    )


def goals(cases: Sequence[Row]) -> Iterator[Row]:
    """Each goal of these cases: the goal in words, what was found, and whether that reaches it."""
    names = {"mfu": "MFU", "over_vanilla": "times vanilla's tokens/s", "of_prediction": "of the predicted tokens/s"}
    found = {case["label"]: case for case in cases}
    for label, (figure, goal) in GOALS.items():
        if label not in found:
            continue
        form, value = ".2f" if figure == "over_vanilla" else ".0%", found[label].get(figure)
        known = {"found": "not measured", "met": ""} if value is None else {"found": format(value, form)}
        if value is not None:
            known["met"] = "yes" if value >= goal else "no"
        yield {"goal": f"{label}: {names[figure]} ≥ {goal:{form}}", **known}
    again = [case["recompilations_after_warmup"] for case in cases if case.get("compiled") and "mean_depth" in case]
    known = {"found": f"{max(again)} in the worst case", "met": "no" if max(again) else "yes"} if again else {}
    yield {"goal": "recompilations after the warm-up: 0", "found": "not measured", "met": "", **known}
