"""Check in about a minute whether this machine's GPUs can train and serve: kernels, graphs, collectives, a failure.

examples:
  megamor gpu-check
  srun --ntasks-per-node=1 megamor gpu-check      # on every node; GPU_CHECK=1 slurm/mor_135m.sh does it in a job
  megamor gpu-check --only all-reduce,failure --device cpu

Each check has processes of its own: one that hangs or breaks the device fails alone. The exit status is 1 if a check
fails. Without a GPU, the command says what it would check.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megamor.cli import command_parser
from megamor.errors import ConfigError, user_errors

AT_ONCE = 3
"""Checks of one process that run at the same time; most of their time goes into imports."""


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the checks; print a line for each, and a verdict.

    Raises:
        SystemExit: status 1 if a check failed, 2 for a mistake in the arguments.
    """
    parser = command_parser("gpu-check", __doc__)
    parser.add_argument("--only", metavar="NAMES", help="these checks, with commas between them (default: all)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="cpu: those that run there")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # the check of --only, in this process
    arguments = parser.parse_args(argv)

    import torch

    from megamor.bench.gpu_check import CHECKS, FOUND, run_check
    from megamor.devices import check_computes, usable_device
    from megamor.parallel.device import prepare_device

    known = [name for name, check in CHECKS.items() if check.on_cpu or arguments.run or arguments.device != "cpu"]
    names = [name.strip() for name in arguments.only.split(",")] if arguments.only else known
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"there is no check {unknown[0]!r} on {arguments.device}: give {', '.join(known)}")
    try:
        device = usable_device(arguments.device)
    except ConfigError as error:
        print(f"{error}\nverdict: the GPUs can't be used")
        raise SystemExit(1) from None
    if arguments.run:
        if device.type == "cuda" and not CHECKS[names[0]].ranks:
            check_computes(device)
            prepare_device(device)
        print(FOUND + CHECKS[names[0]].run(device))
        return
    if device.type == "cpu" != arguments.device:
        print(*(f"would check {name}: {CHECKS[name].what}" for name in names), "verdict: no GPU", sep="\n")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    failed = []
    # Those of several ranks take all GPUs, one check after another.
    with ThreadPoolExecutor(AT_ONCE) as some, ThreadPoolExecutor(1) as one:
        running = {
            name: (one if CHECKS[name].ranks else some).submit(run_check, name, device.type, gpus, port + number)
            for number, name in enumerate(names)
        }
        for name, future in running.items():
            good, text, seconds = future.result()
            print(f"{name:10}  {'ok' if good else 'FAILED':6}  {seconds:5.1f} s  {text}", flush=True)
            failed += [] if good else [name]
    print(
        f"verdict: {', '.join(failed)} failed" if failed else f"verdict: {len(names)} checks are good on {device.type}"
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
