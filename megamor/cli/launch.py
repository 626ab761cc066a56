"""Start the training processes of one machine, pass stop signals to them, and exit with their status.

examples:
  megamor launch --processes 8 --config configs/mor_360m.yaml optim.lr=2e-3
  # on each of two machines, with its own --node-rank
  megamor launch --processes 8 --nodes 2 --node-rank 0 --address node1 --config configs/mor_360m.yaml

Everything after the options of `launch` goes to `megamor pretrain`. This is torchrun with two differences. torchrun
kills its workers 30 seconds after SIGTERM and dies of SIGUSR1; `launch` passes SIGTERM, SIGUSR1 and Ctrl-C to every
worker and waits until they have saved. torchrun exits with 1 whatever its workers exit with; `launch` exits with their
status: 0 (done), 75 (stopped and saved: rerun the same command), 2 (an error that you can fix). An error of one rank
wins over the 75 of others. Slurm scripts don't need it: there, srun starts the processes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from megamor.cli import command_parser
from megamor.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK, telling_status

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SignalForwarder:
    """Passes stop signals to the children of this process, for as long as it lives."""

    def __init__(self) -> None:
        self.was_asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        import psutil

        self.was_asked = True
        for worker in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # it exited between the listing and the signal
                worker.send_signal(number)


def run_workers(options: Sequence[str], pretrain_arguments: Sequence[str]) -> int:
    """Run torchrun's agent in this process; returns the exit status of the workers."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The agent would install handlers of its own for these signals and kill the workers: give it others to handle.
    handled = "--signals-to-handle=SIGHUP,SIGQUIT"
    try:
        arguments = run.parse_args([*options, handled, "-m", "megamor", "pretrain", *pretrain_arguments])  # type: ignore[no-untyped-call]
        run.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return telling_status([failure.exitcode for failure in error.failures.values()])
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Start the processes, wait for them, exit with their status."""
    parser = command_parser("launch", __doc__)
    parser.allow_abbrev = False  # the rest is for `megamor pretrain`, whose options must not be taken for ours
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="processes here: one for each GPU")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="I", help="this machine, from 0 (default)")
    parser.add_argument("--address", default="127.0.0.1", help="machine 0 as the others reach it (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=29500, help="a free port there (default: 29500)")
    parser.add_argument("--numa-binding", metavar="MODE", help="torchrun's: node binds each process to its GPU's CPUs")
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} --config FILE ..."
    arguments, pretrain_arguments = parser.parse_known_args(argv)
    forwarder = SignalForwarder()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun sets the same, with a warning
    options = [f"--nnodes={arguments.nodes}", f"--node-rank={arguments.node_rank}"]
    options += [f"--nproc-per-node={arguments.processes}"]
    options += [f"--master-addr={arguments.address}", f"--master-port={arguments.port}"]
    options += [f"--numa-binding={arguments.numa_binding}"] if arguments.numa_binding else []
    status = run_workers(options, pretrain_arguments)
    if forwarder.was_asked and (status == EXIT_LOST_RANK or status >= 128):
        status = EXIT_INTERRUPTED  # asked to stop before there was anything to save, or killed while saving
    raise SystemExit(status)
