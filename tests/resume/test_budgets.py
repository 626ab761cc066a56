"""Tokens and FLOPs asked for are tokens and FLOPs trained, whatever changed on the way; cumulative figures continue."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megamor.checkpoint.manifest import create_manifest, manifest_json
from megamor.config import CheckpointConfig, Config, OptimConfig, RampConfig
from megamor.config.derive import Consumed, total_steps
from megamor.ranks import Ranks
from megamor.train.budget import Budget
from tests.resume.runs import (
    LOSS_FREE,
    assert_same_run,
    directory_of,
    fit,
    fit_to_failure,
    named,
    tiny_run,
    trace,
    until,
)

FLOPS = "throughput/executed_flops"
WSD = OptimConfig(lr=3e-3, warmup_steps=2, decay_fraction=0.5)


def launch(config: Config, stop: int | None = None, world_size: int = 1, **train: Any) -> Config:
    """Run a launch with other settings of `train`; the configuration."""
    changed = replace(config, train=replace(config.train, **train))
    assert all(fit(until(changed, stop), world_size))
    return changed


def state_of(config: Config) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((directory_of(config) / "checkpoints" / "latest" / "trainer.json").read_text())
    return state


@pytest.mark.promise("R21")
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        # 1,280 tokens: five steps of 128, then five of another size or as many as are needed.
        ({"global_batch_size": 8}, [128] * 5 + [256] * 3),
        ({"global_batch_size": 2}, [128] * 5 + [64] * 10),
        ({"ramp": (RampConfig(until_step=7, global_batch_size=6),)}, [128] * 5 + [192] * 2 + [128] * 2),
        ({}, [128] * 10),
    ],
    ids=["twice the batch", "half the batch", "a ramp", "nothing"],
)
def test_max_tokens_counts_what_was_consumed(tmp_path: Path, changes: dict[str, Any], sizes: list[int]) -> None:
    base = replace(tiny_run(tmp_path, max_steps=None, max_tokens=1280), optim=WSD)
    launch(base, 5)
    changed = launch(base, 7, **changes)
    launch(changed, world_size=1 if changes else 2)
    steps = trace(base).steps
    assert [record["train/tokens_seen"] for record in steps] == [sum(sizes[: n + 1]) for n in range(len(sizes))]
    # The decay takes the last half of the steps that there are now, and would reach 0 with the step after the last.
    last = len(sizes)
    start = last - int(0.5 * last)
    assert [record["train/lr"] for record in steps[5:]] == pytest.approx(
        [3e-3 * min(1, 1 - (step - start) / (last - start)) for step in range(5, last)]
    )


@pytest.mark.promise("R21")
def test_max_tokens_with_another_sequence_length(tmp_path: Path) -> None:
    base = tiny_run(tmp_path, max_steps=None, max_tokens=1000)
    launch(base, 5)  # 640 tokens
    launch(replace(base, data=replace(base.data, seq_len=16)))
    assert [record["train/tokens_seen"] for record in trace(base).steps][4:] == [640, 704, 768, 832, 896, 960, 1024]


@pytest.mark.promise("R21")
def test_a_limit_below_what_was_consumed_trains_nothing_more(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, max_steps=None, max_tokens=1000)
    assert total_steps(config, Consumed(7, 1000)) == total_steps(config, Consumed(7, 2000)) == 7
    assert total_steps(config, Consumed(7, 999)) == 8
    assert Budget(config).is_spent(Consumed(7, 1000))
    assert not Budget(config).is_spent(Consumed(7, 999))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Eight steps, with the FLOPs of each in the metrics. Loss-free balancing, so steps differ in their FLOPs."""
    config = replace(tiny_run(tmp_path_factory.mktemp("flops")), router=LOSS_FREE, optim=WSD)
    launch(config)
    return config


