"""What a run logs: metrics.jsonl, TensorBoard, wandb."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megamor.config import Config, MetricsConfig
from megamor.model.flops import nominal_flops
from tests.resume.runs import STEPS, directory_of, fit, tiny_run, trace, until

DEPTHS = [f"depth/{depth}" for depth in range(4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of eight steps on two ranks, stopped after four, with every sink."""
    config = tiny_run(tmp_path_factory.mktemp("metrics"), eval_every=4)
    metrics = MetricsConfig(progress=False, tensorboard=True, wandb=True, wandb_mode="offline", wandb_project="tests")
    config = replace(config, metrics=metrics)
    assert fit(until(config, 4)) == [True, True]
    assert fit(config) == [True, True]
    return config


def test_every_step_has_every_figure(run: Config) -> None:
    steps = trace(run).steps
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert 0 < record["train/loss"] < 2 * math.log(run.model.vocab_size)
        assert record["train/aux_loss"] > 0
        assert record["train/z_loss"] > 0
        assert record["train/grad_norm"] > 0
        assert 0 <= record["train/lr"] <= run.optim.lr
        assert record["throughput/tokens_per_second"] > 0
        assert record["throughput/executed_flops"] > 0
        assert record["throughput/data_wait_seconds"] >= 0
        assert record["throughput/mfu"] is None  # the peak of a CPU isn't known
        assert 0.01 < record["memory/peak_gib"] < 100
        assert sum(record[depth] for depth in DEPTHS) == pytest.approx(1)
        assert 0 < record["routing/entropy"] <= math.log(4)
        assert record["routing/dead_depths"] == 0
        assert 0 <= record["routing/topk_causal_agreement"] <= 1
        # Capacities 1, 2/3, 1/3 of 32 tokens: the recursions take 32, 21 and 10 of them.
        assert [record[depth] * 32 for depth in DEPTHS] == pytest.approx([0, 11, 11, 10])
        assert record["routing/mean_depth"] == pytest.approx((32 + 21 + 10) / 32)
    assert [record["train/tokens_seen"] for record in steps] == [128 * step for step in range(1, STEPS + 1)]


def test_executed_flops_are_those_of_the_selected_tokens(run: Config) -> None:
    """FLOPs of whole windows; one in which a document ends needs less attention."""
    per_step = nominal_flops(run, run.train.global_batch_size).training
    found = [record["throughput/executed_flops"] for record in trace(run).steps]
    of_steps = [later - earlier for earlier, later in pairwise([0.0, *found])]  # through the restart after step 4
    whole = [flops for flops in of_steps if flops == pytest.approx(per_step, rel=1e-6)]
    assert len(of_steps) == 8
    assert len(whole) >= 4
    assert all(0.98 * per_step < flops <= 1.000001 * per_step for flops in of_steps)


def test_validation_measures_both_routing_rules(run: Config) -> None:
    validation = trace(run).validation
    assert [record["step"] for record in validation] == [4, 8]
    for record in validation:
        topk, causal = record["validation/held_out/loss_topk"], record["validation/held_out/loss_causal"]
        assert topk > 0
        assert record["validation/held_out/gap"] == pytest.approx(causal - topk)


def test_tensorboard_has_the_same_curve(run: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory_of(run) / "tensorboard"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("train/loss")}
    assert curve == pytest.approx({record["step"]: record["train/loss"] for record in trace(run).steps}, rel=1e-6)


def test_wandb_keeps_its_run_over_a_restart(run: Config) -> None:
    ids = set()
    for step in ("step_00000004", "step_00000008"):
        state = json.loads((directory_of(run) / "checkpoints" / step / "trainer.json").read_text())
        ids.add(state["run_ids"]["wandb"])
    (run_id,) = ids
    written = list((directory_of(run) / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(written) == 2


def test_a_checkpoint_records_its_origin(run: Config) -> None:
    state = json.loads((directory_of(run) / "checkpoints" / "latest" / "trainer.json").read_text())
    assert state["step"] == STEPS
    assert state["tokens_seen"] == STEPS * run.train.global_batch_size * run.data.seq_len
    assert state["data"]["consumed_samples"] == STEPS * run.train.global_batch_size
    assert list(state["data_fingerprints"]) == [run.data.train[0].prefix]
    assert state["versions"]["torch"]
    assert state["code_revision"]
    assert state["world_size"] == 2
    assert state["backend"] == "fsdp2"


def test_the_directory_holds_nothing_else(run: Config) -> None:
    found = {path.name for path in Path(directory_of(run)).iterdir()}
    assert found == {"checkpoints", "heartbeats", "metrics.jsonl", "tensorboard", "wandb"}
