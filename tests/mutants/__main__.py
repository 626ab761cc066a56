"""Run the campaign: `python -m tests.mutants [--only ROOM | ROOM/ID …] [--jobs N] [--json FILE]`.

Each mutant is put into a copy of the tree in a temporary directory, never into this one, and its tests run there until
one fails. Tests that fail without any mutant are reported first, and nothing else is run then.

    killed      a test failed: the fault would have been noticed
    survived    all tests passed: a test is missing, or the mutant is equivalent
    timeout     the tests didn't end in time; counted as survived, because a slow machine would do the same
    broken      pytest couldn't run the tests: the mutant isn't a fault but a typo
    stale       the code has changed, and the mutant doesn't fit it any more

Exit status 1 unless every mutant was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutants.catalogue import ROOT, Mutant, faults, load, select

IGNORED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "runs", "build", "site")
# By pytest.ExitCode, with a mutant and without; any other is "broken".
STATUS_OF_EXIT = {0: "survived", 1: "killed"}
STATUS_OF_BASELINE = {0: "passed", 1: "failed"}


@dataclass(frozen=True)
class Job:
    """Tests to run on a copy of the tree, with a mutant in it or, to see that they pass, without."""

    name: str
    tests: tuple[str, ...]
    mutant: Mutant | None = None


@dataclass(frozen=True)
class Result:
    """How a job ended, and the first test that failed. Seconds are of wall clock and of processor time."""

    name: str
    status: str
    test: str
    seconds: float
    cpu_seconds: float


class Worker:
    """A copy of the tree in which one job runs at a time."""

    def __init__(self, original: Path, number: int, timeout: float) -> None:
        self.original = original
        self.tree, self.log = original.with_name(f"tree{number}"), original.with_name(f"log{number}")
        self.timeout = timeout
        shutil.copytree(original, self.tree, symlinks=True)
        self.job: Job | None = None
        self.process = 0
        self.started = 0.0
        self.applied = 0

    def start(self, job: Job) -> None:
        """Put the mutant into the copy and run the tests in a process of its own."""
        self.job, self.started = job, time.monotonic()
        if job.mutant is not None:
            self._write(job.mutant.file, job.mutant.mutated(self.original))
        self.process = os.fork()
        if self.process == 0:
            status = 70
            try:
                status = run_pytest(self.tree, self.log, job)
            finally:
                os._exit(status)

    def poll(self) -> Result | None:
        """The result, if the job has ended or its time is over; the copy is as it was then."""
        assert self.job is not None
        found, status, usage = os.wait4(self.process, os.WNOHANG)
        seconds = time.monotonic() - self.started
        timed_out = not found and seconds > self.timeout
        if not found and not timed_out:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)  # and whatever the tests have left running
        if timed_out:
            _, status, usage = os.wait4(self.process, 0)
        code = os.waitstatus_to_exitcode(status)
        job, self.job = self.job, None
        statuses = STATUS_OF_EXIT if job.mutant else STATUS_OF_BASELINE
        outcome = "timeout" if timed_out else statuses.get(code, "broken")
        if job.mutant is not None:
            self._write(job.mutant.file, (self.original / job.mutant.file).read_text(encoding="utf-8"))
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", self.log.read_text(errors="replace"), re.MULTILINE)
        test = ", ".join(failed) if job.mutant is None else (failed or [""])[0]
        return Result(job.name, outcome, test, round(seconds, 1), round(usage.ru_utime + usage.ru_stime, 1))

    def _write(self, file: str, source: str) -> None:
        path = self.tree / file
        path.write_text(source, encoding="utf-8")
        # Python takes compiled code for current if size and time in whole seconds are those of the source: so each
        # version gets a time of its own.
        self.applied += 1
        stamp = 1_000_000_000 + 10 * self.applied
        os.utime(path, (stamp, stamp))


def run_pytest(tree: Path, log: Path, job: Job) -> int:
    """In a forked process: pytest on the tests of `job`, in `tree`, with all output in `log`."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    # Nothing of this checkout must be imported; what it has imported already is forgotten.
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "megamor")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore", *(["-x"] if job.mutant else [])]
    return int(pytest.main([*options, *job.tests]))


