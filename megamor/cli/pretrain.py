"""Pretrain a language model from a configuration: the entry point for one process, torchrun, deepspeed and slurm."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Sequence

from megamor.config import Config, config_to_yaml, load_config
from megamor.errors import ConfigError, user_errors

EXAMPLES = """\
examples:
  python pretrain.py --config configs/mor_135m.yaml --dry-run
  torchrun --nproc-per-node 2 pretrain.py --config configs/quickstart.yaml
  torchrun --nproc-per-node 8 pretrain.py --config configs/mor_360m.yaml optim.lr=2e-3 run.name=lower_lr
  deepspeed pretrain.py --config configs/mor_360m.yaml parallel.backend=deepspeed parallel.zero_stage=2

A run goes on from its newest checkpoint (run.dir/run.name/checkpoints) if it has one. Ctrl-C, SIGTERM and SIGUSR1 save
and stop with status 75; the same command goes on.
"""

SPEAKER_SECONDS = 10.0
"""How long silent processes stay: a launcher ends everybody with the first that leaves, which must be the speaker."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Pretrain a language model.", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/ and docs/configuration.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as optim.lr=1e-3")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and exit")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, FLOPs and memory; train nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher insists on it
    return parser.parse_intermixed_args(argv)


def read_config(arguments: argparse.Namespace) -> Config:
    """The validated configuration. The processes of one machine read the same one, so the first speaks for all."""
    from megamor.parallel import launched_world_size

    try:
        return load_config(arguments.config, arguments.overrides, launched_world_size())
    except ConfigError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(SPEAKER_SECONDS)
        raise SystemExit(2) from None


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, validate, start the processes' group, train."""
    arguments = parse_arguments(argv)
    origin = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    logging.basicConfig(level=logging.WARNING, format=f"{origin}%(levelname)s %(name)s: %(message)s")
    config = read_config(arguments)
    if arguments.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(config_to_yaml(config), end="")
        return

    from megamor.parallel import close_world, init_world, launched_world_size

    if arguments.dry_run:
        from megamor.plan.dry_run import describe_run

        if os.environ.get("RANK", "0") == "0":
            print(describe_run(config, launched_world_size()))
        return

    from megamor.ranks import report_errors_once
    from megamor.train import EXIT_INTERRUPTED, build_trainer, ignore_signals

    world = init_world(config.parallel)
    try:
        with report_errors_once():
            finished = build_trainer(config, world).fit()
        if not finished:
            ignore_signals()
    finally:
        close_world()
    if not finished:
        raise SystemExit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
