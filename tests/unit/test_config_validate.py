"""Rules between fields: all violations are reported at once, each with its value and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from megamor.config import Config, config_from_dict
from megamor.config.validate import validate
from megamor.errors import ConfigError

VALID: dict[str, Any] = {
    "model": {"num_layers": 32},
    "recursion": {"num_recursions": 3, "sharing": "middle_cycle"},
    "router": {"kind": "expert_choice"},
    "train": {"max_steps": 1000},
}


def changed(**sections: Any) -> Config:
    """`VALID` with some values replaced; `router` replaces its whole section."""
    values = {name: dict(section) for name, section in VALID.items()}
    for name, section in sections.items():
        values[name] = section if name == "router" else values.get(name, {}) | section
    return config_from_dict(values)


def violations(config: Config, world_size: int | None = None) -> list[str]:
    """The lines of the error after the first."""
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"router": {"kind": "fixed", "depth": 3}},
        {"router": {"kind": "expert_choice", "capacity": [1, 1, 0.01]}},
        {"router": {"kind": "expert_choice", "capacity_warmup_steps": 1000, "aux_coeff": 0}},
        {"router": {"kind": "token_choice", "balance_warmup_steps": 1000}},
        {"router": {"kind": "expert_choice", "target_depth": 3}},
        {"router": {"kind": "skip_forward_recurse", "target_depth": 0.2}},
        {"router": {"kind": "monotone", "target_flops": 0.1}},
        {"router": {"kind": "act", "target_depth": 1}},
        {"recursion": {"sharing": "sequence"}, "model": {"num_layers": 30}},
        {"recursion": {"sharing": "none", "num_recursions": 1}, "router": {}, "model": {"num_layers": 1}},
        {"train": {"max_steps": None, "max_tokens": 10**10}},
        {"train": {"stop_at_step": 1000}},
        {"optim": {"warmup_steps": 800, "decay_fraction": 0.2}},
        {"optim": {"warmup_steps": 0, "decay_fraction": 1.0, "min_lr_ratio": 1, "beta1": 0}},
        {"optim": {"warmup_steps": 1000, "schedule": "cosine"}},
        {"optim": {"warmup_steps": 1000, "schedule": "constant"}},
        {"data": {"train": ["a"], "seq_len": 1}},
    ],
)
def test_limits_of_valid_values(sections: dict[str, Any]) -> None:
    validate(changed(**sections), world_size=4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"dim": 575}}, "model.dim = 575 can't be split into model.num_heads = 9 heads of even width"),
        ({"model": {"dim": 576 + 9}}, "use dim 576 or 594"),
        ({"model": {"num_kv_heads": 2}}, "by model.num_kv_heads = 2: use num_kv_heads 1 or 3 or 9"),
        ({"data": {"seq_len": 2049}}, "data.seq_len = 2049 is longer than model.max_seq_len = 2048"),
        ({"recursion": {"sharing": "none"}}, "num_recursions = 3 with recursion.sharing = none: choose a sharing"),
        ({"recursion": {"num_recursions": 1}, "router": {}}, "set sharing: none"),
        ({"model": {"num_layers": 33}}, "isn't a multiple of recursion.num_recursions = 3; use num_layers 32 or 35"),
        ({"model": {"num_layers": 4}}, "= 2 isn't a multiple of recursion.num_recursions = 3; use num_layers 5"),
        ({"model": {"num_layers": 2}}, "use num_layers 5"),
        ({"model": {"num_layers": 1}}, "use num_layers 5"),
        ({"recursion": {"sharing": "cycle"}}, "model.num_layers = 32 isn't a multiple"),
        ({"recursion": {"sharing": "sequence"}}, "use num_layers 30 or 33"),
        ({"router": {"kind": "fixed", "depth": 4}}, "router.depth = 4 is more than recursion.num_recursions = 3"),
        ({"router": {"kind": "token_choice", "target_depth": 2, "target_flops": 0.5}}, "give one of them"),
        ({"router": {"kind": "learned_threshold", "target_depth": 3.5}}, "router.target_depth = 3.5 is more than"),
        ({"router": {"kind": "act", "target_depth": 0.5}}, "can't be reached"),
        ({"router": {"kind": "expert_choice", "target_flops": 0.3}}, "give at least 1 / 3"),
        ({"router": {"kind": "pondernet", "target_depth": 2, "mode": "soft"}}, "use mode: hard"),
        (
            {"router": {"kind": "ema_threshold", "target_depth": 2, "capacity": [1, 0.5, 0.5]}},
            "decides the capacities, but router.capacity = [1.0, 0.5, 0.5]",
        ),
        ({"router": {"kind": "expert_choice", "capacity": [1, 0.5]}}, "has 2 entries for recursion.num_recursions = 3"),
        ({"router": {"kind": "expert_choice", "capacity": [0.5, 0.6, 0.1]}}, "give fractions that never rise"),
        ({"router": {"kind": "expert_choice", "capacity_warmup_steps": 1001}}, "capacity_warmup_steps = 1001"),
        ({"router": {"kind": "token_choice", "balance_warmup_steps": 1001}}, "balance_warmup_steps = 1001"),
        ({"train": {"max_tokens": 5}}, "found train.max_steps = 1000 and train.max_tokens = 5; give exactly one"),
        ({"train": {"max_steps": None}}, "found none; give exactly one"),
        ({"train": {"stop_at_step": 1001}}, "train.stop_at_step = 1001 is after the run's last step 1000"),
        ({"train": {"micro_batch_size": 3}}, "by train.micro_batch_size = 3: use global_batch_size 1023 or 1026"),
        ({"optim": {"warmup_steps": 801}}, "optim.warmup_steps = 801 and a decay of 200 steps"),
        ({"optim": {"warmup_steps": 1001, "schedule": "cosine"}}, "optim.warmup_steps = 1001 is more than the run's"),
        ({"data": {"validation": {"a/b": "c"}}}, "'a/b'"),
        ({"run": {"name": "a/b"}}, "run.name = 'a/b'"),
        ({"run": {"name": ".."}}, "run.name = '..'"),
        ({"run": {"name": ""}}, "run.name = ''"),
        ({"train": {"ramp": [{"until_step": 5, "global_batch_size": 24}]}}, "ramp[0]: train.global_batch_size = 24"),
        ({"train": {"ramp": [{"until_step": 5, "seq_len": 4096}]}}, "more than data.seq_len = 2048"),
        ({"train": {"ramp": [{"until_step": 5}] * 2}}, "train.ramp[1].until_step = 5 isn't after step 5"),
        ({"train": {"ramp": [{"until_step": 1000}]}}, "ramp ends at step 1000, but the run ends after 1000"),
        ({"data": {"train": [{"prefix": "x", "tokens": 5, "weight": 2}]}}, "(x) has tokens = 5.0 and weight = 2.0"),
        ({"data": {"train": [{"prefix": "x", "tokens": 5}, "y"]}}, "data.train[1] (y) has no tokens, but others do"),
        ({"data": {"train": [{"prefix": "x", "tokens": 5}], "blend_temperature": 2.0}},
         "data.blend_temperature = 2.0 can't be combined with token budgets"),
    ],
)  # fmt: skip
def test_one_violation_gives_one_line(sections: dict[str, Any], message: str) -> None:
    (line,) = violations(changed(**sections))
    assert message in line


def test_a_router_without_recursions_has_nothing_to_choose() -> None:
    config = changed(recursion={"num_recursions": 1, "sharing": "none"})
    assert violations(config) == [
        "router.kind = expert_choice with recursion.num_recursions = 1 has nothing to choose: "
        "use kind: fixed, or more recursions"
    ]


def test_the_batch_must_be_divisible_by_the_processes() -> None:
    config = changed(train={"global_batch_size": 32, "micro_batch_size": 4})
    validate(config)
    validate(config, world_size=8)
    (line,) = violations(config, world_size=3)
    assert "= 32 isn't divisible by train.micro_batch_size = 4 x 3 processes: use global_batch_size 24 or 36" in line
    assert line.endswith("or another number of processes")
    (line,) = violations(changed(train={"global_batch_size": 1024, "micro_batch_size": 16}), world_size=512)
    assert line.endswith("x 512 processes: use global_batch_size 8192, or micro_batch_size 2")


def test_one_process_for_the_single_backend() -> None:
    config = changed(parallel={"backend": "single"})
    validate(config, world_size=1)
    (line,) = violations(config, world_size=2)
    assert "parallel.backend = single with 2 processes" in line


def test_all_violations_are_reported_at_once() -> None:
    config = changed(
        model={"num_layers": 33, "num_kv_heads": 2},
        router={"kind": "expert_choice", "capacity": [1]},
        train={"max_tokens": 1, "micro_batch_size": 3},
        run={"name": "/"},
    )
    assert len(violations(config)) == 6


def test_a_ramp_that_fits() -> None:
    ramp = [{"until_step": 10, "seq_len": 256, "micro_batch_size": 64}, {"until_step": 20, "global_batch_size": 512}]
    validate(changed(train={"ramp": ramp}), world_size=4)
    (line,) = violations(changed(train={"ramp": ramp}), world_size=32)
    assert line.startswith(
        "train.ramp[0]: train.global_batch_size = 1024 isn't divisible by train.micro_batch_size = 64"
    )
