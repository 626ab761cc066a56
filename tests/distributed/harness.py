"""Run a function on several processes that communicate through gloo on localhost.

The processes are forked after torch has been imported: this takes under a second, starting new interpreters takes ten.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import torch
import torch._dynamo  # imported once here rather than in every fork
import torch.distributed as dist

DEFAULT_TIMEOUT = 120.0


class RankFailed(AssertionError):
    """A process raised, died or didn't finish; the message names its rank and contains its traceback."""


def run_ranks(
    function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = DEFAULT_TIMEOUT
) -> list[Any]:
    """Call `function(*args)` on `world_size` processes and return their results by rank.

    Each process gets the environment variables that a launcher would set. `function` joins the process group itself
    (`init_world`) and need not leave it. Results are pickled. When a process fails or `timeout` seconds pass, the
    others are killed.

    Raises:
        RankFailed: with the traceback of the first process that failed.
    """
    ranks = start_ranks(function, *args, world_size=world_size)
    try:
        return _collect([receiver for _, receiver in ranks], time.monotonic() + timeout)
    finally:
        for process, receiver in ranks:
            process.kill()
            process.join()
            receiver.close()


def start_ranks(function: Callable[..., Any], *args: Any, world_size: int) -> list[tuple[ForkProcess, Connection]]:
    """Start the processes of `run_ranks`; returns each with the end of the pipe that receives its result."""
    torch.set_num_threads(1)  # a thread pool doesn't survive a fork
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(sender, rank, world_size, port, function, args), daemon=True)
        process.start()
        sender.close()
        ranks.append((process, receiver))
    return ranks


def free_port() -> int:
    """A free TCP port on localhost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"no answer in time from ranks {sorted(waiting.values())}")
        for receiver in ready:
            rank = waiting[receiver]  # type: ignore[index]
            try:
                succeeded, value = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankFailed(f"rank {rank} died without an answer") from None
            if not succeeded:
                raise RankFailed(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _run_rank(
    sender: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and kills this process
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    try:
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    if answer[0] and dist.is_initialized():
        dist.destroy_process_group()
