"""Training on prompts and answers: how the tokens that count are shared out makes no difference.

Few of them count, so that micro-batches, ranks and even whole steps have none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamor.config import Config, DataConfig, ParallelConfig, SourceConfig
from megamor.corpus.writer import ShardWriter
from megamor.data.dataset import TrainingData
from tests.distributed.test_padding import COMPARED, ROUTERS, SHARES
from tests.resume.runs import VOCABULARY, fit, named, tiny_run, trace

SEQ_LEN = 16
FAST = {("expert_choice", "ddp"), ("expert_choice", "fsdp2"), ("token_choice", "single, 8x1")}


def masked_run(directory: Path, router: str, counting: float, batch: int = 8) -> Config:
    """Documents of which a fraction `counting` has an answer, of one to three tokens."""
    base = tiny_run(directory, global_batch_size=batch, max_steps=4, eval_every=4, eval_sequences=8)
    generator = np.random.default_rng(3)
    for name, fraction in (("pairs", counting), ("held_out", 0.5)):
        with ShardWriter(directory / name, np.uint16, loss_mask=True) as writer:
            for length in generator.integers(4, 30, 60):
                answer = generator.integers(1, 4) if generator.random() < fraction else 0
                ids = (3 * (generator.integers(0, 40) + np.arange(length))) % VOCABULARY
                writer.add_documents(ids, np.array([length]), np.array([length - answer]))
            writer.commit()
    data = DataConfig(
        train=(SourceConfig(str(directory / "pairs")),),
        validation={"held_out": str(directory / "held_out")},
        packing="document",
        seq_len=SEQ_LEN,
        chunk_len=32,
    )
    return replace(base, router=ROUTERS[router], data=data)


def counted(config: Config, steps: int) -> np.ndarray:
    """Labels that count in each sample of the run [steps, batch]."""
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=VOCABULARY)
    labels = data.samples(0, steps * config.train.global_batch_size).labels
    return (labels != -100).sum(1).reshape(steps, -1)


@pytest.mark.parametrize(
    ("router", "share"),
    [
        pytest.param(router, share, marks=() if (router, share) in FAST else pytest.mark.slow)
        for router in ("expert_choice", "token_choice")
        for share in SHARES
    ],
)
def test_counted_tokens_may_be_shared_out_in_any_way(router: str, share: str, tmp_path: Path) -> None:
    base = masked_run(tmp_path, router, counting=0.25)
    sizes = counted(base, 4)
    assert (sizes == 0).mean() > 0.4
    assert sizes.max() > 1
    micro_batch_size, world_size, parallel = SHARES[share]
    if micro_batch_size < 8 and world_size > 1:
        of_ranks = sizes.reshape(4, world_size, -1).sum(2)
        assert (of_ranks[:, 0] != of_ranks[:, 1]).any()
    whole = replace(named(base, "whole", micro_batch_size=8), parallel=ParallelConfig(backend="single"))
    config = replace(named(base, "shared", micro_batch_size=micro_batch_size), parallel=parallel)
    for each, world in ((whole, 1), (config, world_size)):
        fit(each, world)
    expected, found = trace(whole), trace(config)
    for reference, step in zip(expected.steps, found.steps, strict=True):
        compared = {name: value for name, value in reference.items() if name in COMPARED}
        assert {name: step[name] for name in compared} == pytest.approx(compared, rel=2e-6)
    losses = [{k: v for k, v in run.validation[-1].items() if "loss" in k} for run in (expected, found)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)


@pytest.mark.parametrize("share", ["single, 8x1", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_steps_without_a_token_that_counts(share: str, tmp_path: Path) -> None:
    """Such a step has no loss in the metrics. Its tokens train the routers, and the run continues."""
    _, world_size, parallel = SHARES[share]
    base = masked_run(tmp_path, "expert_choice", counting=0.05, batch=2)
    config = replace(named(base, "sparse", max_steps=8, micro_batch_size=1), parallel=parallel)
    fit(config, world_size)
    sizes = counted(config, 8).sum(1)
    assert (sizes == 0).any()
    assert (sizes > 0).any()
    for record, size in zip(trace(config).steps, sizes, strict=True):
        assert (record["train/loss"] is None) == (size == 0)
        assert np.isfinite(record["train/aux_loss"])
        assert np.isfinite(record["train/grad_norm"])
