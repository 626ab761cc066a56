"""Cases of the paged kernel for Triton's interpreter, which runs it on a CPU; `test_paged_kernel.py` starts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.bench.gpu_check import paged
from megamor.serve.engine import attention
from megamor.serve.engine.attention import CHUNK_ROWS, GatherLayout, KernelLayout, chunk_starts
from megamor.serve.engine.gpu_kernels import GpuKernels
from megamor.serve.engine.packed import PackedBlock
from megamor.serve.engine.paged_kernel import paged_attention
from tests.combinations import ROUTERS, lively_model, tiny_config
from tests.serve.test_equality import Schedule, check, expected

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6}


def by_row(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, owners: list[int], ends: list[int], begins: list[int]
) -> Tensor:
    """Paged attention row by row, in fp64."""
    outs = []
    for row, (owner, begin, end) in enumerate(zip(owners, begins, ends, strict=True)):
        keys, values = (pages[tables[owner]].flatten(0, 1)[begin:end].transpose(0, 1).double() for pages in (k, v))
        query = q[row].unsqueeze(1).double()
        outs.append(F.scaled_dot_product_attention(query, keys, values, enable_gqa=True).squeeze(1))
    return torch.stack(outs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"), [(6, 2, 8, 4), (15, 5, 64, 16), (3, 3, 80, 3), (8, 1, 64, 256)]
)
def test_rows_of_every_shape(heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(heads)
    k, v = (torch.randn(20, page_size, kv_heads, head_dim, generator=generator).to(dtype) for _ in "kv")
    q = torch.randn(7, heads, head_dim, generator=generator).to(dtype)
    tables = torch.stack([torch.randperm(20, generator=generator)[:3] for _ in range(4)])
    owners, ends = [0, 0, 0, 1, 2, 3, 3], [1, 2, 2 * page_size, 3 * page_size, page_size + 1, 3, page_size - 1]
    wanted = by_row(q, k, v, tables, owners, ends, [0] * 7)
    # One split; with few products, as many as the shapes suggest, and more than a text has blocks of entries.
    few = head_dim == 8
    for layout, splits in ((tables.int(), None if few else 1), (tables.T.contiguous().T, 8 if few else 1)):
        found = paged_attention(q, k, v, layout, torch.tensor(owners), torch.tensor(ends), None, splits)
        torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=0)
    starts = torch.from_numpy(chunk_starts(np.array(owners), 2))
    assert starts.tolist() == [0, 2, 3, 4, 5, 7]
    found = paged_attention(q, k, v, tables, torch.tensor(owners), torch.tensor(ends), None, 2, starts)
    torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=0)
    begins = [0, 1, page_size, 2 * page_size + 1, 2, 1, 0]  # of sliding windows
    wanted = by_row(q, k, v, tables, owners, ends, begins)
    rows = torch.tensor(owners), torch.tensor(ends), torch.tensor(begins)
    found = paged_attention(q, k, v, tables, rows[0], rows[1], rows[2], 1, starts)
    torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=0)
    found = paged_attention(q, k, v, tables, rows[0], rows[1], rows[2], 4 if page_size > 16 else 2)
    torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nan_that_no_row_sees(dtype: torch.dtype) -> None:
    """In the rest of a page, in pages that a table still names, and in page 0, which hidden lanes may read."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.full((20, 16, 2, 8), torch.nan, dtype=dtype) for _ in "kv")
    tables = torch.arange(1, 13).view(4, 3)
    owners, ends = [0, 0, 1, 2, 3], [16, 17, 1, 45, 32]
    for owner, end in zip(owners, ends, strict=True):
        entries = torch.arange(end)
        for pages in (k, v):
            fresh = torch.randn(end, 2, 8, generator=generator).to(dtype)
            pages[tables[owner, entries // 16], entries % 16] = fresh
    q = torch.randn(5, 6, 8, generator=generator).to(dtype)
    begins = [3, 3, 0, 30, 0]
    for since in (None, torch.tensor(begins)):
        wanted = by_row(q, k, v, tables, owners, ends, begins if since is not None else [0] * 5)
        assert wanted.isfinite().all()
        for splits, starts in ((1, None), (4, None), (2, torch.tensor([0, 2, 3, 4, 5]))):
            rows = torch.tensor(owners), torch.tensor(ends), since
            found = paged_attention(q, k, v, tables, *rows, splits, starts)
            torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_chunks_of_prompts_beside_decoding(window: int | None) -> None:
    """Texts of 37, 1, 16 and 1 rows, whose tensors are read as a batch of a GPU would be."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(20, 16, 2, 8, generator=generator, dtype=torch.float64) for _ in "kv")
    tables = torch.randperm(20, generator=generator).view(4, 5).int()
    owners = [0] * 37 + [1] + [2] * 16 + [3]
    ends = [*range(4, 41), 70, *range(60, 76), 1]
    q = torch.randn(len(owners), 6, 8, generator=generator, dtype=torch.float64)
    begins = [max(0, end - window) if window else 0 for end in ends]
    starts = chunk_starts(np.array(owners), CHUNK_ROWS)
    assert starts is not None
    assert starts.tolist() == [0, 16, 32, 37, 38, 54, 55]
    own, until, since, where = (torch.tensor(numbers) for numbers in (owners, ends, begins, starts))
    found = KernelLayout(tables, own, until, since if window else None, where).attend(q, k, v)
    wanted = by_row(q, k, v, tables, owners, ends, begins).flatten(1)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)


def test_the_check_of_a_new_machine() -> None:
    assert paged(CPU).startswith("error ")


def test_layouts_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = np.array([[3, 0, 0], [5, 1, 7], [0, 9, 4]], np.int32)
    rows = np.array([[0, 1, 1, 1, 2, 2, 2], [2, 9, 10, 11, 3, 7, 12], [1, 4, 4, 9, 0, 2, 7]])
    q = torch.randn(7, 6, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(13, 4, 2, 8, generator=generator, dtype=torch.float64) for _ in "kv")
    for columns in (rows[:2], rows):
        wanted = GatherLayout.of(tables, *columns, size=4, dtype=torch.float64, device=CPU).attend(q, k, v)
        found = KernelLayout(*(torch.from_numpy(numbers) for numbers in (tables, *columns))).attend(q, k, v)
        torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("kv_policy", "recorded"), [("recursion_wise", False), ("share_first", True)], ids=["alone", "as a graph"]
)
def test_the_engine_answers_as_the_reference(kv_policy: str, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole schedule, batch by batch and through the buffers of CUDA graphs, with the packed blocks of a GPU."""
    calls = list[int]()

    def counted(layout: KernelLayout, *tensors: Tensor) -> Tensor:
        calls.append(len(layout.ends))
        return original(layout, *tensors)

    original = KernelLayout.attend
    monkeypatch.setattr(KernelLayout, "attend", counted)
    monkeypatch.setattr(attention, "reads_in_place", lambda device: True)
    model = lively_model(tiny_config(ROUTERS["token_choice"], kv_policy, "middle_cycle")).eval()
    engine = check(model, Schedule("depthwise", 3, 4, recorded=recorded), expected(model))
    assert isinstance(engine.kernels, GpuKernels)
    assert any(isinstance(module, PackedBlock) for module in engine.model.modules())
    assert max(calls) > 4
    assert min(calls) == 1
