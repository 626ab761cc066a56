"""The data that the trainer gets: its order for any number of processes, ramps, sources that run out."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamor.config import CheckpointConfig, Config, RampConfig
from megamor.data.dataset import TrainingData
from megamor.data.loader import MicroBatch
from megamor.parallel import init_world
from megamor.train import Trainer, build_trainer
from tests.distributed.harness import run_ranks
from tests.resume.runs import assert_same_run, checkpoint_names, directory_of, fit, named, tiny_run, trace, until


def fit_and_tell(config: Config, directory: Path) -> None:
    """Run a launch in which every rank saves the batches that it was given."""
    world = init_world(config.parallel)
    trainer = build_trainer(config, world)
    next_step = trainer.loader.next_step

    def told() -> list[MicroBatch]:
        batches = next_step()
        ids = np.concatenate([batch.inputs.numpy() for batch in batches])
        np.save(directory / f"step {trainer.progress.step} rank {world.rank}.npy", ids)
        return batches

    trainer.loader.next_step = told  # type: ignore[method-assign]
    trainer.fit()


def test_any_number_of_processes_reads_the_samples_of_one(tmp_path: Path) -> None:
    """R5: every global batch has the ids of the run's order, and losses equal those of an uninterrupted run."""
    base = tiny_run(tmp_path, backend="ddp", global_batch_size=12)
    straight, elastic = named(base, "straight"), named(base, "elastic")
    fit(straight, world_size=1)
    seen = tmp_path / "seen"
    seen.mkdir()
    for launch, world in enumerate((1, 2, 4, 3)):
        run_ranks(fit_and_tell, until(elastic, 2 * launch + 2), seen, world_size=world)
    data = TrainingData.open(base.data, seed=base.run.seed, vocab_size=base.model.vocab_size)
    for step in range(8):
        world = (1, 2, 4, 3)[step // 2]
        found = np.concatenate([np.load(seen / f"step {step} rank {rank}.npy") for rank in range(world)])
        assert (found == data.samples(12 * step, 12).inputs).all()
    assert len(list(seen.iterdir())) == 2 * (1 + 2 + 4 + 3)
    losses = [[record["train/loss"] for record in trace(run).steps] for run in (straight, elastic)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_ramp_resumes_bitwise(tmp_path: Path) -> None:
    """A run resumed at every step of a ramp of batch and length is the same run; its tokens are counted correctly."""
    ramp = (RampConfig(until_step=2, global_batch_size=2, seq_len=16), RampConfig(until_step=4, seq_len=16))
    base = tiny_run(tmp_path, ramp=ramp)
    straight, broken = named(base, "straight"), named(base, "broken")
    fit(straight, world_size=1)
    for step in (1, 2, 3, 5, None):
        fit(until(broken, step), world_size=1)
    assert_same_run(trace(straight), trace(broken))
    steps = trace(straight).steps
    assert [record["train/tokens_seen"] for record in steps] == [32, 64, 128, 192, 320, 448, 576, 704]
    state = json.loads((directory_of(straight) / "checkpoints" / "latest" / "trainer.json").read_text())
    assert [phase["first_sample"] for phase in state["data"]["phases"]] == [0, 4, 12]
    assert [record["throughput/tokens_per_second"] > 0 for record in steps] == [True] * 8
    (source,) = TrainingData.open(base.data, seed=0, vocab_size=base.model.vocab_size).sources.values()
    assert [record["data/epochs/train"] * source.epoch_tokens for record in steps] == pytest.approx(
        [record["train/tokens_seen"] for record in steps]
    )


def test_a_run_ends_with_its_data_if_asked(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """156 chunks of 32 tokens and 40 samples a step: the fourth step would repeat some."""
    base = tiny_run(tmp_path, global_batch_size=160)
    base = replace(base, checkpoint=CheckpointConfig(every_steps=1))
    stop = named(replace(base, data=replace(base.data, on_exhausted="stop")), "stop", micro_batch_size=160)
    assert fit(stop, world_size=1) == [True]
    printed = capfd.readouterr().out
    assert "warning: the run ends early, after step 3, because train is used up" in printed
    assert [record["step"] for record in trace(stop).steps] == [1, 2, 3]
    assert checkpoint_names(stop) == ["latest", "step_00000001", "step_00000002", "step_00000003"]
    assert fit(stop, world_size=1) == [True]
    assert "step 3 is done and the last one asked for is 3" in capfd.readouterr().out
    on = named(base, "repeat", micro_batch_size=160)
    assert fit(until(on, 4), world_size=1) == [True]
    assert "warning: train is used up in step 4 and then read again, 2.05 times" in capfd.readouterr().out
    assert trace(on).steps[-1]["data/epochs/train"] == pytest.approx(640 / 624)


@pytest.mark.parametrize("packing", ["best_fit", "document"])
def test_a_packed_run_resumes_bitwise(tmp_path: Path, packing: str) -> None:
    base = tiny_run(tmp_path)
    base = replace(base, data=replace(base.data, packing=packing))
    straight, broken = named(base, "straight"), named(base, "broken")
    fit(straight, world_size=1)
    for step in (3, None):
        fit(until(broken, step), world_size=1)
    assert_same_run(trace(straight), trace(broken))


def test_a_slow_disk_shows_up_as_data_wait(tmp_path: Path) -> None:
    base = tiny_run(tmp_path)
    delay = 1.0

    def spoil(trainer: Trainer) -> None:
        data = trainer.loader._data
        fill = data.fill

        def slow(*arguments: object) -> None:
            time.sleep(delay)
            fill(*arguments)  # type: ignore[arg-type]

        object.__setattr__(data, "fill", slow)

    fast, slow = named(base, "fast"), named(base, "slow")
    fit(until(fast, 3), world_size=1)
    fit(until(slow, 3), world_size=1, spoil=spoil)
    waits = [[r["throughput/data_wait_seconds"] for r in trace(run).steps] for run in (fast, slow)]
    rates = [trace(run).steps[-1]["throughput/tokens_per_second_mean"] for run in (fast, slow)]
    assert waits[1][0] >= delay
    assert sum(waits[1]) > 1.5 * delay  # a step is far shorter than the delay, even on a loaded machine
    assert sum(waits[0]) < 0.5 * delay
    assert rates[1] < rates[0]
