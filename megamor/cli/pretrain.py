"""Pretrain a language model, or resume a run that was interrupted.

examples:
  megamor pretrain --config configs/mor_135m.yaml --dry-run
  megamor pretrain --config configs/quickstart.yaml optim.lr=1e-3 run.name=lower_lr
  torchrun --nproc-per-node 8 pretrain.py --config configs/mor_360m.yaml
  srun --nodes 2 --ntasks-per-node 8 megamor pretrain --config configs/mor_360m.yaml
  deepspeed pretrain.py --config configs/mor_360m.yaml parallel.backend=deepspeed parallel.zero_stage=2

A run resumes from its newest checkpoint (in run.dir/run.name/checkpoints) if there is one. On Ctrl-C, SIGTERM or
SIGUSR1 it saves a checkpoint and exits with status 75; rerun the same command to resume.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megamor.cli import command_parser
from megamor.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, ConfigError, user_errors

if TYPE_CHECKING:
    from megamor.config import Config

SECONDS_BEFORE_SILENT_EXIT = 10.0
"""Other ranks wait this long before exiting: the launcher kills all ranks when one exits, so the rank that prints the
error must exit first."""


def read_config(arguments: argparse.Namespace) -> Config:
    """Load and validate the configuration; only the first process of each machine reports an error in it.

    Raises:
        ConfigError: the file, an override or a rule between settings is wrong.
        SystemExit: the same, on the other processes of the machine.
    """
    from megamor.config import load_config
    from megamor.parallel import launched_world_size

    try:
        return load_config(arguments.config, arguments.overrides, launched_world_size())
    except ConfigError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(SECONDS_BEFORE_SILENT_EXIT)
        raise SystemExit(EXIT_USER_ERROR) from None


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Train to the end, or until a signal asks the run to stop.

    Raises:
        SystemExit: status 2 for an error the user can fix, 75 for a run that was asked to stop and can be resumed.
    """
    parser = command_parser("pretrain", __doc__)
    parser.add_argument("--config", required=True, help="YAML file; see configs/ and docs/configuration.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as optim.lr=1e-3")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, FLOPs and memory; don't train")
    parser.add_argument("--print-config", action="store_true", help="print every setting of the run; don't train")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_intermixed_args(argv)  # overrides may stand before, between or after the options
    from megamor.parallel.launch import adopt_launch

    adopt_launch()
    origin = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    logging.basicConfig(level=logging.WARNING, format=f"{origin}%(levelname)s %(name)s: %(message)s")
    config = read_config(arguments)

    from megamor.parallel import close_world, init_world, launched_world_size

    if arguments.dry_run or arguments.print_config:
        if os.environ.get("RANK", "0") == "0":
            from megamor.config import config_to_yaml
            from megamor.plan.dry_run import describe_run

            print(config_to_yaml(config) if arguments.print_config else describe_run(config, launched_world_size()))
        return

    from megamor.ranks import report_errors_once
    from megamor.train import build_trainer, ignore_signals

    world = init_world(config.parallel)
    try:
        with report_errors_once():
            finished = build_trainer(config, world).fit()
        if not finished:
            # Launchers send SIGTERM to all other ranks when the first one exits; each must exit with its own status.
            ignore_signals()
    finally:
        close_world()
    if not finished:
        raise SystemExit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
