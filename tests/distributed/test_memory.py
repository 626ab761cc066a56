"""The estimate of a rank's peak memory compared with its live tensors, on two processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch.distributed.tensor import DTensor

from megamor.config import Config, DataConfig, ModelConfig
from megamor.plan.memory import step_memory
from tests.distributed.harness import run_ranks
from tests.distributed.runs import EXPERT_CHOICE, run_step, start, tiny
from tests.live_bytes import LiveBytes

MODEL = ModelConfig(512, dim=128, num_layers=8, num_heads=4, num_kv_heads=2, ffn_dim=344, max_seq_len=128)
TOLERANCE = 0.10


def peak(config: Config) -> int:
    """Bytes of live tensors at the peak of a step after the first."""
    backend = start(config)
    run_step(backend, 0, config)
    existing = [*backend.module.parameters()]
    existing += [value for state in backend.optimizer.state.values() for value in state.values()]
    with LiveBytes([tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in existing]) as live:
        run_step(backend, 1, config)
    return live.peak


@pytest.mark.parametrize("policy", ["none", "block"])
@pytest.mark.parametrize("micro_batch_size", [2, 1])
@pytest.mark.parametrize(
    ("backend", "options"), [("ddp", {}), ("fsdp2", {}), ("fsdp2", {"reshard_after_forward": False})]
)
def test_peak_of_a_rank(backend: str, options: dict[str, Any], micro_batch_size: int, policy: str) -> None:
    config = tiny(backend, router=EXPERT_CHOICE, micro_batch_size=micro_batch_size, **options)
    train = replace(config.train, activation_checkpointing=policy)  # type: ignore[arg-type]
    config = replace(config, model=MODEL, data=DataConfig(seq_len=128, document_mask=False), train=train)
    measured = run_ranks(peak, config)[0]
    estimate = step_memory(config, 2, on_gpu=False)
    assert estimate.total == pytest.approx(measured, rel=TOLERANCE), estimate
