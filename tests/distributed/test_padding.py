"""Training on padded windows: how they are shared out makes no difference, also where a rank has padding alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamor.config import (
    Config,
    DataConfig,
    EmaThresholdConfig,
    ExpertChoiceConfig,
    HaltingConfig,
    ParallelConfig,
    RouterConfig,
    SourceConfig,
    TokenChoiceConfig,
)
from megamor.corpus.writer import ShardWriter
from megamor.data.dataset import TrainingData
from tests.resume.runs import VOCABULARY, Trace, fit, named, tiny_run, trace

pytestmark = pytest.mark.promise("R18")

COMPARED = ("train/loss", "train/aux_loss", "train/z_loss", "train/ponder_loss", "train/grad_norm", "train/tokens_seen")
ROUTERS: dict[str, RouterConfig] = {
    "expert_choice": ExpertChoiceConfig(aux_coeff=0.01, z_coeff=0.001),
    "token_choice": TokenChoiceConfig(balancing="none", z_coeff=0.01),
    "ema_threshold": EmaThresholdConfig(z_coeff=0.01),
    "act_hard": HaltingConfig(mode="hard"),
}
SHARES: dict[str, tuple[int, int, ParallelConfig]] = {
    "single, 4x2": (2, 1, ParallelConfig(backend="single")),
    "single, 8x1": (1, 1, ParallelConfig(backend="single")),
    "ddp": (2, 2, ParallelConfig(backend="ddp")),
    "fsdp2": (1, 2, ParallelConfig(backend="fsdp2")),
    "zero1": (1, 2, ParallelConfig(backend="deepspeed", zero_stage=1)),
    "zero2": (2, 2, ParallelConfig(backend="deepspeed", zero_stage=2)),
    "zero3": (1, 2, ParallelConfig(backend="deepspeed", zero_stage=3)),
}
"""Size of a micro-batch, processes and backend."""
FAST = {("expert_choice", "single, 8x1"), ("expert_choice", "ddp"), ("expert_choice", "fsdp2"), ("act_hard", "zero3")}
FAST |= {("token_choice", "single, 4x2")}
SEQ_LEN, CHUNK_LEN = 16, 32


def padded_run(directory: Path, router: RouterConfig) -> Config:
    """Windows of half a chunk: one of a document's two may be full, partly filled or empty."""
    base = tiny_run(directory, global_batch_size=8, max_steps=4, eval_every=4, eval_sequences=8)
    generator = np.random.default_rng(3)
    for name, lengths in (("short", generator.integers(2, 45, 80)), ("few", (75,))):
        with ShardWriter(directory / name, np.uint16) as writer:
            for length in lengths:
                writer.add((3 * (generator.integers(0, 40) + np.arange(length))) % VOCABULARY)
            writer.commit()
    data = DataConfig(
        train=(SourceConfig(str(directory / "short")),),
        # Five windows, the last of ten tokens: one process of two has none in the second round of two each.
        validation={"few": str(directory / "few")},
        packing="document",
        seq_len=SEQ_LEN,
        chunk_len=CHUNK_LEN,
    )
    return replace(base, router=router, data=data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, Trace]]:
    """Runs of one process, by router, in one micro-batch where possible; filled when first asked for."""
    found: dict[str, tuple[Config, Trace]] = {}

    class Runs(dict[str, tuple[Config, Trace]]):
        def __missing__(self, router: str) -> tuple[Config, Trace]:
            base = padded_run(tmp_path_factory.mktemp(router), ROUTERS[router])
            # The quantiles of micro-batches aren't that of the whole: they depend on its parts by definition.
            size = 1 if router == "ema_threshold" else 8
            config = replace(named(base, "whole", micro_batch_size=size), parallel=ParallelConfig(backend="single"))
            fit(config, world_size=1)
            self[router] = config, trace(config)
            return self[router]

    return Runs(found)


@pytest.mark.parametrize(
    ("router", "share"),
    [
        pytest.param(router, share, marks=() if (router, share) in FAST else pytest.mark.slow)
        for router in ROUTERS
        for share, (size, _, _) in SHARES.items()
        if router != "ema_threshold" or size == 1
    ],
)
def test_padded_windows_may_be_shared_out_in_any_way(
    router: str, share: str, whole: dict[str, tuple[Config, Trace]]
) -> None:
    base, expected = whole[router]
    micro_batch_size, world_size, parallel = SHARES[share]
    config = replace(named(base, share.replace(" ", ""), micro_batch_size=micro_batch_size), parallel=parallel)
    fit(config, world_size)
    found = trace(config)
    assert len(found.steps) == 4
    for reference, step in zip(expected.steps, found.steps, strict=True):
        compared = {name: value for name, value in reference.items() if name in COMPARED}
        assert {name: step[name] for name in compared} == pytest.approx(compared, rel=2e-6)
        assert [step[f"depth/{depth}"] for depth in range(4)] == [reference[f"depth/{depth}"] for depth in range(4)]
    losses = [{k: v for k, v in run.validation[-1].items() if "loss" in k} for run in (expected, found)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)


def test_tokens_are_counted_without_padding(whole: dict[str, tuple[Config, Trace]]) -> None:
    config, run = whole["expert_choice"]
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=VOCABULARY)
    lengths = data.samples(0, 4 * 8).lengths
    assert lengths is not None
    assert (lengths == 0).any()
    assert ((lengths > 0) & (lengths < SEQ_LEN)).any()
    seen = lengths.reshape(4, 8).sum(1).cumsum()
    assert [step["train/tokens_seen"] for step in run.steps] == seen.tolist()


def test_a_step_of_padding_alone_has_no_loss(tmp_path: Path) -> None:
    """One window a step, of which some are the empty second half of a chunk."""
    base = padded_run(tmp_path, ROUTERS["expert_choice"])
    config = replace(named(base, "tiny", global_batch_size=1, max_steps=12), parallel=ParallelConfig(backend="single"))
    fit(config, world_size=1)
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=VOCABULARY)
    lengths = data.samples(0, 12).lengths
    assert lengths is not None
    assert (lengths == 0).any()
    for record, length in zip(trace(config).steps, lengths, strict=True):
        assert (record["train/loss"] is None) == (length == 0)
        assert (record["train/grad_norm"] == 0) == (length == 0)


def test_a_budget_of_tokens_leaves_padding_out(tmp_path: Path) -> None:
    """The run ends with the first step that reaches it, across a restart, and the schedule with it."""
    base = padded_run(tmp_path, ROUTERS["expert_choice"])
    optim = replace(base.optim, schedule="cosine", warmup_steps=0)
    config = replace(
        named(base, "tiny", max_steps=None, max_tokens=500), optim=optim, parallel=ParallelConfig(backend="single")
    )
    fit(replace(config, train=replace(config.train, stop_at_step=3)), world_size=1)
    fit(config, world_size=1)
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=VOCABULARY)
    lengths = data.samples(0, 800).lengths
    assert lengths is not None
    seen = lengths.reshape(-1, 8).sum(1).cumsum()
    last = int((seen < 500).sum())
    assert last >= 500 // (8 * SEQ_LEN)  # more steps than full windows would take
    steps = trace(config).steps
    assert [step["train/tokens_seen"] for step in steps] == seen[: last + 1].tolist()
    used = [0.0, *(seen[:last] / 500)]
    floor, peak = optim.min_lr_ratio, optim.lr
    expected = [peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fraction))) for fraction in used]
    assert [step["train/lr"] for step in steps] == pytest.approx(expected)
