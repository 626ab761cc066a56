"""Pretrain a language model, or resume a run that was interrupted.

examples:
  megamor pretrain --config configs/mor_135m.yaml --dry-run --nodes 4 --processes 8
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

from megamor.cli import command_parser, positive
from megamor.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, ConfigError, user_errors

if TYPE_CHECKING:
    from megamor.config import Config

SECONDS_BEFORE_SILENT_EXIT = 10.0
"""Other ranks wait this long before exiting: the launcher kills all ranks when one exits, so the rank that prints the
error must exit first."""


def world_size(arguments: argparse.Namespace) -> int:
    """Processes of the run: the launcher's, or those that a dry run is about.

    Raises:
        ConfigError: --nodes or --processes without a dry run.
    """
    from megamor.parallel import launched_world_size

    if arguments.nodes is None and arguments.processes is None:
        return launched_world_size()
    if not (arguments.dry_run or arguments.print_config):
        raise ConfigError("--nodes and --processes are for --dry-run: `megamor launch` starts processes")
    return (arguments.nodes or 1) * (arguments.processes or 1)


def dry_run(config: Config, processes: int, per_node: int) -> None:
    """Print what the run would need on so many processes, `per_node` to a machine, then check that it could start here.

    Raises:
        ConfigError: data or tokenizer are missing, or don't fit the model.
    """
    from megamor.config import expand_paths
    from megamor.data.check import find_problems
    from megamor.data.dataset import announce_shared_data
    from megamor.parallel.zero_config import engine_config
    from megamor.plan.dry_run import describe_run

    print(describe_run(config, processes, per_node), flush=True)
    expanded = expand_paths(config)
    engine_config(expanded, processes)
    data = expanded.data
    if problems := find_problems(data, seed=config.run.seed, vocab_size=config.model.vocab_size):
        heading = "the run can't start here (docs/data.md shows how to prepare its data):"
        raise ConfigError("\n  ".join([heading, *problems]))
    if config.train.eval_tasks:
        from megamor.train.evaluations import Evaluations

        Evaluations.of(expanded)
    for warning in announce_shared_data(data):
        logging.getLogger("megamor.train").warning(warning)


def read_config(arguments: argparse.Namespace) -> Config:
    """Load and validate the configuration; only the first process of each machine reports an error in it.

    Raises:
        ConfigError: the file, an override or a rule between settings is wrong, or the run's GPUs can't be used.
        SystemExit: the same, on the other processes of the machine.
    """
    from megamor.config import load_config
    from megamor.devices import usable_device

    try:
        config = load_config(arguments.config, arguments.overrides, world_size(arguments))
        if not (arguments.dry_run or arguments.print_config):
            usable_device(config.run.device)
        return config
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
            A rank that fails among several ends with `exit_status`.
    """
    parser = command_parser("pretrain", __doc__)
    parser.add_argument("--config", required=True, help="YAML file; see configs/ and docs/configuration.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as optim.lr=1e-3")
    dry = "print parameters, FLOPs and memory, and check data and tokenizer; don't train"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument("--nodes", type=positive, metavar="N", help="with --dry-run: machines of the run (default: 1)")
    each = "with --dry-run: processes on each of them (default: 1)"
    parser.add_argument("--processes", type=positive, metavar="N", help=each)
    parser.add_argument("--print-config", action="store_true", help="print every setting of the run; don't train")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_intermixed_args(argv)  # overrides may stand before, between or after the options
    from megamor.parallel.launch import adopt_launch

    adopt_launch()
    origin = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    logging.basicConfig(level=logging.WARNING, format=f"{origin}%(levelname)s %(name)s: %(message)s")
    config = read_config(arguments)

    if arguments.dry_run or arguments.print_config:
        if os.environ.get("RANK", "0") == "0":
            from megamor.config import config_to_yaml

            if arguments.print_config:
                print(config_to_yaml(config))
            else:
                from megamor.parallel import local_world_size

                processes = world_size(arguments)
                asked = arguments.nodes is not None or arguments.processes is not None
                dry_run(config, processes, (arguments.processes or 1) if asked else local_world_size(processes))
        return

    from megamor.parallel import joined_world
    from megamor.train import build_trainer, ignore_signals

    with joined_world(config.parallel, config.run.device) as world:
        finished = build_trainer(config, world).fit()
        if not finished:
            # Launchers send SIGTERM to all other ranks when the first one exits; each must exit with its own status.
            ignore_signals()
    if not finished:
        raise SystemExit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