@pytest.mark.promise("R21")
def test_max_flops_ends_the_run_at_the_first_step_that_reaches_them(measured: Config) -> None:
    """With the same learning rate in every step, the steps of a run that is limited otherwise."""
    counted = [record[FLOPS] for record in trace(measured).steps]
    assert len({later - earlier for earlier, later in pairwise(counted)}) > 1
    constant = replace(measured, optim=replace(WSD, schedule="constant"))
    launch(named(constant, "steps"))
    counted = [record[FLOPS] for record in trace(named(constant, "steps")).steps]
    for name, limit, last in (("exact", counted[5], 6), ("above", counted[5] + 1, 7)):
        config = named(constant, name, max_steps=None, max_flops=limit)
        launch(config)
        steps = trace(config).steps
        assert [record["step"] for record in steps] == list(range(1, last + 1))
        assert [record[FLOPS] for record in steps] == counted[:last]
        assert trace(config).validation[-1]["step"] == last


@pytest.mark.promise("R21", "R1")
@pytest.mark.parametrize(
    ("schedule", "world_size"), [("wsd", 1), ("cosine", 2)], ids=["wsd, one process", "cosine, two processes"]
)
def test_max_flops_resumes_bitwise(measured: Config, schedule: str, world_size: int) -> None:
    limit = trace(measured).steps[6][FLOPS] * 0.99
    base = replace(measured, optim=replace(WSD, schedule=schedule))
    straight = named(base, f"straight {schedule}", max_steps=None, max_flops=limit)
    broken = named(straight, f"broken {schedule}")
    launch(straight, world_size=world_size)
    for stop in (1, 5, None):
        launch(broken, stop, world_size=world_size)
    assert_same_run(trace(straight), trace(broken))
    # The learning rate follows the FLOPs used before each step; warm-up in steps.
    steps = trace(straight).steps
    used = [0.0, *(record[FLOPS] / limit for record in steps[:-1])]
    for step, (record, fraction) in enumerate(zip(steps, used, strict=True)):
        decayed = min(1.0, 2 * (1 - fraction)) if schedule == "wsd" else None
        if decayed is not None:
            assert record["train/lr"] == pytest.approx(3e-3 * min(1.0, step / 2) * decayed)
    assert len({record["train/lr"] for record in steps[3:]}) == len(steps[3:])
    assert steps[-1][FLOPS] >= limit > steps[-2][FLOPS]


@pytest.mark.promise("R21")
def test_cumulative_figures_continue(measured: Config) -> None:
    broken = named(measured, "in three launches")
    for stop in (2, 5, None):
        launch(broken, stop)
    straight = trace(measured).steps
    assert [record[FLOPS] for record in trace(broken).steps] == [record[FLOPS] for record in straight]
    state = state_of(broken)
    assert state["flops"] == straight[-1][FLOPS]
    assert state["tokens_seen"] == straight[-1]["train/tokens_seen"]
    assert state["lr"] == straight[-1]["train/lr"]
    assert state["seconds"] > 0


def test_a_run_that_ends_with_its_data_ignores_how_long_it_was_estimated(tmp_path: Path) -> None:
    """156 chunks and 40 samples a step: three steps, though the FLOPs would allow a thousand."""
    base = tiny_run(tmp_path, global_batch_size=160, micro_batch_size=160, max_steps=None, max_flops=1e18)
    base = replace(base, data=replace(base.data, on_exhausted="stop"), checkpoint=CheckpointConfig(every_steps=1))
    launch(base)
    assert [record["step"] for record in trace(base).steps] == [1, 2, 3]


def test_a_checkpoint_that_counts_no_flops(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Those of earlier versions resume; a budget of FLOPs can't be kept with one."""
    base = tiny_run(tmp_path, max_steps=3)
    launch(base, 2)
    checkpoint = directory_of(base) / "checkpoints" / "step_00000002"
    new = ("flops", "seconds", "lr", "run_directory", "resumed_from")
    old = {name: value for name, value in state_of(base).items() if name not in new}
    (checkpoint / "trainer.json").write_text(json.dumps(old))
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(manifest_json(create_manifest(checkpoint, Ranks())))
    limited = replace(base, train=replace(base.train, max_steps=None, max_flops=1e12))
    (message,) = fit_to_failure(limited, world_size=1)
    assert f"train.max_flops needs a checkpoint that counts FLOPs; {checkpoint} is older" in message
    capfd.readouterr()
    launch(base)
    assert "the checkpoint doesn't say how many FLOPs were executed: they count from here" in capfd.readouterr().out
    assert state_of(base)["flops"] == pytest.approx(trace(base).steps[0][FLOPS])
