"""Pytest options of this suite, and a guard against tests that disappear: a skip needs one of the reasons below.

The reasons depend on the machine alone. A test that is skipped for any other reason fails, and so does one that is
skipped for something that this machine has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.combination_table import CombinationTable
from tests.combinations import KV_POLICIES, RARE_SHARINGS, REPRESENTATIVES, ROUTERS
from tests.reliability_table import ReliabilityTable, promises_of
from tests.slurm.cluster import missing_programs

pytest_plugins = ["pytester"]

FIXTURES = Path(os.environ.get("MEGAMOR_FIXTURES", Path(__file__).parents[2] / "shared" / "fixtures"))
HAS_REFERENCE_CASES = (FIXTURES / "meta.json").exists()

# Substring of the reason, and whether it can be true on this machine.
ALLOWED: tuple[tuple[str, bool], ...] = (
    ("MEGAMOR_FIXTURES", not HAS_REFERENCE_CASES),
    ("got empty parameter set", not HAS_REFERENCE_CASES),
    ("MEGAMOR_MEGATRON names no checkout", not os.environ.get("MEGAMOR_MEGATRON")),
    ("MEGAMOR_NEOX names no checkout", not os.environ.get("MEGAMOR_NEOX")),
    ("MEGAMOR_SMOLLM2 names no wheel", not os.environ.get("MEGAMOR_SMOLLM2")),
    ("MEGAMOR_TEXTS names no directory", not Path(os.environ.get("MEGAMOR_TEXTS", "../shared/data")).exists()),
    ("ipykernel and nbclient aren't installed", not (find_spec("ipykernel") and find_spec("nbclient"))),
    ("no browser", shutil.which("chromium") is None),
    ("slurm isn't installed", bool(missing_programs()) and not os.environ.get("MEGAMOR_NEEDS_SLURM")),
    ("needs a CUDA device", not torch.cuda.is_available()),
    ("torch has it from 2.13 on", not hasattr(torch.nn.functional, "linear_cross_entropy")),
    ("oneDNN has no kernels for bfloat16", not torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    ("this system can't reset a process's peak memory", not os.access("/proc/self/clear_refs", os.W_OK)),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that write which combinations and which reliability promises were tested."""
    parser.addoption("--combinations", type=Path, metavar="FILE", help="write the table of tested combinations")
    parser.addoption("--reliability", type=Path, metavar="FILE", help="update the outcomes of promises' tests (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugins that collect outcomes, if their option is given."""
    if config.getoption("--combinations"):
        config.pluginmanager.register(CombinationTable(config.getoption("--combinations")))
    if config.getoption("--reliability"):
        config.pluginmanager.register(ReliabilityTable(config.getoption("--reliability"), config.rootpath))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse marks that name no known promise, even if no table is written; mark what is slow in a large product."""
    for item in items:
        promises_of(item)
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        router, kv_policy, sharing = (parameters.get(name) for name in ("router", "kv_policy", "sharing"))
        rare = kv_policy == "halted_reuse" or (kv_policy in KV_POLICIES and sharing in RARE_SHARINGS)
        if rare and router in ROUTERS and router not in REPRESENTATIVES:
            item.add_marker(pytest.mark.slow)


def is_allowed(reason: str) -> bool:
    """Whether a test may be skipped for `reason` on this machine."""
    return any(part in reason and allowed for part, allowed in ALLOWED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip for a reason that isn't allowed into a failure."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not is_allowed(reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped for a reason that tests/conftest.py doesn't allow: {reason}"
    return report
