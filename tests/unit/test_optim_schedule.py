"""Learning-rate schedules."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamor.config import OptimConfig
from megamor.optim import lr_multiplier, lr_multiplier_of_budget

FIXTURES = Path(os.environ.get("MEGAMOR_FIXTURES", "../shared/fixtures"))
WSD = OptimConfig(schedule="wsd", warmup_steps=4, decay_fraction=0.2)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="no reference cases here (MEGAMOR_FIXTURES)")
def test_wsd_reproduces_the_published_schedule_exactly() -> None:
    case = json.loads((FIXTURES / "lr_wsd_360m_mor3.json").read_text())
    config = OptimConfig(lr=case["peak_lr"], warmup_steps=case["num_warmup_steps"], min_lr_ratio=case["min_lr_ratio"])
    for step, expected in case["lr_at_step_index"].items():
        assert config.lr * lr_multiplier(int(step), config, case["num_training_steps"]) == expected, step


def test_wsd_by_hand() -> None:
    assert [lr_multiplier(step, WSD, 20) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_multiplier(step, WSD, 20) for step in range(15, 21)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_budget_by_hand() -> None:
    """The decay takes the last fifth of the budget, whatever the steps; the warm-up takes steps."""
    used = (0.0, 0.5, 0.8, 0.9, 1.0, 1.1)
    assert [lr_multiplier_of_budget(9, x, WSD) for x in used] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    floor = replace(WSD, min_lr_ratio=0.2)
    assert [lr_multiplier_of_budget(9, x, floor) for x in used] == pytest.approx([1.0, 1.0, 1.0, 0.6, 0.2, 0.2])
    cosine = replace(WSD, schedule="cosine", min_lr_ratio=0.1)
    assert [lr_multiplier_of_budget(9, x, cosine) for x in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])
    assert [lr_multiplier_of_budget(step, 0.9, WSD) for step in (0, 1, 4)] == pytest.approx([0.0, 0.125, 0.5])


def test_cosine_by_hand() -> None:
    config = replace(WSD, schedule="cosine", min_lr_ratio=0.1)
    values = [lr_multiplier(step, config, 20) for step in (0, 2, 4, 12, 20, 25)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])


def test_constant_warms_up_and_stays() -> None:
    config = replace(WSD, schedule="constant")
    assert [lr_multiplier(step, config, 20) for step in (0, 1, 4, 19)] == [0.0, 0.25, 1.0, 1.0]


def test_without_warmup_the_first_step_has_the_peak() -> None:
    for schedule in ("wsd", "cosine", "constant"):
        assert lr_multiplier(0, replace(WSD, schedule=schedule, warmup_steps=0), 20) == 1.0


@given(
    schedule=st.sampled_from(["wsd", "cosine", "constant"]),
    total=st.integers(1, 500),
    warmup=st.integers(0, 100),
    decay=st.floats(0.0, 0.5),
    floor=st.floats(0.0, 1.0),
)
def test_rises_then_falls_between_its_bounds(
    schedule: str, total: int, warmup: int, decay: float, floor: float
) -> None:
    warmup = min(warmup, total - int(decay * total))
    config = replace(WSD, schedule=schedule, warmup_steps=warmup, decay_fraction=decay, min_lr_ratio=floor)
    values = [lr_multiplier(step, config, total) for step in range(total + 1)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert min(values[warmup:]) >= floor - 1e-12
