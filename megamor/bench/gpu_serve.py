"""Serving on one GPU: depth-wise batching beside lock-step exits, full depth, and vanilla of equal effective depth.

examples:
  python -m megamor.bench.gpu_serve --json serve.json
  python -m megamor.bench.gpu_serve --size 135m --residents 64 --kv-policies share_first --json serve.json

Engines take turns on random prompts, and everything is counted that a token costs (bench/serving_offline.py). Weights
are random and in bf16; about half of the tokens of a recursion go on to the next, and router.inference_threshold=0.501
makes that fewer. Vanilla is served by the same engine, with continuous batching. The file is written after each
setting.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megamor.bench.gpu_cases import MODELS, SIZES
from megamor.bench.gpu_measure import release
from megamor.bench.origin import describe_origin
from megamor.bench.serving import print_offline
from megamor.bench.serving_offline import Workload, measure
from megamor.config import load_config
from megamor.errors import ConfigError, user_errors
from megamor.load import cast
from megamor.model import Transformer, build_model
from megamor.serve.options import POLICIES

SCHEMA = "megamor-bench-gpu-serve/1"
KV_POLICIES = ("recursion_wise", "share_first")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor/bench/gpu_serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, for all models")
    parser.add_argument("--size", choices=list(SIZES), default="360m", help="default: 360m")
    parser.add_argument("--recursions", type=int, choices=[2, 3, 4], default=3, help="default: 3")
    parser.add_argument("--kv-policies", type=_names, default=list(KV_POLICIES), metavar="A,B", help="default: both")
    parser.add_argument("--residents", type=_numbers, default=[32, 128], metavar="N,M", help="default: 32,128")
    parser.add_argument("--turns", type=int, default=30, help="of each engine (default: 30)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each request (default: 64)")
    parser.add_argument("--new-tokens", type=_numbers, default=[96, 160], metavar="A,B", help="default: 96,160")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page (default: 16)")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="start every kernel by itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument("--revision", metavar="REV", help="to record as the commit, where there is no git checkout")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for testing the bench")
    return parser.parse_intermixed_args(argv)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device; --device cpu tests the bench itself")
    device = torch.device(args.device)
    command = shlex.join(["python", "megamor/bench/gpu_serve.py", *(sys.argv[1:] if argv is None else argv)])
    origin = describe_origin(device)
    if args.revision:
        origin["commit"] = {"revision": args.revision, "dirty": None}
    report: dict[str, Any] = {"schema": SCHEMA, "command": command, **origin, "cuda": torch.version.cuda, "results": []}
    low, high = args.new_tokens[0], args.new_tokens[-1]
    for kv_policy in args.kv_policies:
        routed = [f"recursion.kv_policy={kv_policy}", "router.inference_threshold=0.5"]
        model = build(args, f"_mor{args.recursions}", routed, device)
        vanilla = build(args, "", [], device)
        for residents in args.residents:
            engine = {"page_size": args.page_size, "cuda_graphs": not args.no_cuda_graphs}
            work = Workload(residents, args.turns, args.prompt_tokens, (low, high), **engine)
            label = {"size": args.size, "recursions": args.recursions, "kv_policy": kv_policy}
            result = {**label, **measure(model, POLICIES, work, vanilla)}
            report["results"].append(result)
            print(f"{args.size}, {args.recursions} recursions, {kv_policy}, {residents} residents")
            print_offline(result)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            release(device)


def build(args: argparse.Namespace, suffix: str, own: Sequence[str], device: torch.device) -> Transformer:
    """A published model with random weights."""
    # A shape alone is no run: what else a configuration must say has no part in serving.
    rest = ["train.max_steps=1", "optim.warmup_steps=0"]
    config = load_config(MODELS / f"{SIZES[args.size].prefix}{suffix}.yaml", [*own, *rest, *args.overrides])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return cast(build_model(config, device=device), dtype).eval()


if __name__ == "__main__":
    main()
