"""Cases of the kernels of GPUs for Triton's interpreter, on a CPU; `test_gpu_kernels.py` starts them."""

from __future__ import annotations

import pytest
import torch

from tests.serve.gpu_blocks import BLOCKS, EXACT, BlockCase, check_norms_and_activations
from tests.serve.test_equality import call_again

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_norms_and_activations(dtype: torch.dtype) -> None:
    check_norms_and_activations(dtype, CPU)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in BLOCKS), ("plain", torch.float32), ("plain", torch.bfloat16)],
)
def test_a_packed_block(name: str, dtype: torch.dtype) -> None:
    BlockCase(name, dtype, CPU, page_size=3).check()


def test_a_packed_block_as_a_graph() -> None:
    BlockCase("plain", torch.float64, CPU, page_size=3).check_replay(call_again)
