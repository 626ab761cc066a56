"""What the documentation lists is what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch

from megamor.config import RouterConfig
from megamor.metrics import Throughput, peak_memory
from megamor.train.step_statistics import StepSummary

DOCS = Path(__file__).parents[2] / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("config", get_args(RouterConfig), ids=lambda config: config.kind)
def test_router_keys(config: type) -> None:
    table = text("routers.md").split("| `kind` | Keys", 1)[1]
    row = next(line for line in table.splitlines() if line.startswith(f"| `{config.kind}` |"))
    assert set(re.findall(r"`(\w+)`", row)) - {config.kind} == {field.name for field in fields(config)} - {"kind"}


def test_metrics() -> None:
    summary = StepSummary(1.0, 1, {}, {}, [0.0, 1.0, 1.0], [])
    names = {*summary.routing_metrics(), *Throughput(peak_flops=None, world_size=1).metrics()}
    names |= peak_memory(torch.device("cpu")).keys()
    documented = text("training.md")
    assert [name for name in sorted(names) if not name.startswith("depth/") and f"`{name}`" not in documented] == []


def test_example_of_a_router() -> None:
    """The code in routers.md is that of the file, without docstrings."""
    code = re.sub(r'^ *"""[^"]*"""\n', "", text("examples/alternating_router.py"), flags=re.MULTILINE)
    shown = text("routers.md").split("```python\n", 1)[1].split("```", 1)[0]
    squeeze = lambda source: [line for line in source.splitlines() if line.strip()]  # noqa: E731
    assert squeeze(shown) == squeeze(code[code.index("class Alternating") :])


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                anchor
            )
