"""Training doesn't depend on how a global batch is cut into micro-batches and distributed over ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamor.config import (
    Config,
    DataConfig,
    FixedDepthConfig,
    RandomConfig,
    RouterConfig,
    SourceConfig,
    TokenChoiceConfig,
)
from megamor.corpus.writer import ShardWriter
from tests.resume.runs import EXPERT_CHOICE, fit, named, tiny_run, trace

COMPARED = ("train/loss", "train/aux_loss", "train/z_loss", "train/balance_loss", "train/grad_norm")


@pytest.mark.promise("R7")
@pytest.mark.parametrize(
    ("router", "names"),
    [
        pytest.param(EXPERT_CHOICE, 4, id="expert choice"),
        # The balance loss depends on the micro-batch by definition: f·P of a part differs from that of the whole.
        pytest.param(TokenChoiceConfig(balancing="none", z_coeff=0.01), 3, id="token choice"),
        # Which tokens it takes depends on where a sequence is in the batch of the step, not of the micro-batch.
        pytest.param(RandomConfig(), 2, id="random"),
    ],
)
def test_micro_batches_and_ranks_only_share_out_the_work(tmp_path: Path, router: RouterConfig, names: int) -> None:
    base = replace(tiny_run(tmp_path, global_batch_size=8, max_steps=5), router=router)
    whole = named(base, "8x1", micro_batch_size=8)
    fit(whole, world_size=1)
    expected = trace(whole).steps
    assert len(expected) == 5
    for micro_batch_size, world_size in ((2, 1), (1, 1), (2, 2)):
        shared = named(base, f"{micro_batch_size} on {world_size}", micro_batch_size=micro_batch_size)
        fit(shared, world_size)
        for reference, found in zip(expected, trace(shared).steps, strict=True):
            compared = {name: value for name, value in reference.items() if name in COMPARED}
            assert len(compared) == names
            assert {name: found[name] for name in compared} == pytest.approx(compared, rel=1e-6)
            assert [found[f"depth/{d}"] for d in range(4)] == [reference[f"depth/{d}"] for d in range(4)]


def uneven_documents(directory: Path) -> Config:
    """A run in which every document has a window of its own: of 32 positions 2 to 31 are labels."""
    base = tiny_run(directory, global_batch_size=8, max_steps=3)
    generator = np.random.default_rng(5)
    with ShardWriter(directory / "data" / "uneven", np.dtype("<u2")) as writer:
        for length in generator.integers(3, 33, 60):
            writer.add(3 * np.arange(length) + generator.integers(0, 3, length))
        writer.commit()
    source = SourceConfig(str(directory / "data" / "uneven"))
    return replace(base, router=FixedDepthConfig(), data=DataConfig(train=(source,), seq_len=32, packing="document"))


@pytest.mark.promise("R7")
def test_every_label_counts_the_same_wherever_it_is(tmp_path: Path) -> None:
    """Ranks and micro-batches have different numbers of labels: a mean of their means would be another loss."""
    base = uneven_documents(tmp_path)
    whole = named(base, "8x1", micro_batch_size=8)
    fit(whole, world_size=1)
    # A model that knows nothing has a loss of ln V per label; padding doesn't dilute it.
    assert trace(whole).steps[0]["train/loss"] == pytest.approx(math.log(base.model.vocab_size), abs=0.1)
    for micro_batch_size, world_size in ((1, 1), (2, 2)):
        shared = named(base, f"{micro_batch_size} on {world_size}", micro_batch_size=micro_batch_size)
        fit(shared, world_size)
        for reference, found in zip(trace(whole).steps, trace(shared).steps, strict=True):
            for name in ("train/loss", "train/grad_norm"):
                assert found[name] == pytest.approx(reference[name], rel=1e-6)
