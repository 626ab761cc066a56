"""The scripts in `examples/` run as they are, are short, and show what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.resume.runs import write_shard

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> str:
    """What the example prints."""
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss (\d+\.\d+)", output)]


def test_examples_are_short() -> None:
    found = sorted((ROOT / "examples").glob("*.py"))
    assert len(found) == 3
    assert all(len(script.read_text().splitlines()) <= 40 for script in found)


@pytest.mark.slow
def test_per_layer_routers_learn_on_tensors() -> None:
    output = run("per_layer_routers.py")
    first, *_, last = losses(output)
    assert last < 1.5 < np.log(64) < 4.2
    assert first > last
    depths = [float(found) for found in re.findall(r"mean depth (\d\.\d+)", output)]
    assert len(depths) == 12
    assert all(abs(depth - 1.5) < 0.1 for depth in depths[-4:])


def test_a_layer_of_ones_own_learns() -> None:
    output = run("own_layer.py")
    assert losses(output)[-1] < 0.6 * losses(output)[0]


def test_shards_and_checkpoints(tmp_path: Path) -> None:
    write_shard(tmp_path / "train", vocabulary=4096)
    output = run("shards_and_checkpoints.py", str(tmp_path / "train"))
    assert losses(output)[0] > 8.0 > losses(output)[-1]
    assert "loaded at step 40" in output
