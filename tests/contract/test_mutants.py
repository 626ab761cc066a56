"""The lists of mutants fit the code, and the campaign tells a fault that is noticed from one that isn't."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants.catalogue import ROOT, Mutant, faults, load, select

MUTANT = Mutant(
    room="optim",
    id="warm-up",
    file="megamor/optim/schedule.py",
    text="return step / config.warmup_steps",
    replacement="return (step + 1) / config.warmup_steps",
    tests=("tests/unit/test_optim_schedule.py::test_wsd_by_hand",),
)


def test_every_mutant_fits_the_code() -> None:
    assert list(faults(load())) == []


def test_every_room_of_training_and_serving_has_mutants() -> None:
    counts = Counter(mutant.room for mutant in load() if mutant.equivalent is None)
    rooms = ("routing", "model", "optim", "train", "data", "checkpoint", "serve")
    assert {room: counts[room] for room in rooms if counts[room] < 15} == {}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"text": "return step / nothing"}, "has this text 0 times"),
        ({"text": "step"}, "has this text [0-9]+ times"),
        ({"replacement": "return step /"}, "is no Python"),
        ({"replacement": "return (step / config.warmup_steps)  # a comment"}, "nothing but the form"),
        ({"file": "megamor/optim/nothing.py"}, "No such file"),
        ({"tests": ()}, "no tests are named"),
        ({"tests": ("tests/unit/test_nothing.py",)}, "there is no file"),
        ({"tests": ("tests/unit/test_optim_schedule.py::test_nothing",)}, "there is no test"),
    ],
)
def test_what_has_gone_stale_is_named(change: dict, fault: str) -> None:
    (found,) = faults([replace(MUTANT, **change)])
    assert re.search(fault, found)


def test_names_are_unique_and_known() -> None:
    assert list(faults([MUTANT, MUTANT])) == ["optim/warm-up: there are two mutants of this name"]
    other = replace(MUTANT, room="train")
    assert select([MUTANT, other], []) == [MUTANT, other]
    assert select([MUTANT, other], ["train"]) == select([MUTANT, other], ["train/warm-up"]) == [other]
    with pytest.raises(ValueError, match="called nothing"):
        select([MUTANT], ["nothing"])


@pytest.mark.slow
def test_the_campaign_tells_what_is_noticed(tmp_path: Path) -> None:
    """The tests of the schedule notice a fault of the schedule and none of the optimizer, in a copy of the checkout."""
    before = (ROOT / MUTANT.file).read_bytes()
    names, out = ["optim/warmup-starts-at-one-step", "optim/eps-is-the-default"], tmp_path / "found.json"
    options = ["--no-baseline", "--json", str(out), "--tests", MUTANT.tests[0]]
    command = [sys.executable, "-m", "tests.mutants", "--only", *names, *options]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 1
    found = {result["name"]: (result["status"], result["test"]) for result in json.loads(out.read_text())}
    assert found == {names[0]: ("killed", MUTANT.tests[0]), names[1]: ("survived", "")}
    assert (ROOT / MUTANT.file).read_bytes() == before
