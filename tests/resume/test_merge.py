"""`megamor merge`: exact sums, weights by hand, what it refuses, and what its result is good for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megamor.cli import merge, verify_checkpoint
from megamor.cli.merge import merge_weights
from megamor.config import Config
from megamor.errors import CheckpointError, ConfigError
from megamor.load import load_model
from megamor.parallel import init_world
from megamor.train import build_trainer
from tests.commands import refusal, status
from tests.distributed.runs import stored_tensors
from tests.resume.runs import LOSS_FREE, directory_of, fit, named, tiny_run, until


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Eight steps with checkpoints at 2, 4, 7 and 8, the first two by one process and the others by two."""
    config = tiny_run(tmp_path_factory.mktemp("merge"))
    config = replace(config, router=LOSS_FREE, optim=replace(config.optim, average_decay=0.5))
    for step, world_size in ((2, 1), (4, 1), (7, 2), (None, 2)):
        fit(until(config, step), world_size=world_size)
    return config


def checkpoints(config: Config, *steps: int) -> list[str]:
    return [str(directory_of(config) / "checkpoints" / f"step_{step:08d}") for step in steps]


@pytest.mark.parametrize(
    ("given", "steps", "weights"),
    [
        ("mean", [5, 3, 9], [1 / 3, 1 / 3, 1 / 3]),
        ("wsd", [100, 200, 300, 400], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        ("wsd", [0, 10, 40], [10 / 80, 40 / 80, 30 / 80]),
        ("1,3", [2, 4], [0.25, 0.75]),
        ("2,-1", [2, 4], [2.0, -1.0]),
    ],
)
def test_weights_by_hand(given: str, steps: list[int], weights: list[float]) -> None:
    assert merge_weights(given, steps) == pytest.approx(weights)


def test_wsd_gives_every_update_the_factor_of_a_linear_decay() -> None:
    """Updates between two checkpoints count as in the middle between them: 1 - (middle - first) / (last - first)."""
    steps = [10, 20, 50, 70]
    weights = merge_weights("wsd", steps)
    for number in range(1, 4):
        middle = (steps[number - 1] + steps[number]) / 2
        assert sum(weights[number:]) == pytest.approx(1 - (middle - 10) / 60)


@pytest.mark.parametrize(
    ("given", "steps"),
    [("wsd", [4, 2]), ("wsd", [4]), ("1,2,3", [2, 4]), ("a", [2]), ("1,-1", [2, 4]), ("nan,1", [2, 4])],
)
def test_weights_that_do_not_fit_are_refused(given: str, steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=f"--weights {given}: give"):
        merge_weights(given, steps)


def test_merged_weights_are_the_exact_sums_rounded_once(run: Config, tmp_path: Path) -> None:
    sources = checkpoints(run, 2, 4, 8)
    assert status(merge.main, *sources, "--out", str(tmp_path / "out"), "--weights", "1,2,5") == 0
    stored, merged = [stored_tensors(Path(source)) for source in sources], stored_tensors(tmp_path / "out" / "latest")
    assert merged.keys() == {name for name in stored[0] if name.startswith("model.")}
    for name, value in merged.items():
        assert value.dtype == torch.float32
        parts = [tensors[name].flatten().tolist() for tensors in stored]
        for number, result in list(enumerate(value.flatten().tolist()))[:50]:
            exact = sum(Fraction(w, 8) * Fraction(part[number]) for w, part in zip((1, 2, 5), parts, strict=True))
            assert result == torch.tensor(float(exact), dtype=torch.float64).float().item(), name


def test_the_result_is_evaluated_and_verified_but_not_resumed(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sources = checkpoints(run, 4, 7, 8)
    assert status(merge.main, *sources, "--out", str(tmp_path / "out"), "--weights", "wsd") == 0
    printed = capsys.readouterr().out
    assert f"0.5000 x {sources[1]}" in printed
    assert "not resumed" in printed
    out = tmp_path / "out" / "step_00000000"
    record = json.loads((out / "trainer.json").read_text())["components"]["merge"]
    assert [part["weight"] for part in record["parts"]] == pytest.approx([3 / 8, 1 / 2, 1 / 8])
    assert status(verify_checkpoint.main, str(out)) == 0
    assert load_model(tmp_path / "out", "cpu").config == load_model(sources[2], "cpu").config
    moved = named(run, "resumes")
    shutil.copytree(tmp_path / "out", directory_of(moved) / "checkpoints", symlinks=True)
    with pytest.raises(CheckpointError, match="has weights without optimizer state"):
        build_trainer(moved, init_world(moved.parallel))


def test_an_output_in_use_is_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    said = refusal(capsys, merge.main, "missing", "--out", tmp_path)
    assert "exists and is not an empty directory" in said
    said = refusal(capsys, merge.main, "missing", "--out", tmp_path / "file" / "out")
    assert f"{tmp_path / 'file'} exists and is not" in said


def test_a_merge_keeps_the_depth_that_a_schedule_has_reached(run: Config, tmp_path: Path) -> None:
    growing = named(replace(run, recursion=replace(run.recursion, schedule="linear")), "growing")
    for step in (2, 4):  # of eight: depths 1 and 2
        fit(until(growing, step))
    sources = checkpoints(growing, 2, 4)
    assert [load_model(source, "cpu").model.recursions for source in sources] == [1, 2]
    assert status(merge.main, *sources[::-1], "--out", tmp_path / "both") == 0
    assert status(merge.main, sources[0], "--out", tmp_path / "first") == 0
    assert [load_model(tmp_path / name, "cpu").model.recursions for name in ("both", "first")] == [2, 1]


def test_the_moving_average_becomes_the_weights(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (source,) = checkpoints(run, 8)
    assert status(merge.main, source, "--average", "--out", str(tmp_path / "out")) == 0
    stored, merged = stored_tensors(Path(source)), stored_tensors(tmp_path / "out" / "latest")
    for name, value in merged.items():
        assert torch.equal(value, stored.get(name.replace("model.", "average.", 1), stored[name]))
    assert torch.equal(merged["model.stage.router.bias"], stored["model.stage.router.bias"])
    assert not torch.equal(merged["model.embed.weight"], stored["model.embed.weight"])
    without = named(replace(run, optim=replace(run.optim, average_decay=None)), "without", max_steps=2)
    fit(without, world_size=1)
    said = refusal(capsys, merge.main, *checkpoints(without, 2), "--average", "--out", str(tmp_path / "none"))
    assert "has no moving average" in said
    assert not (tmp_path / "none").exists()


def test_other_models_and_tokenizers_are_refused_by_name(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = named(replace(run, model=replace(run.model, rope_theta=500.0)), "other", max_steps=2)
    fit(other, world_size=1)
    said = refusal(capsys, merge.main, *checkpoints(run, 2), *checkpoints(other, 2), "--out", str(tmp_path / "out"))
    assert "isn't of the same model" in said
    assert "model.rope_theta: 10000.0 -> 500.0" in said
    assert not (tmp_path / "out").exists()


def test_metrics_have_the_loss_of_the_average(run: Config) -> None:
    lines = [json.loads(line) for line in (directory_of(run) / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert last["validation/held_out/loss_causal_average"] != last["validation/held_out/loss_causal"]
    assert status(verify_checkpoint.main, str(directory_of(run)), "--all") == 0
