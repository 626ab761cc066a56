"""A resume keeps what the weights mean: what it refuses, what it tells, and what becomes of a finished run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megamor.config import CheckpointConfig, Config, OptimConfig, config_from_dict, config_to_dict, config_to_yaml
from megamor.config.changes import SETTINGS, Effect, changes
from megamor.config.convert import setting_name
from megamor.errors import ConfigError
from megamor.parallel import init_world
from megamor.train import build_trainer
from megamor.train.resume import Resumption
from tests.distributed.harness import run_ranks
from tests.resume.runs import (
    LOSS_FREE,
    checkpoint_names,
    directory_of,
    fit,
    fit_to_failure,
    named,
    tiny_run,
    trace,
    until,
)

WSD = OptimConfig(lr=3e-3, warmup_steps=2)


def with_setting(config: Config, name: str, value: Any) -> Config:
    """`config` with one setting replaced."""
    section, field = name.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{field: value})})


def files_of(config: Config) -> dict[Path, bytes]:
    """Everything in the run's directory but its lock."""
    found = (path for path in directory_of(config).rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in found}


def allowing(config: Config, *names: str) -> Config:
    return with_setting(config, "checkpoint.allow_changes", names)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of eight steps that was stopped after three."""
    base = tiny_run(tmp_path_factory.mktemp("halfway"))
    base = replace(base, optim=replace(WSD, decay_fraction=0.5))
    assert fit(until(base, 3), world_size=1) == [True]
    return base


def told(config: Config, capfd: pytest.CaptureFixture, world_size: int = 1) -> str:
    """What a launch prints that starts but trains nothing."""
    capfd.readouterr()
    run_ranks(_build, config, world_size=world_size)
    return capfd.readouterr().out


def _build(config: Config) -> None:
    build_trainer(config, init_world(config.parallel)).loader.close()


def test_every_setting_is_classified_once() -> None:
    names = []
    for section, hint in get_type_hints(Config).items():
        kinds = [hint] if is_dataclass(hint) else get_args(hint)
        names += dict.fromkeys(f"{section}.{setting_name(item.name)}" for kind in kinds for item in fields(kind))
    assert sorted(SETTINGS) == sorted(names), "say in megamor/config/changes.py what a change of it does to a run"


SETTINGS_OF_TRAINING = ("schedule", "schedule_start", "schedule_steps", "backprop_recursions")


def test_what_the_function_consists_of() -> None:
    """Everything under model, recursion and router that weights depend on, and the attention mask."""
    function = {name for name, effect in SETTINGS.items() if effect is Effect.FUNCTION}
    sections = {name for name in SETTINGS if name.startswith(("model.", "recursion.", "router."))}
    # What only a new run uses, and which recursions a step trains: all of them compute what they computed.
    free = {f"recursion.{name}" for name in SETTINGS_OF_TRAINING} | {"model.init_std"}
    assert function == sections - free | {"data.document_mask", "data.tokenizer"}


OTHER_FUNCTIONS: dict[str, Any] = {
    "model.num_heads": 2,  # no tensor changes its shape
    "model.rope_theta": 500.0,
    "model.norm_eps": 1e-6,
    "model.max_seq_len": 64,
    "model.document_positions": "restart",
    "recursion.sharing": "middle_sequence",
    "recursion.kv_policy": "share_first",
    "router.alpha": 0.2,
    "router.capacity": (1.0, 0.5, 0.25),
    "router.activation": "tanh",
    "router.inference_threshold": 0.4,
    "data.document_mask": False,
}


@pytest.mark.promise("R19")
def test_a_change_of_the_function_is_refused_by_name(halfway: Config) -> None:
    before = files_of(halfway)
    for name, value in OTHER_FUNCTIONS.items():
        old = config_to_dict(halfway)[name.split(".")[0]][name.split(".")[1]]
        shown = list(value) if isinstance(value, tuple) else value
        (message,) = fit_to_failure(with_setting(halfway, name, value), world_size=1)
        assert f"belong to another model:\n  {name}: {'null' if old is None else old} -> {shown}\n" in message
        assert f"checkpoint.allow_changes=[{name}]" in message
    (message,) = fit_to_failure(replace(halfway, router=LOSS_FREE), world_size=1)
    assert "router.kind: expert_choice -> token_choice" in message
    assert files_of(halfway) == before


def test_the_moments_of_another_optimizer_are_refused(halfway: Config) -> None:
    before = files_of(halfway)
    (message,) = fit_to_failure(allowing(with_setting(halfway, "optim.kind", "muon"), "optim.kind"), world_size=1)
    assert "optim.kind: adamw -> muon: the checkpoint has the moments of the other optimizer" in message
    assert files_of(halfway) == before


@pytest.mark.promise("R19")
def test_allowing_one_change_allows_no_other(tmp_path: Path) -> None:
    old = tiny_run(tmp_path)
    (tmp_path / "config.yaml").write_text(config_to_yaml(old))
    new = with_setting(with_setting(old, "model.norm_eps", 1e-3), "model.rope_theta", 500.0)
    new = replace(new, checkpoint=replace(new.checkpoint, allow_changes=("model.rope_theta",)))
    with pytest.raises(ConfigError, match=r"allow_changes=\[model\.rope_theta,model\.norm_eps\]") as error:
        Resumption.of(tmp_path, new, {}, returns=False)
    assert "model.norm_eps: " in str(error.value)
    assert "model.rope_theta: " not in str(error.value)


@pytest.mark.promise("R19")
def test_all_ranks_refuse_together(halfway: Config) -> None:
    config = with_setting(with_setting(halfway, "router.alpha", 0.2), "model.num_heads", 2)
    first, second = fit_to_failure(allowing(config, "router.alpha"))
    assert first == second
    assert "model.num_heads: 4 -> 2" in first
    assert "router.alpha: 0.1" not in first
    assert "checkpoint.allow_changes=[router.alpha,model.num_heads]" in first


@pytest.mark.promise("R19")
def test_an_allowed_change_is_told_and_used(halfway: Config, capfd: pytest.CaptureFixture) -> None:
    printed = told(allowing(with_setting(halfway, "router.alpha", 0.2), "router.alpha"), capfd)
    assert "router.alpha: 0.1 -> 0.2 (the weights were trained with the old value; allowed by" in printed


CONSEQUENCES: dict[str, tuple[Any, str]] = {
    "optim.beta2": (0.99, "used from the next step on; the moments are kept"),
    "optim.weight_decay": (0.3, "used from the next step on; the moments are kept"),
    "train.precision": ("bf16", "results agree within rounding"),
    "train.micro_batch_size": (2, "results agree within rounding"),
    "train.global_batch_size": (8, "the learning rate isn't scaled"),
    "data.seq_len": (16, "steps of another size, from the first unseen sample on"),
    "data.on_exhausted": ("stop", "used from the first unseen sample on"),
    "data.validation": ({}, "validation losses may not be comparable"),
    "guard.skip_non_finite": (True, "used to judge the steps to come"),
    "model.init_std": (0.5, "doesn't change the training"),
    "metrics.log_every": (2, "doesn't change the training"),
}


@pytest.mark.promise("R19")
def test_every_other_change_is_told_with_its_consequence(halfway: Config, capfd: pytest.CaptureFixture) -> None:
    config = halfway
    for name, (value, _) in CONSEQUENCES.items():
        config = with_setting(config, name, value)
    printed = told(config, capfd)
    before = config_to_dict(halfway)
    for name, (value, consequence) in CONSEQUENCES.items():
        section, field = name.split(".")
        assert f"  {name}: {before[section][field]} -> {value} (" in printed
        line = next(line for line in printed.splitlines() if line.startswith(f"  {name}: "))
        assert consequence in line
    assert told(until(halfway, 3), capfd).count("->") == 0


@pytest.mark.promise("R19")
def test_the_learning_rate_and_the_steps_left_are_told(halfway: Config, capfd: pytest.CaptureFixture) -> None:
    printed = told(with_setting(halfway, "optim.lr", 1e-3), capfd)
    assert "optim.lr: 0.003 -> 0.001" in printed
    assert "learning rate of step 4: 0.003 -> 0.001; step 3 had 0.003" in printed
    assert "steps left: 5 -> 5" in printed
    assert "warning" not in printed
    printed = told(with_setting(halfway, "train.max_steps", 6), capfd)
    assert "learning rate of step 4: 0.003 -> 0.003; step 3 had 0.003" in printed
    assert "steps left: 5 -> 3" in printed
    printed = told(with_setting(halfway, "optim.schedule", "cosine"), capfd)
    assert "learning rate of step 4: 0.003 -> 0.002799" in printed  # half a cosine, one sixth of the way


def test_the_tokenizers_contents_count_not_its_path(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    first, moved, other = (tmp_path / f"{name}.json" for name in ("first", "moved", "other"))
    document = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
    for file in (first, moved):
        file.write_text(json.dumps(document))
    other.write_text(json.dumps(document | {"model": document["model"] | {"vocab": {"a": 1, "b": 0}}}))  # type: ignore
    base = with_setting(tiny_run(tmp_path), "data.tokenizer", str(first))
    assert fit(until(base, 1), world_size=1) == [True]
    assert f"{first} -> {moved} (doesn't change" in told(with_setting(base, "data.tokenizer", str(moved)), capfd)
    (message,) = fit_to_failure(with_setting(base, "data.tokenizer", str(other)), world_size=1)
    assert f"data.tokenizer: {first} -> {other} (other contents)" in message
    other.replace(first)
    (message,) = fit_to_failure(base, world_size=1)
    assert "data.tokenizer: " in message


def _groups(config: Config) -> list[dict[str, Any]]:
    trainer = build_trainer(config, init_world(config.parallel))
    return [{k: v for k, v in group.items() if k != "params"} for group in trainer.backend.optimizer.param_groups]


@pytest.mark.parametrize("backend", ["single", "fsdp2", "deepspeed"])
def test_hyperparameters_are_those_of_the_launch(tmp_path: Path, backend: str) -> None:
    """The optimizer's state is loaded without the hyperparameters that it had."""
    base = tiny_run(tmp_path, backend=backend)
    fit(until(base, 1), world_size=1)
    optim = replace(base.optim, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.3)
    (groups,) = run_ranks(_groups, replace(base, optim=optim), world_size=1)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(tuple(group["betas"]) == (0.8, 0.99) and group["eps"] == 1e-6 for group in groups)


