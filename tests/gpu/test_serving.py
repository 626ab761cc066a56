"""Serving on a GPU: kernels agree with gathered pages and with blocks, and replayed graphs with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megamor.serve.engine.attention import GatherLayout, fixed_layout
from megamor.serve.engine.gpu_kernels import GpuKernels
from megamor.serve.engine.graphs import cuda_recorder
from megamor.serve.options import POLICIES
from tests.combinations import ROUTERS, lively_model, tiny_config
from tests.serve.gpu_blocks import BLOCKS, EXACT, BlockCase, check_norms_and_activations
from tests.serve.test_equality import SERVED, Schedule, check, expected

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
def test_the_kernel_reads_pages(dtype: torch.dtype, tolerance: float, kv_heads: int, page_size: int) -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    pages = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    tables = np.array(pages, np.int32).reshape(3, 20)
    rows = np.array([[0] + [1] * 10 + [2] * 3, [300, *range(250, 260), 7, 9, 200]])
    q = torch.randn(14, 6, 64, generator=generator, device=device, dtype=dtype)
    k, v = (torch.randn(60, page_size, kv_heads, 64, generator=generator, device=device, dtype=dtype) for _ in "kv")
    found = fixed_layout(*(torch.from_numpy(n).to(device) for n in (tables, *rows)), size=page_size, dtype=dtype)
    wanted = GatherLayout.of(tables, *rows, size=page_size, dtype=dtype, device=device).attend(q, k, v)
    torch.testing.assert_close(found.attend(q, k, v), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_norms_and_activations(dtype: torch.dtype) -> None:
    check_norms_and_activations(dtype, torch.device("cuda"))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_packed_block(name: str, dtype: torch.dtype) -> None:
    BlockCase(name, dtype, torch.device("cuda")).check()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_a_packed_block_as_a_graph(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    BlockCase("plain", dtype, device).check_replay(cuda_recorder(device))


@pytest.mark.parametrize("kv_policy", SERVED)
def test_graphs_answer_as_the_reference(kv_policy: str) -> None:
    model = lively_model(tiny_config(ROUTERS["token_choice"], kv_policy, "middle_cycle")).eval()
    wanted = expected(model)
    model.to("cuda")
    for policy in POLICIES:
        engine = check(model, Schedule(policy, 3, 4), wanted)
        assert isinstance(engine.kernels, GpuKernels)
        assert engine.runner.graphs is not None
        assert engine.runner.graphs.recorded
