"""Start the processes of one machine with torchrun or DeepSpeed's launcher, pass stop signals on, and leave with their
status.

torchrun by itself kills its workers 30 seconds after SIGTERM, dies of SIGUSR1, and leaves with status 1 whatever they
leave with; DeepSpeed's launcher does the first two as well. Here SIGTERM, SIGUSR1 and Ctrl-C go to every worker and
nothing else happens: the workers agree on a step, save, and leave when they are done. How long that may take is the
caller's to say.

    megamor launch --processes 8 pretrain.py --config configs/mor_135m.yaml
    megamor launch --launcher deepspeed --processes 8 --nodes 2 --node-rank 0 --address node1 --port 29500 \
        pretrain.py --config configs/mor_135m.yaml parallel.backend=deepspeed
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

EXIT_INTERRUPTED = 75
"""Status of a worker that stopped on request, and of a launch that was cut short by a request (`megamor.train`)."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
USER_ERROR = 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Start the processes of one machine.")
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--processes", type=int, required=True, help="processes on each machine: one for each GPU")
    parser.add_argument("--nodes", type=int, default=1, help="number of machines")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--address", default="127.0.0.1", help="of machine 0, as the others reach it")
    parser.add_argument("--port", type=int, default=29500, help="a free port there")
    parser.add_argument(
        "--logs", type=Path, help="directory for the output of each process; that of rank 0 is shown too"
    )
    parser.add_argument("script", help="such as pretrain.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    return parser.parse_args(argv)


class Forwarder:
    """Passes stop signals on to the children of a process, for as long as this one lives."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.was_asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        try:
            for worker in psutil.Process(self.parent).children():
                worker.send_signal(number)
        except psutil.NoSuchProcess:
            pass  # left on its own meanwhile


def run_torchrun(arguments: argparse.Namespace) -> int:
    """Be torchrun's agent, but for its handling of signals. Returns the workers' status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = [
        f"--nnodes={arguments.nodes}",
        f"--node-rank={arguments.node_rank}",
        f"--nproc-per-node={arguments.processes}",
        f"--master-addr={arguments.address}",
        f"--master-port={arguments.port}",
        "--signals-to-handle=SIGHUP,SIGQUIT",  # the others are the Forwarder's
    ]
    if arguments.logs is not None:
        tee = ["--tee=0:3"] if arguments.node_rank == 0 else []
        options += [f"--log-dir={arguments.logs}", "--redirects=3", *tee]
    try:
        run.run(run.parse_args([*options, arguments.script, *arguments.arguments]))
    except ChildFailedError as error:
        return status_of([failure.exitcode for failure in error.failures.values()])
    return 0


def run_deepspeed(arguments: argparse.Namespace, forwarder: Forwarder) -> int:
    """Start what `deepspeed` itself starts on each machine. Returns the workers' status.

    Not `deepspeed --no_ssh`: that leaves with status 0 when its launcher was killed.
    """
    slots = {f"machine{number}": list(range(arguments.processes)) for number in range(arguments.nodes)}
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()}",
        f"--node_rank={arguments.node_rank}",
        f"--master_addr={arguments.address}",
        f"--master_port={arguments.port}",
    ]
    if arguments.logs is not None:
        command.append(f"--enable_each_rank_log={arguments.logs}")
    launcher = subprocess.Popen([*command, arguments.script, *arguments.arguments], preexec_fn=_ignore_sigusr1)
    forwarder.parent = launcher.pid
    return status_of([launcher.wait()])


def _ignore_sigusr1() -> None:
    """A scheduler signals every process of a job; the launcher would die of it. Workers set a handler of their own."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def status_of(codes: Sequence[int]) -> int:
    """One exit status for those of several processes (negative: killed by that signal).

    A wish to be started again or an error of the user's, which some rank found out, tells more than what the others
    died of.
    """
    for telling in (EXIT_INTERRUPTED, USER_ERROR):
        if telling in codes:
            return telling
    first = next((code for code in codes if code != 0), 0)
    return 128 - first if first < 0 else first


def main(argv: Sequence[str] | None = None) -> None:
    """Start, wait, leave."""
    arguments = parse_arguments(argv)
    forwarder = Forwarder()
    if arguments.launcher == "torchrun":
        status = run_torchrun(arguments)
    else:
        status = run_deepspeed(arguments, forwarder)
    if status not in (0, USER_ERROR) and forwarder.was_asked:
        status = EXIT_INTERRUPTED  # asked before there was anything to save, or didn't manage to
    raise SystemExit(status)


if __name__ == "__main__":
    main()
