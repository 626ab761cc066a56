"""Weights, random states and `trainer.json` of a checkpoint."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from megamor.checkpoint import (
    TrainerState,
    check_same_model,
    code_revision,
    library_versions,
    load_weights,
    reseed,
    restore_rng,
    rng_states,
    weight_shapes,
    write_rng,
)
from megamor.checkpoint.layout import latest_step, parse_step, step_name
from megamor.config import CustomRouterConfig
from megamor.errors import CheckpointError
from megamor.routing import draws_random
from tests.combinations import ROUTERS


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=checkpoint / "state", no_dist=True)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 3, generator=generator),
        "norm.weight": torch.randn(3, generator=generator).bfloat16(),
        "router.bias": torch.arange(4),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    state = {"model": weights, "optimizer": {"embed.weight.exp_avg": torch.ones(7, 3), "step": 5}}
    write_state(tmp_path, state)
    return tmp_path


def test_weights_come_back_bitwise(checkpoint: Path, weights: dict[str, torch.Tensor]) -> None:
    loaded = load_weights(checkpoint)
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert weight_shapes(checkpoint) == {name: tensor.shape for name, tensor in weights.items()}


def test_another_model_is_refused_with_the_differences(checkpoint: Path) -> None:
    stored = weight_shapes(checkpoint)
    check_same_model(checkpoint, stored, {"embed.weight": (7, 3), "norm.weight": (3,), "router.bias": (4,)})
    expected = {"embed.weight": (9, 3), "norm.weight": (3,), "head.weight": (2, 2)}
    with pytest.raises(CheckpointError, match="another model") as caught:
        check_same_model(checkpoint, stored, expected)
    message = str(caught.value)
    assert "embed.weight is (7, 3) instead of (9, 3)" in message
    assert "head.weight (2, 2) is missing" in message
    assert "router.bias (4,) is not in the model" in message
    assert "norm.weight" not in message


def test_unreadable_state_is_one_error(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable state"):
        load_weights(tmp_path / "nothing")
    shard = next((checkpoint / "state").glob("*.distcp"))
    shard.write_bytes(b"")
    with pytest.raises(CheckpointError, match="can't read the weights"):
        load_weights(checkpoint)
    (checkpoint / "state" / ".metadata").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="no readable state"):
        load_weights(checkpoint)


def test_state_without_a_model(tmp_path: Path) -> None:
    write_state(tmp_path, {"other": torch.ones(2)})
    with pytest.raises(CheckpointError, match="has no weights"):
        load_weights(tmp_path)


def draw() -> tuple[float, ...]:
    normal = float(np.random.normal()), random.gauss(0, 1)  # both keep half of a pair in their state
    return (random.random(), float(np.random.rand()), float(torch.rand(())), *normal)


def test_random_states_continue_exactly(tmp_path: Path) -> None:
    reseed(1, 2, 3)
    draw()
    write_rng(tmp_path, rng_states(2), rank=1)
    expected = [draw() for _ in range(3)]
    reseed(9, 9, 9)
    assert restore_rng(tmp_path, rank=1, world_size=2, seed=1, step=2)
    assert [draw() for _ in range(3)] == expected


def test_other_world_size_reseeds_by_seed_step_and_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rank in range(2):
        write_rng(tmp_path, rng_states(2), rank=rank)
    drawn = []
    with caplog.at_level(logging.WARNING):
        for rank in range(3):
            assert not restore_rng(tmp_path, rank=rank, world_size=3, seed=1, step=7)
            drawn.append(draw())
    assert [record.getMessage() for record in caplog.records] == [
        "random states set anew from seed 1 and step 7: saved by 2 ranks, now 3"
    ]
    assert len(set(drawn)) == 3
    reseed(1, 7, 2)
    assert draw() == drawn[2]
    # Neighbours are as different as any others: not by one sum of seed, step and rank.
    neighbours = []
    for words in ((1, 8, 2), (1, 7, 2), (1, 9, 1), (2, 7, 2), (2, 8, 1), (0, 9, 2)):
        reseed(*words)
        neighbours.append(draw())
    assert len(set(neighbours)) == 6


def test_no_warning_when_nothing_is_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rng(tmp_path, rng_states(2), rank=0)
    assert not restore_rng(tmp_path, rank=0, world_size=3, seed=1, step=7, draws_random=False)
    assert caplog.records == []
    drawing = {config.kind for config in ROUTERS.values() if draws_random(config)}
    assert drawing - {"custom"} == {"skip_forward_recurse"}
    assert draws_random(CustomRouterConfig(target="anything:Router"))  # nobody knows what it does
    assert draws_random(CustomRouterConfig("somewhere:Router"))


def test_damaged_random_state_is_an_error(tmp_path: Path) -> None:
    write_rng(tmp_path, rng_states(1), rank=0)
    path = tmp_path / "rng" / "rank_00000.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"can't restore the random states in .*rank_00000\.pt"):
        restore_rng(tmp_path, rank=0, world_size=1, seed=0, step=0)


@pytest.mark.promise("R9")
def test_trainer_state_round_trip(tmp_path: Path) -> None:
    state = TrainerState(
        step=5,
        tokens_seen=640,
        data={"next_sample": 40, "phases": [[0, 8]]},
        world_size=2,
        backend="fsdp2",
        components={"guard": {"window": [1.0, 2.0]}},
        run_ids={"wandb": "abc"},
        data_fingerprints={"train": "f00"},
        code_revision=code_revision(),
        versions=library_versions(),
    )
    (tmp_path / "trainer.json").write_text(state.to_json())
    assert TrainerState.read(tmp_path) == state
    assert state.versions["torch"] == torch.__version__.split("+")[0] or state.versions["torch"] == torch.__version__


def test_trainer_state_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    with pytest.raises(CheckpointError, match="can't read"):
        TrainerState.read(tmp_path)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="contains a list"):
        TrainerState.read(tmp_path)
    path.write_text(json.dumps({"step": 1, "tokens_seen": 2, "data": {}, "world_size": 1, "colour": "red"}))
    with pytest.raises(CheckpointError, match=r"missing \['backend'\], unknown \['colour'\]"):
        TrainerState.read(tmp_path)


def test_step_names(tmp_path: Path) -> None:
    for step in (0, 99999999, 123456789):
        assert parse_step(step_name(step)) == step
    for name in ("step_1", ".writing_step_00000001", "step_00000001x", "latest"):
        assert parse_step(name) is None
    assert latest_step(tmp_path) is None
