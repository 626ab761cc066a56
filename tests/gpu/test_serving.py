"""Serving on a GPU: the paged kernel gives what gathered pages give, and graphs replay what the reference says;
`python -m pytest tests/gpu`."""

from __future__ import annotations

import pytest
import torch

from megamor.model.attention import has_packed_kernel
from megamor.serve.paged_attention import PAGE_MULTIPLE, KernelLayout, PagedLayout, Reading
from megamor.serve.scheduler import POLICIES
from tests.combinations import ROUTERS, lively_model, tiny_config
from tests.serve.test_equality import SERVED, Schedule, check, expected

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_the_kernel_reads_pages(kv_heads: int) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    assert has_packed_kernel(device, dtype, 64)
    generator = torch.Generator(device).manual_seed(0)
    readings = [Reading([3, 1], [300]), Reading([5, 0], list(range(250, 260))), Reading([2], [7, 9, 200])]
    q = torch.randn(14, 6, 64, generator=generator, device=device, dtype=dtype)
    k, v = (torch.randn(6, PAGE_MULTIPLE, kv_heads, 64, generator=generator, device=device, dtype=dtype) for _ in "kv")
    found = KernelLayout.of(readings, PAGE_MULTIPLE, device).attend(q, k, v)
    wanted = PagedLayout.of(readings, PAGE_MULTIPLE, dtype, device).attend(q, k, v)
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kv_policy", SERVED)
def test_graphs_answer_as_the_reference(kv_policy: str) -> None:
    model = lively_model(tiny_config(ROUTERS["token_choice"], kv_policy, "middle_cycle")).eval()
    wanted = expected(model)
    model.to("cuda")
    for policy in POLICIES:
        engine = check(model, Schedule(policy, 3, 4), wanted)
        assert engine.runner.graphs is not None
        assert engine.runner.graphs.recorded