@pytest.mark.promise("R19")
def test_a_second_experiment_under_a_finished_ones_name(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    base = tiny_run(tmp_path, max_steps=3)
    fit(base, world_size=1)
    before = trace(base).steps
    for name, value in {"optim.lr": 1e-3, "train.max_steps": 2, "train.global_batch_size": 8}.items():
        (message,) = fit_to_failure(with_setting(base, name, value), world_size=1)
        assert f"{directory_of(base)} is finished at step 3, with other settings:\n  {name}: " in message
        assert "give another run.name" in message
    assert trace(base).steps == before
    assert fit(with_setting(base, "metrics.log_every", 7), world_size=1) == [True]  # nothing else than before is asked
    capfd.readouterr()
    assert fit(with_setting(with_setting(base, "optim.lr", 1e-3), "train.max_steps", 4), world_size=1) == [True]
    printed = capfd.readouterr().out
    assert "the run was finished (train.max_steps = 3) and is extended (train.max_steps = 4)" in printed


@pytest.mark.promise("R19")
def test_extending_a_decayed_run_is_told_with_the_alternative(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """20 steps end at a learning rate of 7.5e-4; at step 21 of 60 it would be 3e-3."""
    base = replace(tiny_run(tmp_path, max_steps=20), optim=WSD, checkpoint=CheckpointConfig(every_steps=4, keep_last=9))
    assert fit(base, world_size=1) == [True]
    assert trace(base).steps[-1]["train/lr"] == pytest.approx(7.5e-4)
    longer = with_setting(base, "train.max_steps", 60)
    printed = told(longer, capfd, world_size=2)
    assert "processes: 1 -> 2 (how a step is computed: results agree within rounding)" in printed
    assert "learning rate of step 21: 0 -> 0.003; step 20 had 0.00075" in printed
    assert "steps left: 0 -> 40" in printed
    assert "warning: the learning rate rises from 0.00075 (step 20) to 0.003. " in printed
    assert "checkpoint.resume_step=16; the later checkpoints are kept" in printed
    cosine = with_setting(longer, "optim.schedule", "cosine")
    assert "no checkpoint is left of a step at which both schedules agree" in told(cosine, capfd)


@pytest.mark.promise("R19")
def test_resume_step_continues_as_if_it_had_been_planned(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    keep = CheckpointConfig(every_steps=2, keep_last=9, keep_best=1)
    base = replace(
        tiny_run(tmp_path, max_steps=6, eval_every=2), optim=replace(WSD, decay_fraction=0.34), checkpoint=keep
    )
    straight, extended = named(base, "straight", max_steps=10), named(base, "extended")
    assert fit(straight, world_size=1) == [True]
    assert fit(extended, world_size=1) == [True]
    finished = trace(extended)
    root = directory_of(extended) / "checkpoints"
    longer = with_setting(named(extended, "extended", max_steps=10), "checkpoint.resume_step", 4)
    capfd.readouterr()
    assert fit(until(longer, 5), world_size=1) == [True]
    kept = root / "set_aside" / "after_step_00000004"
    assert f"checkpoint.resume_step: later checkpoints and metrics are kept in {kept}" in capfd.readouterr().out
    assert checkpoint_names(extended) == [
        "best", "latest", "set_aside", "step_00000002", "step_00000004", "step_00000005",
        "validation.json",
    ]  # fmt: skip
    assert {path.name for path in kept.iterdir()} == {"metrics.jsonl", "step_00000006", "validation.json"}
    assert set(json.loads((kept / "validation.json").read_text())) == {"6"}
    assert set(json.loads((root / "validation.json").read_text())) == {"2", "4"}
    assert (root / "best").exists()
    # The same command, as a scheduler would rerun it, continues from the newest checkpoint; so does one without it.
    assert fit(until(longer, 8), world_size=1) == [True]
    assert fit(with_setting(longer, "checkpoint.resume_step", None), world_size=1) == [True]
    assert fit(longer, world_size=1) == [True]
    found, expected = trace(extended), trace(straight)
    losses = [[record["train/loss"] for record in run.steps] for run in (found, expected)]
    assert losses[0] == losses[1]
    assert (finished.steps[5]["train/lr"], expected.steps[5]["train/lr"]) == (1.5e-3, 3e-3)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]  # it returned once
    assert {path.name for path in kept.iterdir()} == {"metrics.jsonl", "step_00000006", "validation.json"}


def test_resume_step_that_is_not_there(halfway: Config) -> None:
    first, second = fit_to_failure(with_setting(halfway, "checkpoint.resume_step", 2))
    assert first == second
    assert first.endswith("has no checkpoint of step 2; it has those of steps: 3")


def test_resume_step_takes_no_other_for_a_damaged_one(tmp_path: Path) -> None:
    base = replace(tiny_run(tmp_path, max_steps=3), checkpoint=CheckpointConfig(every_steps=1))
    fit(base, world_size=1)
    (directory_of(base) / "checkpoints" / "step_00000002" / "trainer.json").write_text("{}")
    (message,) = fit_to_failure(with_setting(base, "checkpoint.resume_step", 2), world_size=1)
    assert "the checkpoint of step 2 is damaged" in message
    assert checkpoint_names(base) == ["latest", "step_00000001", "step_00000002", "step_00000003"]


def test_what_differs_is_found_for_every_kind_of_value() -> None:
    many: list[Mapping[str, Any]] = [{"prefix": f"s{number}"} for number in range(5)]
    old = config_from_dict({"data": {"train": many}, "router": {"kind": "fixed"}})
    new = config_from_dict({"data": {"train": [*many[:4], {"prefix": "t", "weight": 2}]}, "router": {"kind": "act"}})
    shown = [str(change) for change in changes(old, new)]
    assert shown == [
        "router.kind: fixed -> act",
        "data.train: [{'prefix': 's4', 'weight': 1.0, 'tokens': None}] -> "
        "[{'prefix': 't', 'weight': 2.0, 'tokens': None}]",
    ]
