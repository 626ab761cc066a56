"""What changes from step to step reaches the update: learning rate, capacities, document masks, the clipped gradient.

The figures are worked out by hand, step by step, also over a restart: a schedule that starts over, that ends with the
launch, or that is a step late shows in every one of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from megamor.config import CheckpointConfig, Config, DataConfig, ExpertChoiceConfig, OptimConfig, SourceConfig
from megamor.corpus.writer import ShardWriter
from megamor.parallel import init_world
from megamor.train import build_trainer
from megamor.train.build import last_evaluation
from megamor.train.validation import ValidationLosses
from tests.distributed.harness import run_ranks
from tests.resume.runs import STEPS, assert_same_run, directory_of, fit, named, tiny_run, trace, until

WARMUP, DECAY, FLOOR = 2, 4, 0.2
OPTIM = OptimConfig(lr=3e-3, warmup_steps=WARMUP, decay_fraction=DECAY / STEPS, min_lr_ratio=FLOOR)
# The rate differs in every step but those between warm-up and decay, of which there are three.
WSD = [0.0, 0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]
COSINE = [0.0, 0.5] + [FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]


def rates_used(config: Config) -> list[float]:
    """Run a launch; the learning rate that the optimizer had in each of its updates."""
    trainer, rates = build_trainer(config, init_world(config.parallel)), list[float]()
    update = trainer.backend.step

    def watched(max_grad_norm: float) -> torch.Tensor:
        rates.append(trainer.backend.optimizer.param_groups[0]["lr"])
        return update(max_grad_norm)

    trainer.backend.step = watched  # type: ignore[method-assign]
    assert trainer.fit()
    return rates


@pytest.mark.promise("R1", backend="single")
@pytest.mark.parametrize(("schedule", "factors"), [("wsd", WSD), ("cosine", COSINE)])
def test_the_learning_rate_of_every_update(tmp_path: Path, schedule: str, factors: list[float]) -> None:
    """Stopped after every third step: a launch knows neither where it ends nor where it began."""
    straight = replace(tiny_run(tmp_path), optim=replace(OPTIM, schedule=schedule))
    stopped = named(straight, "stopped")
    expected = pytest.approx([OPTIM.lr * factor for factor in factors], rel=1e-12)
    assert run_ranks(rates_used, straight, world_size=1)[0] == expected
    launches = [run_ranks(rates_used, until(stopped, stop), world_size=1)[0] for stop in (3, 6, None)]
    assert [len(rates) for rates in launches] == [3, 3, 2]
    assert [rate for rates in launches for rate in rates] == expected
    assert [record["train/lr"] for record in trace(stopped).steps] == expected
    assert_same_run(trace(straight), trace(stopped))


def test_capacities_warm_up_over_a_restart(tmp_path: Path) -> None:
    """A cosine from 1 to (1, 2/3, 1/3) in four steps: the tokens of 32 that each recursion takes."""
    config = replace(tiny_run(tmp_path), router=ExpertChoiceConfig(capacity_warmup_steps=4))
    assert fit(until(config, 2), world_size=1) == [True]
    assert fit(config, world_size=1) == [True]
    expected = [rows / 32 for rows in (96, 32 + 30 + 28, 32 + 26 + 21, 32 + 22 + 13, 63, 63, 63, 63)]
    assert [record["routing/mean_depth"] for record in trace(config).steps] == pytest.approx(expected)


def test_the_gradient_is_clipped_to_the_setting(tmp_path: Path) -> None:
    """After the first update the first moments are (1 - beta1) times the gradient, whose norm is the limit."""
    limit = 0.01
    config = replace(tiny_run(tmp_path), optim=replace(OPTIM, grad_clip=limit))
    assert fit(until(config, 1), world_size=1) == [True]
    found = trace(config)
    assert found.steps[0]["train/grad_norm"] > 10 * limit
    moments = [tensor for name, tensor in found.tensors.items() if name.endswith("exp_avg")]
    norm = torch.cat([moment.flatten() for moment in moments]).norm().item()
    assert norm == pytest.approx((1 - OPTIM.beta1) * limit, rel=1e-4)


def documents_of_nine(directory: Path) -> Config:
    """A run on documents of nine tokens, in windows of 32."""
    base = tiny_run(directory)
    with ShardWriter(directory / "data" / "short", np.dtype("<u2")) as writer:
        for tokens in np.random.default_rng(3).integers(0, base.model.vocab_size, (200, 9)):
            writer.add(tokens)
        writer.commit()
    prefix = str(directory / "data" / "short")
    return replace(base, data=DataConfig(train=(SourceConfig(prefix),), seq_len=32, document_mask=True))


def loss_of_the_first_batch(config: Config) -> tuple[float, float, float]:
    """Loss of the first step as logged, and of its batch with and without documents."""
    trainer = build_trainer(config, init_world(config.parallel))
    batches = trainer.loader.next_step()
    trainer.loader.take_back()
    sums = []
    with torch.no_grad():
        for apart, batch in product((True, False), batches):
            documents = batch.documents if apart else None
            out = trainer.model(batch.inputs, batch.labels, mode="train", step=0, documents=documents)
            sums.append(float(out.loss_sum))
    assert trainer.fit()
    tokens = sum(batch.labels.numel() for batch in batches)
    return trace(config).steps[0]["train/loss"], sum(sums[: len(batches)]) / tokens, sum(sums[len(batches) :]) / tokens


def test_documents_are_apart_in_training(tmp_path: Path) -> None:
    logged, apart, together = run_ranks(loss_of_the_first_batch, until(documents_of_nine(tmp_path), 1), world_size=1)[0]
    assert logged == pytest.approx(apart, rel=1e-6)
    assert abs(together - apart) > 1e-4 * apart


def test_the_best_checkpoint_is_that_of_the_inference_rule(tmp_path: Path) -> None:
    figures = {"a": {"topk": {"loss": 1.0}, "causal": {"loss": 3.0}}, "b": {"causal": {"loss": 4.0}}}
    assert ValidationLosses(figures).mean == 3.5  # type: ignore[arg-type]
    config = replace(
        tiny_run(tmp_path, max_steps=5, eval_every=2), checkpoint=CheckpointConfig(every_steps=2, keep_best=1)
    )
    assert fit(config, world_size=1) == [True]
    assert [record["step"] for record in trace(config).validation] == [2, 4, 5]  # and after the last step, always
    losses = json.loads((directory_of(config) / "checkpoints" / "validation.json").read_text())
    logged = {str(r["step"]): r["validation/held_out/loss_causal"] for r in trace(config).validation}
    assert losses == logged
    # Two ranks have half of the windows each, and both know the loss over all of them.
    shared = named(config, "shared")
    assert fit(shared, world_size=2) == [True, True]
    for one, two in zip(trace(config).validation, trace(shared).validation, strict=True):
        for mode in ("topk", "causal"):
            name = f"validation/held_out/loss_{mode}"
            assert two[name] == pytest.approx(one[name], rel=1e-6)
    assert all(r["validation/held_out/gap"] != 0 for r in trace(config).validation)


def test_an_evaluation_after_the_restored_step_is_due_again(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert last_evaluation(metrics, 5) is None
    lines = [{"step": step, "train/loss": 1.0} for step in range(1, 6)]
    lines += [{"step": step, "validation/held_out/loss_causal": 1.0} for step in (2, 4)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [last_evaluation(metrics, step) for step in (1, 2, 3, 4, 5)] == [None, 2, 2, 4, 4]


def test_the_line_of_a_validation_names_the_depth_of_one_and_of_several_stages() -> None:
    for gate, shown in (("gate_1", True), ("layers_3/gate_1", True), ("none", False)):
        causal = {"loss": 2.0, "mean_depth": 1.25, "flops_per_token": 1e6, gate: 0.5}
        (line,) = ValidationLosses({"a": {"causal": causal}}).lines()
        assert ("depth 1.25" in line) == shown
