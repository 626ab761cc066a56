"""The notebooks in `notebooks/` run from top to bottom with short settings, and their figures are plausible."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def execute(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch, *expressions: str) -> list[Any]:
    """Run the notebook in `directory` and return the values that `expressions` have at its end (as JSON)."""
    if any(importlib.util.find_spec(package) is None for package in ("ipykernel", "nbclient")):
        pytest.skip("ipykernel and nbclient aren't installed")
    import nbformat
    from nbclient import NotebookClient

    for variable, value in (("MEGAMOR_SHORT", "1"), ("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit notebooks without their outputs"
    values = f"import json; print(json.dumps([{', '.join(expressions)}]))"
    notebook.cells.append(nbformat.v4.new_code_cell(values))
    client = NotebookClient(
        notebook, timeout=300, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": directory}}
    )
    client.execute()
    return json.loads(notebook.cells[-1].outputs[0].text)


def test_getting_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last, validation, floors, accuracy, depths, mean_depth, texts = execute(
        "01_getting_started",
        tmp_path,
        monkeypatch,
        "losses[0]",
        "losses[-1]",
        "validation",
        "floor",
        "accuracy",
        "depths",
        "mean_depth",
        "''.join(texts)",
    )
    assert abs(first - math.log(1024)) < 0.3
    assert last < first - 1.2
    assert abs(validation["causal"] - validation["topk"]) < 0.1
    assert floors["bigram"] < floors["unigram"] < first
    assert validation["causal"] < floors["unigram"]  # it has learned more than how frequent tokens are
    assert 0.02 < accuracy < 0.9
    assert len(depths) == 100
    assert all(abs(depth - 2) < 0.05 for depth in depths)  # (1 + 2/3 + 1/3) recursions, whatever the router learns
    assert 1 <= mean_depth <= 3
    assert texts.startswith("def read_lines(path):")
    assert "<svg" in (tmp_path / "runs/getting_started/depth.svg").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_the_router_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, entropy, correlations, classes, passages, steps, samples = execute(
        "02_what_the_router_learned",
        tmp_path,
        monkeypatch,
        "causal['loss']",
        "figures['data']['unigram_entropy']",
        "stage['correlations']",
        "[row['at'] for row in stage['classes']['class']]",
        "list(analysis.passages)",
        "[step['tokens'] for step in stage['recursions']]",
        "len(found['samples'])",
    )
    assert loss < entropy
    assert all(-1 <= rho["low"] <= rho["value"] <= rho["high"] <= 1 for rho in correlations.values())
    assert {"white space", "punctuation", "word start", "continuation"} <= set(classes)
    assert passages == ["widest", "median", "narrowest"]
    assert steps == sorted(steps, reverse=True)
    assert samples == 16
