"""Estimate a run on GPUs that aren't at hand: whether it fits, what is sent, how fast it can be at best, and how long
it takes.

examples:
  megamor plan --config configs/mor_1b.yaml --gpus 64 --gpu h200
  megamor plan --config configs/mor_1b.yaml --nodes 64 --gpu h100 train.global_batch_size=2048
  megamor plan --config configs/mor_360m.yaml --gpus 8 --gpu a100-40 --json plan.json train.micro_batch_size=32
  megamor plan --config configs/mor_360m.yaml --recommend   # batch and learning rate by published laws
  megamor plan --parameters 350e6 --flops 1e20 --recommend

There is a row for each backend and activation checkpointing policy. Memory and traffic are computed, by formulas that
tests check on CPUs (docs/scaling.md). Speeds are upper bounds from data sheets; hours are at an MFU that you choose.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megamor.cli import command_parser, output_file, positive
from megamor.errors import ConfigError, user_errors
from megamor.metrics.gpus import GPUS


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; `overrides` may stand anywhere between them."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--config", metavar="FILE", help="the recipe to plan")
    parser.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--recommend", action="store_true", help="only print what published laws give; needs no GPU")
    for name, what in {"parameters": "without embedding", "tokens": "of training", "flops": "of training"}.items():
        parser.add_argument(f"--{name}", type=float, metavar="N", help=f"with --recommend: {name} {what}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--gpus", type=positive, metavar="N", help="number of GPUs")
    size.add_argument("--nodes", type=positive, metavar="N", help="number of whole nodes, instead of --gpus")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--mfu", type=float, default=0.35, metavar="X", help="model FLOPs utilisation for the hours (default: 0.35)"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all figures here")
    args = parser.parse_intermixed_args(argv)
    if args.recommend and args.config is None and (args.parameters is None or args.overrides):
        parser.error("--recommend needs --config or --parameters; key=value needs --config")
    if (args.recommend and args.json) or (args.tokens and args.flops):
        parser.error("--recommend writes no --json, and takes --tokens or --flops, not both")
    if not args.recommend and (args.parameters or args.tokens or args.flops):
        parser.error("--parameters, --tokens and --flops need --recommend")
    if not args.recommend and (args.config is None or args.gpu is None or (args.gpus or args.nodes) is None):
        parser.error("the following arguments are required: --config, --gpu, and --gpus or --nodes")
    if any(value is not None and not 0 < value < 1e30 for value in (args.parameters, args.tokens, args.flops)):
        parser.error("--parameters, --tokens and --flops must be positive")
    return args


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write the report where `--json` says."""
    args = parse_arguments(argv)
    from megamor.config import load_config

    if args.recommend:
        from megamor.plan.recommend import recommendation

        recipe = load_config(args.config, args.overrides) if args.config else None
        print(recommendation(recipe, args.parameters, args.tokens, args.flops))
        return
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu}: give a fraction of the peak, above 0 and at most 1")
    if args.gpu.lower() not in GPUS:
        known = ", ".join(GPUS)
        raise ConfigError(f"--gpu {args.gpu}: unknown; choose one of {known}, or add it to megamor/metrics/gpus.py")

    from megamor.plan.estimate import Cluster
    from megamor.plan.report import plan_report, print_report

    cluster = Cluster(GPUS[args.gpu.lower()], args.gpus or args.nodes * args.gpus_per_node, args.gpus_per_node)
    config = load_config(args.config, args.overrides, world_size=cluster.gpus)
    report = plan_report(config, cluster, gpu=args.gpu, mfu=args.mfu, source=args.config, overrides=args.overrides)
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
