"""The table of combinations of router, KV policy and sharing, from the outcomes of the tests that ran."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

# Column, test function, and a substring of the test id where one function covers two columns.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("causal", "test_logits_ignore_later_tokens", "stream"),
    ("causal in packed documents", "test_logits_ignore_later_tokens", "documents"),
    ("packed = alone", "test_packed_documents_equal_documents_alone", ""),
    ("cached decoding fp64", "test_prefill_and_steps_equal_the_full_pass", "fp64"),
    ("cached decoding fp32", "test_prefill_and_steps_equal_the_full_pass", "fp32"),
    ("checkpointing", "test_activation_checkpointing_leaves_gradients_identical", ""),
    ("router learns", "test_router_learns_from_the_language_model_loss", ""),
    ("FLOPs = profiler's", "test_executed_flops_match_the_profiler", ""),
)
HEADER = """# Tested combinations

Written by `make combinations` from the outcomes of the tests named below: passed / run. Each cell covers all sharings
(cycle, sequence, middle-cycle, middle-sequence) and a model of several recursion stages where the test depends on them,
else middle-cycle alone; an empty cell means that there is nothing to test (a router without parameters doesn't learn).
Multi-scale attention, the options of dense backbones, confidence exits, bounded caches, depth schedules and Muon have
products of their own: `test_multi_scale`, `test_dense_backbones`, `test_confidence_exits`, `test_kv_bound`,
`test_depth_schedule` and `test_muon`.

"""


class CombinationTable:
    """A pytest plugin that writes the table when the session ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Record the outcome if the test covers a combination."""
        report = yield
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if report.when == "call" and {"router", "kv_policy"} <= parameters.keys():
            key = parameters["router"], parameters["kv_policy"]
            for column, function, substring in COLUMNS:
                if item.originalname == function and substring in item.name:  # type: ignore[attr-defined]
                    self.outcomes[key][column].append(report.passed)
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the table."""
        columns = [column for column, _, _ in COLUMNS]
        lines = [f"| router | KV policy | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        for (router, kv_policy), found in self.outcomes.items():
            cells = [f"{sum(found[c])}/{len(found[c])}" if found[c] else "" for c in columns]
            lines.append(f"| {router} | {kv_policy} | {' | '.join(cells)} |")
        tests = [f"- {column}: `{function}`" for column, function, _ in COLUMNS]
        self.path.write_text(HEADER + "\n".join([*lines, "", *tests]) + "\n")
