"""What the documentation lists exists, and its links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
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
    """The code in routers.md equals the file without its docstrings."""
    code = re.sub(r'^ *"""[^"]*"""\n', "", text("examples/alternating_router.py"), flags=re.MULTILINE)
    shown = text("routers.md").split("```python\n", 1)[1].split("```", 1)[0]
    squeeze = lambda source: [line for line in source.splitlines() if line.strip()]  # noqa: E731
    assert squeeze(shown) == squeeze(code[code.index("class Alternating") :])


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert DOCS in file.resolve().parents, f"{target} isn't on the documentation site: link to the repository"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                anchor
            )


def test_every_page_is_in_the_navigation() -> None:
    pages = {page.name for page in DOCS.glob("*.md")}
    assert set(re.findall(r"[\w-]+\.md\b", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))) == pages


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    settings = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in DOCS.glob("*.md"):
        html = tmp_path / "build" / "site" / ("" if page.stem == "index" else page.stem) / "index.html"
        assert "<h1" in html.read_text(encoding="utf-8")
