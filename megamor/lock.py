"""One writer at a time: a lock file that names its holder and works on network file systems.

`flock` isn't used: network file systems may lack it, or keep it to one machine. The lock is a file `X.lock`, created by
a hard link, which fails if the name exists. Its content says who holds it, and its modification time is a heartbeat.

The lock of a holder that is gone is taken over. To succeed the holder with token T, a process creates `X.lock.T`, which
again only one process can, and then renames it to `X.lock`. The holder is therefore the last of the chain
`X.lock`, `X.lock.<token of the first>`, and so on, at every moment, even if a successor dies between the two steps.
A process whose own file isn't the last of that chain withdraws: the holder it meant to succeed had been replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

from megamor.errors import InUseError

HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 45.0
"""A holder on another machine is gone if its heartbeat doesn't change for this long; clocks aren't compared."""
DYING_SECONDS = 3.0
"""A holder on this machine may be about to exit: a launch waits for it this long."""


@dataclass(frozen=True)
class Holder:
    """A process that has a lock; `machine`, `pid` and `born` identify it among all processes of all machines.

    `directory` is the inode of the lock's, by which a copied lock is recognised. `restart` counts the starts of the
    Slurm `job`; `slurm` is its cluster and user. `beat` is the time of the heartbeat in ns.
    """

    token: str
    host: str = "an unknown machine"
    machine: str = ""
    pid: int = 0
    born: str = ""
    directory: int = 0
    since: str = "an unknown time"
    job: str = ""
    restart: int = 0
    slurm: str = ""
    beat: int = 0

    @classmethod
    def of_this_process(cls, directory: Path) -> Holder:
        """This process, with a new token."""
        environment = os.environ.get
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            born=_birth(os.getpid()) or "",
            directory=directory.stat().st_ino,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            job=environment("SLURM_JOB_ID", ""),
            restart=int(environment("SLURM_RESTART_COUNT") or 0),
            # Job ids belong to a cluster, and Slurm may hide the jobs of other users.
            slurm=f"{environment('SLURM_CLUSTER_NAME', '')} {os.getuid()}",
        )

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Who holds the lock file `path`; None if there is none."""
        try:
            # Opened even for its time alone: network file systems then ask the server instead of a cache.
            with path.open("rb") as file:
                content, status = file.read(), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        unreadable = cls(f"unreadable-{status.st_ino}", beat=status.st_mtime_ns)
        try:
            holder = replace(cls(**json.loads(content)), beat=status.st_mtime_ns)
        except (ValueError, TypeError, RecursionError):  # still empty, or damaged
            return unreadable
        # The token becomes part of a file name.
        sound = all(type(value) is type(getattr(unreadable, name)) for name, value in asdict(holder).items())
        return holder if sound and holder.token.isalnum() else unreadable

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class WriteLock:
    """The lock of a file, directory or prefix, at `<path>.lock`. A context manager, or `take` and `release`.

    Args:
        path: what is locked; its parent directory exists.
        what: what it is, for messages, such as `the run runs/x`.
        advice: what to do when another process has it.
        steal_from_self: whether a lock that another object of this process holds counts as left behind.
    """

    def __init__(self, path: str | Path, what: str, advice: str, *, steal_from_self: bool = False) -> None:
        self.path = Path(f"{os.path.abspath(path)}.lock")
        self.what, self.advice, self.steal_from_self = what, advice, steal_from_self
        self.lost: str | None = None
        """Why this process may not write any more, once the heartbeat or `check` has noticed."""
        self._me: Holder | None = None
        self._gone: dict[str, bool] = {}
        self._ended = threading.Event()

    def __enter__(self) -> WriteLock:
        self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def take(self) -> None:
        """Take the lock, waiting a bounded time for a holder that may be gone.

        Raises:
            InUseError: another process has it; nothing has changed.
            OSError: the lock can't be written.
        """
        me = self._me = Holder.of_this_process(self.path.parent)
        draft = self.path.with_name(f".{self.path.name}.{me.token}")
        try:
            draft.write_text(json.dumps(asdict(me)), encoding="utf-8")
            self._wait_for_turn(me, draft)
        finally:
            draft.unlink(missing_ok=True)
        atexit.register(self.release)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def check(self) -> None:
        """Make sure, right before something is published, that this process still has the lock.

        Raises:
            InUseError: it was taken over, because this process seemed to be gone, or was deleted.
        """
        chain = self._chain()
        if self._me is None or not chain or chain[-1].token != self._me.token:
            by = f"taken over by {chain[-1]}" if chain else "deleted"
            self.lost = f"{self.path} was {by}, so this process no longer writes to {self.what}"
            raise InUseError(self.lost)

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        self._ended.set()
        atexit.unregister(self.release)
        if self._me is not None and self._me.pid == os.getpid():  # not in a process forked from the holder
            with suppress(OSError, InUseError):
                self.check()
                self.path.unlink()
        self._me = None

    def _beat(self) -> None:
        while self.lost is None and not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(InUseError, OSError):  # the server may come back
                self.check()
                os.utime(self.path)  # without a time: the file server's clock, the same for all machines

    def _wait_for_turn(self, me: Holder, draft: Path) -> None:
        first, began = Holder(""), 0.0
        while (holder := self._claim(me, draft)) is not None:
            here = holder.machine == me.machine
            if holder.token != first.token:
                first, began = holder, time.monotonic()
                if not here:
                    wait = f"waiting up to {SILENCE_SECONDS:.0f} s for its heartbeat"
                    print(f"{self.what} is locked by {holder}, which may be gone: {wait}", file=sys.stderr, flush=True)
            waited = time.monotonic() - began
            if holder.beat != first.beat or (here and (waited > DYING_SECONDS or holder.pid == me.pid)):
                raise InUseError(
                    f"another process is writing {self.what}: {holder}; {self.advice}. If that process is certainly "
                    f"gone, delete {self.path}"
                )
            self._gone[holder.token] |= waited > SILENCE_SECONDS
            time.sleep(0.1)

    def _claim(self, me: Holder, draft: Path) -> Holder | None:
        """Try to become the holder; None after success, else the holder."""
        while True:
            before = self._chain()
            if before and not self._is_gone(before[-1], me):
                return before[-1]
            slot = self._successor(before[-1]) if before else self.path
            _create(slot, draft)
            after = self._chain()
            if after and after[-1].token == me.token:
                if before:
                    os.replace(slot, self.path)
                for dead in before[:-1]:
                    self._successor(dead).unlink(missing_ok=True)
                return None
            # Somebody else was first. Our file, if it is ours, leads nowhere.
            left = Holder.read(slot)
            if left is not None and left.token == me.token:
                slot.unlink(missing_ok=True)

    def _chain(self) -> list[Holder]:
        """Everybody named by the lock files from `X.lock` on; the last is the holder."""
        chain: list[Holder] = []
        path = self.path
        while (holder := Holder.read(path)) is not None:
            chain.append(holder)
            path = self._successor(holder)
        return chain

    def _successor(self, holder: Holder) -> Path:
        return self.path.with_name(f"{self.path.name}.{holder.token}")

    def _is_gone(self, holder: Holder, me: Holder) -> bool:
        """Whether `holder` is known not to run any more."""
        same_job = holder.job != "" and (holder.job, holder.slurm) == (me.job, me.slurm)
        if same_job and holder.restart < me.restart:
            return True  # an earlier start of this job: Slurm ended it before it started this one
        if holder.machine == me.machine:
            copied = holder.directory != me.directory
            own = self.steal_from_self and holder.pid == me.pid
            self._gone[holder.token] = copied or own or _birth(holder.pid) != holder.born
        elif holder.token not in self._gone:
            self._gone[holder.token] = holder.slurm == me.slurm and not same_job and _is_over(holder.job)
        return self._gone[holder.token]


def _create(path: Path, draft: Path) -> None:
    """Give the content of `draft` the name `path` if that is free."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links; there, readers may see the file while it is still empty
        with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))


def _machine() -> str:
    """This boot of this machine, and the container in it: process ids mean something only within these."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _birth(pid: int) -> str | None:
    """When a process of this machine started, which tells apart processes with the same id; None: it ended."""
    if not Path("/proc/self/stat").exists():
        return "running" if psutil.pid_exists(pid) else None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    state, flags, started = fields[0], int(fields[6]), fields[19]
    exiting = 0x4  # PF_EXITING: it runs no more of its program
    return None if state in "ZX" or flags & exiting else started


def _is_over(job: str) -> bool:
    """Whether Slurm says that none of the job's processes runs; False if it can't be asked."""
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    if not job.isdecimal():
        return False
    try:
        asked = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return False
    if asked.returncode:
        return "Invalid job id" in asked.stderr
    return set(asked.stdout.split()) <= {"PENDING"}  # it isn't listed, or is queued again
