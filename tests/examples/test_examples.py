"""The scripts in `examples/` run as they are, are short, and show what they say."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

from megamor.evaluate.tasks import load_tasks
from tests.resume.runs import write_shard
from tests.tasks import write_tasks

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
    assert len(found) == 4
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


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("choose", [" a dog", " four", " a"]),
        ("write", ["  three", "  again", "  ends"]),  # a space before the target, as in few-shot examples
        ("last_word", None),
        ("either", None),
    ],
)
def test_pairs_of_a_task_are_what_the_harness_compares(
    name: str, answers: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every right answer is a request of the task (or what it would have generated), and no other."""
    write_tasks(tmp_path)
    either = {  # two contexts, one continuation, as in WinoGrande
        **yaml.safe_load((tmp_path / "choose.yaml").read_text()),
        "task": "either", "doc_to_text": "gold", "doc_to_target": "{{question}}",
    }  # fmt: skip
    (tmp_path / "either.yaml").write_text(yaml.safe_dump(either))
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "training_split": "test"}))
    output = tmp_path / "pairs.jsonl"
    monkeypatch.setattr(sys, "argv", ["task_pairs.py", name, str(output), str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "task_pairs.py"))
    pairs = [tuple(json.loads(line).values()) for line in output.read_text().splitlines()]
    assert len(pairs) == 3
    (task,) = load_tasks([name], directory=tmp_path).loaded["tasks"].values()
    if name != "write":
        assert set(pairs) <= {instance.args for instance in task.instances}
    if answers:
        assert [answer for _, answer in pairs] == answers
    if name == "either":
        assert pairs[0] == ("a dog", " Which animal barks?")


def test_the_task_of_local_files_asks_as_the_harness() -> None:
    found = find_spec("lm_eval")
    assert found is not None
    harness = Path(str(found.origin)).parent / "tasks" / "glue" / "sst2" / "default.yaml"
    theirs, ours = (
        yaml.safe_load(path.read_text()) for path in (harness, ROOT / "examples" / "tasks" / "sst2_tsv.yaml")
    )
    same = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
