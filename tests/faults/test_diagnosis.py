"""Each alarm is raised when its failure is injected into a real run, and no alarm in a healthy run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamor.config import Config, DiagnosisConfig, GuardConfig, RandomConfig, TokenChoiceConfig
from megamor.train import Trainer
from megamor.train.diagnosis import Diagnosis
from megamor.train.guard import Guard
from megamor.train.step_statistics import StepSummary
from tests.resume.runs import EXPERT_CHOICE, LOSS_FREE, Spoil, fit, fit_to_failure, tiny_run

STEPS = 3
SENSITIVE = DiagnosisConfig(
    steps=STEPS,
    dead_router="stop",
    pinned_depth="stop",
    unigram_plateau="stop",
    plateau_after_step=1,
    plateau_margin=0.001,
    exploding_norm="stop",
)


def healthy(directory: Path, router: Any = EXPERT_CHOICE) -> Config:
    """A run that learns."""
    return replace(tiny_run(directory), router=router, diagnosis=SENSITIVE)


def in_train_step(change: Callable[[Trainer], None]) -> Spoil:
    """Call a function before every step."""

    def spoil(trainer: Trainer) -> None:
        train_step = trainer.train_step

        def changed(batches: Any) -> Any:
            change(trainer)
            return train_step(batches)

        trainer.train_step = changed  # type: ignore[method-assign]

    return spoil


def cut_off_router(trainer: Trainer) -> None:
    """Stop the gradient through the router's scores."""
    for head in trainer.model.stage.router.heads:
        head.register_forward_hook(lambda module, inputs, output: output * 0.0)


def pin_depth(trainer: Trainer) -> None:
    """Make every token strongly prefer the last recursion."""
    trainer.model.stage.router.bias.copy_(torch.tensor([0.0, 0.0, 100.0]))


def forget_everything(trainer: Trainer) -> None:
    """Replace the losses by those of a unigram model."""
    judge = trainer.guard.judge
    if not hasattr(trainer.guard, "spoiled"):
        trainer.guard.spoiled = True
        trainer.guard.judge = lambda step, loss, norm: judge(step, trainer.diagnosis.tokens.entropy(), norm)


def explode(trainer: Trainer) -> None:
    """Multiply gradients by a thousand from the fifth step on."""
    total_loss = Trainer.total_loss

    def larger(*arguments: Any) -> Tensor:
        return total_loss(trainer, *arguments) * (1000.0 if trainer.progress.step >= 4 else 1.0)

    trainer.total_loss = larger  # type: ignore[method-assign]


INJECTED: dict[str, tuple[Any, Callable[[Trainer], None], str]] = {
    "dead router": (
        replace(EXPERT_CHOICE, aux_coeff=0.0, z_coeff=0.0, gating="additive"),
        lambda trainer: None,
        "gradient 0",
    ),
    "dead router's scores": (EXPERT_CHOICE, cut_off_router, "gradient 0"),
    "pinned depth": (TokenChoiceConfig(balancing="loss_free", bias_update_rate=1e-9), pin_depth, "depth 3 in 3 steps"),
    "unigram plateau": (EXPERT_CHOICE, forget_everything, "entropy of single tokens 4."),
    "exploding norm": (EXPERT_CHOICE, explode, "usually"),
}


@pytest.mark.parametrize("failure", INJECTED)
def test_an_injected_failure_is_named(tmp_path: Path, failure: str) -> None:
    router, change, sign = INJECTED[failure]
    config = healthy(tmp_path, router)
    config = replace(config, diagnosis=replace(SENSITIVE, plateau_margin=0.1 if failure == "unigram plateau" else 1e-6))
    errors = fit_to_failure(config, spoil=in_train_step(change), on_rank=None)
    assert errors[0] == errors[1]
    assert errors[0].startswith("TrainingError: step ")
    assert failure.removesuffix("'s scores") in errors[0]
    assert sign in errors[0]
    assert "To continue anyway: diagnosis." in errors[0]


@pytest.mark.parametrize(
    "router",
    [
        EXPERT_CHOICE,
        LOSS_FREE,
        # Controls, one with scores that nothing reaches, and a warm-up in which all tokens take full depth by order.
        RandomConfig(),
        RandomConfig(gates="learned", gating="additive"),
        TokenChoiceConfig(balance_warmup_steps=8),
    ],
    ids=["expert choice", "token choice", "random", "random, unreached", "token choice, warming up"],
)
def test_a_healthy_run_raises_no_alarm(tmp_path: Path, router: Any) -> None:
    assert fit(healthy(tmp_path, router)) == [True, True]


def test_a_warning_is_given_once_and_training_continues(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    config = healthy(tmp_path, replace(EXPERT_CHOICE, aux_coeff=0.0, z_coeff=0.0, gating="additive"))
    config = replace(config, diagnosis=replace(SENSITIVE, dead_router="warn"))
    assert fit(config) == [True, True]
    assert capfd.readouterr().out.count("dead router") == 1


def test_signs_are_counted_over_a_restart(tmp_path: Path) -> None:
    router, change, _ = INJECTED["pinned depth"]
    config = healthy(tmp_path, router)
    spoil = in_train_step(change)
    assert fit(replace(config, train=replace(config.train, stop_at_step=2)), spoil=spoil, on_rank=None) == [True, True]
    assert "step 3: pinned depth" in fit_to_failure(config, spoil=spoil, on_rank=None)[0]


def test_a_symptom_must_last_without_a_break() -> None:
    """Norms above the limit in three steps in a row; the usual one is the median of the guard's window."""
    config = Config(diagnosis=replace(SENSITIVE, exploding_norm="warn", norm_factor=10.0, unigram_plateau="off"))
    diagnosis, guard = Diagnosis(config, {}, torch.device("cpu")), Guard(GuardConfig())
    guard.grad_norms.extend([1.0, 1.0, 1.0, 50.0, 50.0])
    found = []
    for step, norm in enumerate((11.0, 11.0, 9.9, 11.0, 11.0, 11.0, 11.0, 1.0, 11.0, 11.0, 11.0), start=1):
        if diagnosis.observe(step, StepSummary(1.0, 1, {}, {}, [], [], grad_norm=norm), guard, []):
            found.append(step)
    assert found == [6, 11]
