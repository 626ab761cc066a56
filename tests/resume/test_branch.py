"""A run branches off another: it continues it bit by bit, under its own schedule, and leaves it alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.checkpoint import TrainerState
from megamor.config import Config, OptimConfig
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.optim import lr_multiplier
from tests.resume.runs import (
    LOSS_FREE,
    checkpoint_names,
    directory_of,
    fit,
    fit_to_failure,
    named,
    repeatable,
    tiny_run,
    trace,
    until,
)
from tests.resume.test_changes import files_of, with_setting

WSD = OptimConfig(lr=3e-3, warmup_steps=2, decay_fraction=0.25, average_decay=0.9)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of eight steps, which decays from step 6 on, with a checkpoint and a validation every second step."""
    config = replace(tiny_run(tmp_path_factory.mktemp("long"), eval_every=2), router=LOSS_FREE, optim=WSD)
    config = with_setting(named(config, "long"), "checkpoint.every_steps", 2)
    assert fit(config, world_size=1) == [True]
    return config


def branch(long: Config, name: str, step: int | str, **train: Any) -> Config:
    return with_setting(named(long, name, **train), "init.branch_from", f"{directory_of(long)}@{step}")


def test_a_branch_without_changes_is_the_rest_of_the_run(long: Config, capfd: pytest.CaptureFixture[str]) -> None:
    before = files_of(long)
    config = branch(long, "same", 4)
    assert fit(until(config, 6), 1) == [True]
    shown = capfd.readouterr().out
    checkpoint = directory_of(long) / "checkpoints" / "step_00000004"
    assert f"same: branching after step 4 from {checkpoint} (branch, step 4, sha256 " in shown
    assert "settings that differ" not in shown
    assert fit(config, 1) == [True]  # resumes from its own checkpoint
    whole, rest = trace(long), trace(config)
    assert list(map(repeatable, rest.steps)) == list(map(repeatable, whole.steps[4:]))
    assert list(map(repeatable, rest.validation)) == list(map(repeatable, whole.validation[1:]))  # from step 4 on
    assert rest.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(value, rest.tensors[name]) for name, value in whole.tensors.items())
    assert files_of(long) == before
    assert checkpoint_names(config) == ["latest", "step_00000006", "step_00000008"]
    last, source = (TrainerState.read(directory_of(each) / "checkpoints" / "latest") for each in (config, long))
    assert (last.tokens_seen, last.flops) == (source.tokens_seen, source.flops)
    assert (last.started_from["kind"], last.started_from["step"]) == ("branch", 4)
    assert last.run_directory["path"] == str(directory_of(config))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "ddp", "deepspeed"])
def test_a_branch_is_exact_on_two_ranks(backend: str, tmp_path: Path) -> None:
    config = replace(tiny_run(tmp_path, backend), optim=WSD)
    config = with_setting(named(config, "long"), "checkpoint.every_steps", 4)
    fit(config)
    fit(rest := branch(config, "rest", 4))
    whole, found = trace(config), trace(rest)
    assert list(map(repeatable, found.steps)) == list(map(repeatable, whole.steps[4:]))
    assert all(torch.equal(value, found.tensors[name]) for name, value in whole.tensors.items())


def test_cool_downs_decay_from_the_branch_on(long: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """Of 7 steps the last 3 decay: the rates of steps 5 to 7 are 1, 2/3 and 1/3 of the peak."""
    optim = replace(WSD, decay_fraction=0.2, decay_steps=3)
    assert [lr_multiplier(step, optim, 7) for step in (3, 4, 5, 6, 7)] == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
    cool = replace(branch(long, "cool", 4, max_steps=7), optim=optim)
    assert fit(cool, 1) == [True]
    shown = capfd.readouterr().out
    assert "optim.decay_steps: null -> 3 (the learning rate and the steps left follow below)" in shown
    assert "steps left: 4 -> 3" in shown
    assert [step["train/lr"] for step in trace(cool).steps] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert trace(cool).steps[0]["train/loss"] == trace(long).steps[4]["train/loss"]  # the same data and weights
    constant = replace(WSD, schedule="constant")
    second = replace(branch(cool, "again", "latest", max_steps=8), optim=constant)  # a branch of a branch
    assert fit(second, 1) == [True]
    assert "warning: the learning rate rises" in (shown := capfd.readouterr().out)
    assert "no checkpoint is left" in shown
    chain = TrainerState.read(directory_of(second) / "checkpoints" / "latest").started_from
    assert (chain["step"], chain["started_from"]["step"]) == (7, 4)
    # The long run decays from step 6 on: from its end, the advice is to branch earlier.
    late = branch(long, "late", 8, max_steps=12)
    fit(until(late, 9), 1)
    assert f"set init.branch_from={directory_of(long)}@6" in capfd.readouterr().out


@pytest.mark.slow
def test_the_other_run_may_go_once_the_branch_has_a_checkpoint(long: Config, tmp_path: Path) -> None:
    copy = replace(long, run=replace(long.run, dir=str(tmp_path)))
    shutil.copytree(directory_of(long), directory_of(copy), symlinks=True)
    config = branch(copy, "orphan", 4)
    fit(until(config, 5), 1)
    shutil.rmtree(directory_of(copy))
    assert fit(config, 1) == [True]
    assert [step["step"] for step in trace(config).steps] == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        (3, {}, "has no such checkpoint; its steps are: 2, 4, 6, 8"),
        (8, {}, "long@8 is at step 8, where this run ends (train.max_steps = 8): raise its limit, which counts from"),
        (4, {"model.rope_theta": 5e4}, "or take only the weights by init.from in place of init.branch_from"),
        (4, {"optim.kind": "muon"}, "the checkpoint has the moments of the other optimizer"),
        (4, {"run.seed": 9}, "run.seed"),
        (4, {"model.ffn_dim": 96}, "model.ffn_dim: 64 -> 96"),
    ],
)
def test_what_a_branch_must_not_be(long: Config, step: int, change: dict[str, Any], message: str) -> None:
    config = branch(long, "refused", step)
    for name, value in change.items():
        config = with_setting(config, name, value)
    before = files_of(long)
    assert message in fit_to_failure(config, 1)[0]
    assert files_of(long) == before
    assert checkpoint_names(config) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init.branch_from": "runs/x"}, "write RUN@STEP, such as runs/x@1000"),
        ({"init.branch_from": "runs/x@1", "init.from_": "runs/y"}, "give the first to take weights alone"),
        ({"init.router": "fresh"}, "init.router = fresh is about the weights of init.from, which is null"),
        ({"init.average": True, "init.branch_from": "a@1"}, "init.average = True is about the weights of init.from"),
        ({"optim.decay_steps": 3}, "optim.decay_steps = 3 and optim.decay_fraction = 0.25 say the same thing"),
        ({"optim.decay_fraction": 0.2, "optim.decay_steps": 7}, "a decay of 7 steps (optim.decay_steps = 7) don't fit"),
        ({"optim.schedule": "cosine", "optim.decay_steps": 3}, "needs wsd and a known number of steps"),
    ],
)
def test_contradictions_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = replace(tiny_run(tmp_path), optim=WSD)
    for name, value in settings.items():
        config = with_setting(config, name, value)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert message in str(caught.value)
