"""The reliability promises and the outcomes of their tests: `@pytest.mark.promise("R1", "R9", backend="fsdp2")`.

`--reliability FILE` writes the outcomes of the marked tests that ran into FILE (JSON) and leaves those of other tests
in it unchanged. megamor/bench/tables.py makes the table of docs/reliability.md from it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Generator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from megamor.checkpoint import code_revision
from megamor.config import ParallelConfig

SCHEMA = "megamor-reliability/1"

PROMISES: dict[str, str] = {
    "R1": "a resumed run is bitwise the uninterrupted one",
    "R2": "a kill at any point loses only the steps since the last commit",
    "R3": "a checkpoint is whole or it isn't there; a damaged one is named, refused, and the previous one is used",
    "R4": "a signal to one rank stops all ranks at the same step, saved",
    "R5": "the number of processes may change: same samples in the same order, same losses",
    "R6": "the global batch may change: no sample twice, none left out",
    "R7": "backends agree, micro-batches only share out the work, and checkpoints pass between backends unchanged",
    "R8": "a step that isn't finite is skipped on all ranks, bitwise, and counted",
    "R9": "everything that a run is made of is in its checkpoint",
    "R10": "tied weights stay tied: each unique parameter exists once",
    "R11": "ranks whose tokens reach different depths don't deadlock, and gradients are right",
    "R12": "causal routing sees no later token and no other document",
    "R13": "routers learn from the language-model loss",
    "R14": "compute that routing saves isn't executed",
    "R15": "serving equals the full forward pass, token for token",
    "R16": "bad input is one clear error, a status other than 0, and nothing half-written",
    "R17": "tests don't disappear quietly",
    "R18": "padding changes nothing: a document in a padded window has the depths and losses that it has alone",
    "R19": "a resume keeps what the weights mean, and says what else has changed",
    "R20": "a run directory has one writer",
    "R21": "tokens and FLOPs asked for are those trained, whatever changes at a resume",
    "R22": "one text is one sequence of ids in every part, and nothing of it is lost",
    "R24": "a device asked for is used; a failing rank ends the job with its own status and message, in bounded time, "
    "and is not requeued without progress",
    "R25": "any value of any setting reads back equal through every reader",
    "R26": "a checkpoint from elsewhere runs none of its code",
}
"""Promise by number. The marked tests say what is checked."""


def promises_of(item: pytest.Item) -> list[tuple[str, str]]:
    """(Promise, backend) pairs that a collected test covers; the backend is "" if it doesn't matter.

    Raises:
        pytest.UsageError: a mark names no promise, an unknown one, or has other arguments.
    """
    found = []
    for mark in item.iter_markers("promise"):
        unknown = [name for name in mark.args if name not in PROMISES]
        if unknown or not mark.args or mark.kwargs.keys() - {"backend"}:
            raise pytest.UsageError(f"{item.nodeid}: promise takes {', '.join(PROMISES)} and backend=, not {mark}")
        backends = mark.kwargs.get("backend", backend_of(item))
        for backend in (backends,) if isinstance(backends, str) else backends:
            found += [(promise, backend) for promise in mark.args]
    return found


def backend_of(item: pytest.Item) -> str:
    """The backend in a test's parameters: `config`, `parallel`, or `backend` and `stage`; DeepSpeed: zero0 to zero3."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    backend, stage = parameters.get("backend", ""), parameters.get("stage")
    parallel = getattr(parameters.get("config"), "parallel", parameters.get("parallel"))
    if isinstance(parallel, ParallelConfig):
        backend = "hsdp" if parallel.shard_degree else parallel.backend
        stage = parallel.zero_stage
    if stage is not None and backend in ("", "deepspeed"):
        return f"zero{stage}"
    return backend.replace("zero ", "zero") if isinstance(backend, str) else ""


class ReliabilityTable:
    """A pytest plugin that records the outcomes of marked tests and writes them when the session ends."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root = path, root
        self.outcomes: dict[str, dict[tuple[str, str], Counter[str]]] = defaultdict(lambda: defaultdict(Counter))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Count the outcome of a test's call, or of the setup or teardown that failed or skipped it."""
        report = yield
        if report.when == "call" or not report.passed:
            name = item.nodeid.partition("[")[0]
            for key in promises_of(item):
                self.outcomes[name][key][report.outcome] += 1
        return report

    def pytest_sessionfinish(self) -> None:
        """Update the file with the recorded outcomes, and drop tests that no longer exist."""
        known: dict[str, Any] = {}
        if self.path.exists():
            written = json.loads(self.path.read_text(encoding="utf-8"))["tests"]
            known = {node: test for node, test in written.items() if self.is_there(node)}
        origin = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "revision": code_revision()}
        for name, by_promise in self.outcomes.items():
            known[name] = {
                **origin,
                "promises": [
                    {"promise": promise, "backend": backend, **counts}
                    for (promise, backend), counts in sorted(by_promise.items())
                ],
            }
        report = {"schema": SCHEMA, "promises": PROMISES, "tests": dict(sorted(known.items()))}
        self.path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def is_there(self, node: str) -> bool:
        """Whether the test function of a node id still exists."""
        file, _, name = node.partition("::")
        return (self.root / file).exists() and f"def {name.rpartition('::')[2]}(" in (self.root / file).read_text()
