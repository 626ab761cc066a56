"""A watchdog for runs that hang: a dead node, a frozen process, a collective that one rank never joins.

Each rank records what it is doing (a heartbeat). A thread writes the latest heartbeat to `heartbeats/` in the run's
directory every few seconds. If a rank makes no progress for too long, its thread prints the stacks of all threads and
the last heartbeat of every rank, writes NCCL's flight recorder, and exits with the requeue status (75).

A rank that fails alone says so in `heartbeats/failed.txt`. Others may wait for it in a collective on a GPU, which
notices nothing: their threads end them with a status (76) that leaves the failed rank's own to explain the run's end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megamor.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK
from megamor.ranks import describe, exit_status, print_failure

DIRECTORY = "heartbeats"
FAILED = "failed.txt"
CLEANUP_SECONDS = 30.0
"""A rank that fails may take this long to write its last metrics and close its files, which may wait for dead ranks."""
STALE = 4
"""Heartbeats older than this many timeouts are left over from an earlier launch and aren't shown."""
CHECKS_PER_TIMEOUT = 8
"""How often the thread checks, and writes a heartbeat, within one timeout."""


class Watchdog:
    """Active inside its context. This process exits after `timeout` seconds without a beat; None: never.

    Uses the monotonic clock, which doesn't jump when the date is set.
    """

    def __init__(self, directory: Path, rank: int, timeout: float | None) -> None:
        self.directory, self.rank, self.timeout = directory / DIRECTORY, rank, timeout
        self._doing, self._beaten_at = "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_written = False
        self._started_at: float | None = None
        self._exit_timer: threading.Timer | None = None

    def beat(self, doing: str) -> None:
        """Record that this rank is alive and starts `doing`, such as `step 12`."""
        self._doing, self._beaten_at = doing, time.monotonic()
        if self._thread is not None and not self._has_written:
            # Without this, a rank that freezes before the thread's first check would leave no heartbeat at all.
            self._write_heartbeat(0.0)

    def fail(self, error: BaseException) -> None:
        """Record that this rank fails, perhaps alone: its process exits in CLEANUP_SECONDS, whatever it waits for."""

        def leave() -> None:
            print_failure(error, self.rank)
            os._exit(exit_status(error))

        self._exit_timer = threading.Timer(CLEANUP_SECONDS, leave)
        self._exit_timer.daemon = True
        self._exit_timer.start()
        if exit_status(error) != EXIT_LOST_RANK and self.timeout is not None:
            with suppress(OSError):
                self.directory.mkdir(exist_ok=True)
                (self.directory / FAILED).write_text(f"rank {self.rank}: {describe(error)}", encoding="utf-8")

    def __enter__(self) -> Watchdog:
        if self.timeout is not None:
            self._doing, self._beaten_at = "starting", time.monotonic()
            self._thread = threading.Thread(target=self._watch, args=(self.timeout,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        if self._exit_timer is not None:
            self._exit_timer.cancel()
        # Joined, so that no thread prints or exits the process after the run is over.
        if self._thread is not None:
            self._thread.join()

    def _watch(self, timeout: float) -> None:
        while not self._ended.wait(timeout / CHECKS_PER_TIMEOUT):
            # Read without a lock: a stale value delays the alarm by one check at most.
            silent = time.monotonic() - self._beaten_at
            self._write_heartbeat(silent)
            if failure := self._failure_elsewhere():
                print(f"rank {self.rank} ends because another one has failed: {failure}", file=sys.stderr, flush=True)
                os._exit(EXIT_LOST_RANK)
            if silent > timeout:
                self._report_and_exit(silent, timeout)

    def _write_heartbeat(self, silent: float) -> None:
        note = {"doing": self._doing, "seconds": round(silent, 1), "host": socket.gethostname(), "pid": os.getpid()}
        self._has_written = True
        try:
            self.directory.mkdir(exist_ok=True)
            # Replaced in one go: other ranks read it at any moment.
            draft = self.directory / f".{self.rank}"
            draft.write_text(json.dumps(note), encoding="utf-8")
            written = draft.replace(self.directory / f"rank_{self.rank}.json")
            self._started_at = self._started_at or written.stat().st_mtime
        except OSError:
            pass  # heartbeats only help people; a full disk is reported by what needs the disk

    def _failure_elsewhere(self) -> str | None:
        """What a rank that failed in this launch has written. The times are of one clock, that of the file system."""
        path = self.directory / FAILED
        with suppress(OSError):
            if self._exit_timer is None and self._started_at and path.stat().st_mtime >= self._started_at:
                return path.read_text(encoding="utf-8")
        return None

    def _report_and_exit(self, silent: float, timeout: float) -> None:
        """Print what is known and exit at once. Normal shutdown would wait for the thread that hangs."""
        print(f"rank {self.rank} hangs: {self._doing} for {silent:.0f} s. Last heartbeats:", file=sys.stderr)
        for line in self._others(timeout):
            print(f"  {line}", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            with (self.directory / f"stacks_{self.rank}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
            write_flight_recorder(self.directory / f"nccl_{self.rank}.pickle")
        except OSError as error:
            print(f"can't write into {self.directory}: {error}", file=sys.stderr)
        sys.stderr.flush()
        # Not sys.exit: that would only end this thread.
        os._exit(EXIT_INTERRUPTED)

    def _others(self, timeout: float) -> list[str]:
        """The last heartbeat of each rank, oldest first: the rank that has been silent longest is usually the cause."""
        notes = []
        for path in self.directory.glob("rank_*.json"):
            try:
                age = time.time() - path.stat().st_mtime
                if age < STALE * timeout:
                    notes.append((age, f"{path.stem}: {path.read_text(encoding='utf-8')}, written {age:.0f} s ago"))
            except OSError:
                continue
        return [text for _, text in sorted(notes, reverse=True)]


def write_flight_recorder(path: Path) -> None:
    """Write NCCL's recent collectives, if it is used, as `torch.distributed.flight_recorder.fr_trace` reads them.

    Torch remembers the last TORCH_FR_BUFFER_SIZE collectives; with 0, its default, there is nothing to write.
    """
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() and dist.is_nccl_available():
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # only with NCCL

        path.write_bytes(_dump_nccl_trace())
