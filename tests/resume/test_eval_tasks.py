"""Downstream tasks during training: the same figures on every backend, and training goes on as without them."""

from __future__ import annotations

import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.cli import pretrain
from megamor.config import Config, config_to_yaml
from megamor.config.validate import validate as check
from megamor.errors import ConfigError
from megamor.evaluate.scoring import Scorer
from megamor.evaluate.tasks import load_tasks, plain_metrics, run_tasks
from megamor.load import load_model
from megamor.train import Trainer
from megamor.train.evaluations import TASKS
from tests.commands import refusal
from tests.resume.runs import assert_same_run, directory_of, fit, named, tiny_run, trace, until
from tests.tasks import KINDS, task_tokenizer, write_tasks

EVERY, STEPS = 3, 8


def task_run(directory: Path, backend: str = "auto", **train: Any) -> Config:
    """A run that validates every fourth step, and evaluates tasks every third and at the end."""
    base = tiny_run(directory, backend, eval_every=4, **train)
    tasks = write_tasks(directory / "tasks")
    task_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eval_tasks": tuple(str(tasks / f"{kind}.yaml") for kind in KINDS), "eval_tasks_every": EVERY}
    return replace(
        base,
        model=replace(base.model, vocab_size=257),
        data=replace(base.data, tokenizer=str(directory / "tokenizer.json")),
        train=replace(base.train, **{**settings, "eval_tasks_limit": 2, "eval_tasks_fewshot": 1}),
    )


def without_tasks(config: Config) -> Config:
    none = {"eval_tasks": (), "eval_tasks_every": None, "eval_tasks_limit": None, "eval_tasks_fewshot": None}
    return replace(config, train=replace(config.train, **none))


def task_metrics(config: Config) -> dict[int, dict[str, float]]:
    """The tasks' figures by step."""
    lines = trace(config).validation
    found = [{k: v for k, v in line.items() if k.startswith(TASKS)} for line in lines]
    steps = [line["step"] for line, own in zip(lines, found, strict=True) if own]
    assert len(set(steps)) == len(steps)
    return dict(zip(steps, filter(None, found), strict=True))


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("backend", "ranks", "precision", "parallel"),
    [
        ("fsdp2", 2, "fp32", {}),
        slow("single", 1, "fp32", {}),
        slow("ddp", 2, "fp32", {}),
        slow("deepspeed", 2, "fp32", {"zero_stage": 3}),
        slow("deepspeed", 2, "fp32", {"zero_stage": 1}),
        slow("fsdp2", 4, "fp32", {"shard_degree": 2}),
        slow("single", 1, "bf16", {}),
        slow("fsdp2", 2, "bf16", {}),
        slow("deepspeed", 2, "bf16", {"zero_stage": 3}),
    ],
)
def test_figures_and_training(
    backend: str, ranks: int, precision: str, parallel: dict[str, Any], tmp_path: Path
) -> None:
    """The last figures are those of `megamor evaluate --tasks` on the checkpoint; nothing else changes."""
    config = task_run(tmp_path, backend, precision=precision)
    config = replace(config, parallel=replace(config.parallel, **parallel))
    assert fit(config, world_size=ranks) == [True] * ranks
    found = task_metrics(config)
    assert list(found) == [3, 6, STEPS]
    loaded = load_model(directory_of(config), "cpu")
    tasks = load_tasks(config.train.eval_tasks, limit=2, num_fewshot=1, quiet=True)
    results = run_tasks(Scorer.of(loaded), loaded.codec(), tasks)["results"]
    expected = {f"{TASKS}{task}/{k}": v for task, own in results.items() for k, v in plain_metrics(own).items()}
    assert {f"{TASKS}choose/{k}" for k in ("acc", "acc_norm", "gold_bits_per_byte")} < expected.keys()
    assert f"{TASKS}write/exact_match" in expected
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert found[STEPS] == {name: pytest.approx(value, rel=tolerance) for name, value in expected.items()}
    assert found[3] != found[6]
    plain = without_tasks(named(config, "plain"))
    assert fit(plain, world_size=ranks) == [True] * ranks
    ours, theirs = trace(config), trace(plain)
    assert [line["step"] for line in theirs.validation] == [4, STEPS]
    losses = [line for line in ours.validation if not any(key.startswith(TASKS) for key in line)]
    assert_same_run(theirs, replace(ours, validation=losses))


@pytest.mark.parametrize("kind", [slow("likelihoods"), "continuations"])
def test_a_signal_during_tasks(kind: str, tmp_path: Path) -> None:
    """It ends the evaluation before the next pass, and the next launch does the evaluation."""
    config = task_run(tmp_path)
    assert fit(config) == [True, True]
    straight = trace(config)
    seen = tmp_path / "passes"

    def spoil(trainer: Trainer) -> None:
        original, calls = Scorer.forward, count(1)

        def forward(self: Scorer, inputs: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            found = original(self, inputs, *arguments, **options)
            cached = options.get("cache") is not None
            if trainer.progress.step == EVERY and cached == (kind == "continuations") and not seen.exists():
                signal.raise_signal(signal.SIGTERM)
                seen.write_text(str(next(calls)))
            elif seen.exists():
                seen.write_text("went on")
            return found

        Scorer.forward = forward  # type: ignore[method-assign]

    config = named(config, "interrupted")
    assert fit(config, spoil=spoil, on_rank=1) == [False, False]
    assert seen.read_text() == "1"
    assert task_metrics(config) == {}
    assert fit(config) == [True, True]
    assert_same_run(straight, trace(config))


def test_tasks_that_are_added_later(tmp_path: Path) -> None:
    """A launch that resumes with new tasks evaluates them first if they are due, and once."""
    config = task_run(tmp_path)
    assert fit(until(without_tasks(config), 2 * EVERY)) == [True, True]
    for _ in range(2):
        assert fit(config) == [True, True]
        assert list(task_metrics(config)) == [2 * EVERY, STEPS]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = task_run(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(config))
    pretrain.main(["--config", str(file), "--dry-run"])
    (tmp_path / "tasks" / "questions.jsonl").unlink()
    assert "the data of task" in refusal(capsys, pretrain.main, "--config", file, "--dry-run")
    with pytest.raises(ConfigError, match=r"train\.eval_tasks = .* needs text: set data\.tokenizer"):
        check(replace(config, data=replace(config.data, tokenizer=None)))
    with pytest.raises(ConfigError, match=r"train\.eval_tasks_limit = 2 without tasks"):
        check(replace(config, train=replace(config.train, eval_tasks=())))
