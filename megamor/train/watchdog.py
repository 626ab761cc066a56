"""A watchdog for runs that hang: a dead node, a frozen process, a collective that somebody doesn't join.

Every rank notes what it is doing (a heartbeat). A thread writes the notes to `heartbeats/` in the run's directory from
time to time, and ends the process when the notes stop changing: it prints the stacks of all threads and who was heard
of last, writes the flight recorder of NCCL, and leaves with the status that asks for another start.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from megamor.train.stop import EXIT_INTERRUPTED

DIRECTORY = "heartbeats"
STALE = 4
"""A note older than so many times the allowed time tells nothing."""
LOOKS = 8
"""How often the thread looks within the allowed time."""


class Watchdog:
    """Active while entered. `timeout` are the seconds without a beat after which this process leaves; None: never.

    Time is that of the monotonic clock, which nobody sets.
    """

    def __init__(self, directory: Path, rank: int, timeout: float | None) -> None:
        self.directory, self.rank, self.timeout = directory / DIRECTORY, rank, timeout
        self._doing, self._beaten_at = "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._heard_of = False

    def beat(self, doing: str) -> None:
        """This rank is alive and begins with `doing`, such as `step 12`."""
        self._doing, self._beaten_at = doing, time.monotonic()
        if self._thread is not None and not self._heard_of:
            self._write_note(0.0)  # a rank that freezes before the thread's first look must have been heard of too

    def __enter__(self) -> Watchdog:
        if self.timeout is not None:
            self._doing, self._beaten_at = "starting", time.monotonic()
            self._thread = threading.Thread(target=self._watch, args=(self.timeout,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, timeout: float) -> None:
        while not self._ended.wait(timeout / LOOKS):
            silent = time.monotonic() - self._beaten_at
            self._write_note(silent)
            if silent > timeout:
                self._bite(silent, timeout)

    def _write_note(self, silent: float) -> None:
        note = {"doing": self._doing, "seconds": round(silent, 1), "host": socket.gethostname(), "pid": os.getpid()}
        self._heard_of = True
        try:
            self.directory.mkdir(exist_ok=True)
            draft = self.directory / f".{self.rank}"
            draft.write_text(json.dumps(note))
            draft.replace(self.directory / f"rank_{self.rank}.json")
        except OSError:
            pass  # a full disk is for those to report who need it

    def _bite(self, silent: float, timeout: float) -> None:
        """Say what there is to say, and leave without waiting for anything."""
        print(f"rank {self.rank} hangs: {self._doing} for {silent:.0f} s. Last heard of:", file=sys.stderr)
        for line in self._others(timeout):
            print(f"  {line}", file=sys.stderr)
        self._dump_stacks(sys.stderr)
        try:
            with (self.directory / f"stacks_{self.rank}.txt").open("w") as file:
                self._dump_stacks(file)
            write_flight_recorder(self.directory / f"nccl_{self.rank}.pickle")
        except OSError as error:
            print(f"can't write into {self.directory}: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)

    def _others(self, timeout: float) -> list[str]:
        """What each rank wrote last, the longest silent first: that one is to blame as a rule."""
        notes = []
        for path in self.directory.glob("rank_*.json"):
            try:
                age = time.time() - path.stat().st_mtime
                if age < STALE * timeout:  # else of an earlier launch with more ranks
                    notes.append((age, f"{path.stem}: {path.read_text()}, written {age:.0f} s ago"))
            except OSError:
                continue
        return [text for _, text in sorted(notes, reverse=True)]

    def _dump_stacks(self, file: TextIO) -> None:
        faulthandler.dump_traceback(file=file, all_threads=True)


def write_flight_recorder(path: Path) -> bool:
    """What NCCL's collectives were doing, as `torch.distributed.flight_recorder.fr_trace` reads it; False without NCCL.

    TORCH_FR_BUFFER_SIZE says how many of them torch remembers; with 0, its default, there is nothing to write.
    """
    import torch
    import torch.distributed as dist

    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return False
    from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # only in builds with NCCL

    path.write_bytes(_dump_nccl_trace())
    return True