def preload() -> None:
    """Import what takes long and isn't tested here, so that each job is forked with it instead of importing it."""
    import hypothesis
    import pydantic
    import pytest
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict

    del hypothesis, pydantic, pytest
    torch.set_num_threads(1)  # a thread pool doesn't survive a fork


def run(jobs: Sequence[Job], workers: Sequence[Worker]) -> list[Result]:
    """Run all `jobs`, as many at a time as there are workers, and print each result."""
    waiting, results = list(jobs), list[Result]()
    while waiting or any(worker.job for worker in workers):
        for worker in workers:
            if worker.job is not None and (result := worker.poll()) is not None:
                results.append(result)
                print(f"{result.status:<9} {result.seconds:6.1f} s  {result.name:<52} {result.test}", flush=True)
            if worker.job is None and waiting:
                worker.start(waiting.pop(0))
        time.sleep(0.05)
    return results


def baselines(mutants: Sequence[Mutant]) -> list[Job]:
    """For each file, the tests in it that the mutants name; the whole file, if any of them names that."""
    by_file: defaultdict[str, set[str]] = defaultdict(set)
    for test in (test for mutant in mutants for test in mutant.tests):
        by_file[test.partition("::")[0]].add(test)
    return [
        Job(f"without a mutant: {file}", (file,) if file in tests else tuple(sorted(tests)))
        for file, tests in sorted(by_file.items())
    ]


def table(results: Sequence[Result]) -> str:
    """How many mutants of each room ended how."""
    rooms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        rooms[result.name.partition("/")[0]][result.status] += 1
    statuses = ("killed", "survived", "timeout", "broken")
    lines = [f"{'room':<12} {'mutants':>8}" + "".join(f"{status:>10}" for status in statuses)]
    for room, counts in [*sorted(rooms.items()), ("all", sum(rooms.values(), Counter[str]()))]:
        lines.append(f"{room:<12} {counts.total():>8}" + "".join(f"{counts[status]:>10}" for status in statuses))
    return "\n".join(lines)


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(
        "python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rooms or mutants (room/id) to run")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the tests of one mutant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--tests", nargs="+", metavar="TEST", help="run these instead of the tests that are named")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass without a mutant")
    args = parser.parse_args()
    try:
        mutants = select(load(), args.only)
    except ValueError as error:
        parser.error(str(error))
    stale = list(faults(mutants))
    if stale:
        print("\n".join(f"stale     {fault}" for fault in stale))
        return 1
    os.environ.setdefault("MEGAMOR_FIXTURES", str(ROOT.parent / "shared" / "fixtures"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tests = tuple(os.path.relpath(Path(test).resolve(), ROOT) for test in args.tests or ())
    chosen = [mutant for mutant in mutants if mutant.equivalent is None]
    preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        # One more copy, which stays as it is: the checkout may be edited while a campaign runs.
        original = Path(directory) / "original"
        shutil.copytree(ROOT, original, ignore=IGNORED, symlinks=True)
        workers = [Worker(original, number, args.timeout) for number in range(args.jobs)]
        before = [] if args.no_baseline else run(baselines(chosen), workers)
        if failing := [result for result in before if result.status != "passed"]:
            print(f"{len(failing)} files have tests that fail without a mutant: mend them first")
            return 1
        results = run([Job(mutant.name, tests or mutant.tests, mutant) for mutant in chosen], workers)
    print(f"\n{table(results)}\n{len(mutants) - len(chosen)} more are equivalent")
    print(f"{sum(result.cpu_seconds for result in (*before, *results)):.0f} s of processor time")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return int(any(result.status != "killed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
