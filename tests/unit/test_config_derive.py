"""Derived quantities compared with the paper's tables and the published schedule."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from megamor.config import Config, config_from_dict
from megamor.config.derive import derive, head_parameters
from megamor.config.validate import validate
from megamor.model import build_model

ROOT = Path(__file__).parents[2]
FIXTURES = Path(os.environ.get("MEGAMOR_FIXTURES", ROOT.parent / "shared" / "fixtures"))


def config_with(**sections: Any) -> Config:
    """A small valid configuration (3 recursions of 2 layers between two unique layers), with some values changed."""
    values: dict[str, Any] = {
        "model": {"vocab_size": 50, "dim": 24, "num_layers": 8, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 20},
        "recursion": {"num_recursions": 3, "sharing": "middle_cycle"},
        "data": {"seq_len": 8},
        "train": {"max_steps": 100, "global_batch_size": 12, "micro_batch_size": 2},
        "optim": {"warmup_steps": 10},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    config = config_from_dict(values)
    validate(config, world_size=3)
    return config


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (96, 1), (97, 2), (960, 10), (961, 11)])
def test_steps_from_tokens_round_up(tokens: int, steps: int) -> None:
    derived = derive(config_with(train={"max_steps": None, "max_tokens": tokens}, optim={"warmup_steps": 0}), 3)
    assert (derived.total_steps, derived.batches.tokens(derived.total_steps)) == (steps, 96 * steps)


def test_micro_batches_fill_the_global_batch() -> None:
    assert [derive(config_with(), world_size).micro_batches for world_size in (1, 2, 3, 6)] == [6, 3, 2, 1]


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"schedule": "wsd", "decay_fraction": 0.2}, 20),
        ({"schedule": "wsd", "decay_fraction": 0.0}, 0),
        ({"schedule": "cosine"}, 90),
        ({"schedule": "constant"}, 0),
    ],
)
def test_schedule_of_each_kind(optim: dict[str, Any], expected: int) -> None:
    derived = derive(config_with(optim=optim), 1)
    assert derived.decay_steps == expected


def test_schedule_is_the_published_one() -> None:
    path = FIXTURES / "lr_wsd_360m_mor3.json"
    if not path.exists():
        pytest.skip(f"no published schedule at {path}; set MEGAMOR_FIXTURES")
    published = json.loads(path.read_text())
    steps, warmup = published["num_training_steps"], published["num_warmup_steps"]
    derived = derive(config_with(train={"max_steps": steps}, optim={"warmup_steps": warmup, "decay_fraction": 0.2}), 1)
    assert derived.decay_steps == published["num_decay_steps"] == 2832
    lr = published["lr_at_step_index"]
    decay_start = steps - derived.decay_steps
    assert lr[str(decay_start)] == published["peak_lr"] > lr[str(decay_start + 1)]


@pytest.mark.parametrize(
    ("recursion", "num_layers", "expected"),
    [
        ({"num_recursions": 1, "sharing": "none"}, 7, (7, 0, 0)),
        ({"num_recursions": 3, "sharing": "cycle"}, 9, (0, 3, 0)),
        ({"num_recursions": 2, "sharing": "sequence"}, 8, (0, 4, 0)),
        ({"num_recursions": 3, "sharing": "middle_cycle"}, 8, (1, 2, 1)),
        ({"num_recursions": 2, "sharing": "middle_sequence"}, 8, (1, 3, 1)),
    ],
)
def test_layers_of_each_sharing(recursion: dict[str, Any], num_layers: int, expected: tuple[int, int, int]) -> None:
    derived = derive(config_with(recursion=recursion, model={"num_layers": num_layers}), 1)
    assert [segment.num_blocks for segment in derived.segments if segment.num_blocks] == [n for n in expected if n]
    per_layer = 2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 20 + 2 * 24
    assert derived.unique_parameters == sum(expected) * per_layer + 24
    assert derived.effective_parameters == num_layers * per_layer + 24
    assert derived.unique_parameters_with_embedding == derived.unique_parameters + 50 * 24


def test_router_heads() -> None:
    assert head_parameters("linear", 24, outputs=1) == 24
    assert head_parameters("mlp", 24, outputs=1) == 24 * 48 + 48
    assert head_parameters("wide_mlp", 24, outputs=3) == 24 * 96 + 96 * 3


@pytest.mark.parametrize("head", ["linear", "mlp", "wide_mlp"])
@pytest.mark.parametrize(
    "router",
    [
        {"kind": "fixed"},
        {"kind": "expert_choice"},
        {"kind": "expert_choice", "sampling": "aux_router"},
        {"kind": "token_choice"},
        {"kind": "token_choice", "balancing": "loss_free"},
    ],
)
def test_the_formula_counts_the_model(router: dict[str, Any], head: str) -> None:
    config = config_with(router=router if router["kind"] == "fixed" else router | {"head": head})
    built = sum(parameter.numel() for parameter in build_model(config).parameters())
    assert built == derive(config, 1).unique_parameters_with_embedding


def test_describe_is_aligned_and_says_the_numbers() -> None:
    lines = derive(config_with(train={"global_batch_size": 1200}), 3).describe().splitlines()
    assert lines[0].endswith("100 of 9,600 tokens = 960,000 tokens")
    assert "1 prelude + 2 core x 3 recursions + 1 coda = 8 effective, 4 unique" in lines[3]
    assert len({re.match(r"\S+( \S+)*  +", line).end() for line in lines}) == 1  # type: ignore[union-attr]
