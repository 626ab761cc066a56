"""Training doesn't depend on how a global batch is cut into micro-batches and distributed over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megamor.config import RouterConfig, TokenChoiceConfig
from tests.resume.runs import EXPERT_CHOICE, fit, named, tiny_run, trace

COMPARED = ("train/loss", "train/aux_loss", "train/z_loss", "train/balance_loss", "train/grad_norm")


@pytest.mark.promise("R7")
@pytest.mark.parametrize(
    ("router", "names"),
    [
        pytest.param(EXPERT_CHOICE, 4, id="expert choice"),
        # The balance loss depends on the micro-batch by definition: f·P of a part differs from that of the whole.
        pytest.param(TokenChoiceConfig(balancing="none", z_coeff=0.01), 3, id="token choice"),
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
