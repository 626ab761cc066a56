"""The estimate of MFU: its parts by hand, and the bytes of eager blocks counted operation by operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamor.bench.cases import case_of_size
from megamor.bench.scaling import estimated_case
from megamor.model import build_model
from megamor.model.flops import nominal_flops
from megamor.plan.estimate import ADAMW_BYTES
from megamor.plan.mfu import BANDWIDTH, EAGER_POINTWISE, GEMM, PEAK, WAYS, block_bytes, expected, seconds

NOT_POINTWISE = ("mm", "bmm", "_scaled_dot_product_flash_attention_for_cpu")
WITHOUT_TRAFFIC = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "split")


class CountBytes(TorchDispatchMode):
    """Bytes that operations other than products and attention read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if not (func.is_view or name in WITHOUT_TRAFFIC or name.removesuffix("_backward") in NOT_POINTWISE):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def eager_bytes(num_layers: int) -> int:
    """Of a forward and a backward pass over 128 tokens in bf16."""
    config = case_of_size("135m", "vanilla", [f"model.num_layers={num_layers}", "model.vocab_size=64"]).config(1)
    model = build_model(config).to(torch.bfloat16)
    ids = torch.zeros(1, 128, dtype=torch.int64)
    with CountBytes() as counted:
        model(ids, ids).loss_sum.backward()
    return counted.bytes


def test_bytes_of_eager_blocks() -> None:
    """A block's are what a third block adds to two. Gradients of weights count as well, and are subtracted."""
    config = case_of_size("135m", "vanilla").config(1)
    counted = eager_bytes(3) - eager_bytes(2)
    ideal = 128 * block_bytes(config, WAYS[2])
    assert counted / ideal == pytest.approx(EAGER_POINTWISE, rel=0.1)


def test_parts_by_hand() -> None:
    config = case_of_size("360m", "vanilla").config(16)
    found = seconds(config, WAYS[3], micro_batch=16, accumulation=4)
    tokens = 4 * 16 * 2048
    assert found["head"] == pytest.approx(3 * 2 * tokens * 960 * 49152 / GEMM)
    assert found["loss"] == pytest.approx(tokens * 49152 * (10 + 12 * 960 / 11008) / BANDWIDTH)
    # norms 10, residuals 12, three gradients of one input and two of another 9, rotations of 20 heads of 64; SwiGLU 8
    row = 2 * ((10 + 12 + 9) * 960 + 4 * 20 * 64 + 8 * 2560)
    assert found["pointwise"] == pytest.approx(32 * tokens * row / BANDWIDTH)
    assert found["routing"] == 0
    (forward, backward), attention = WAYS[3].attention, nominal_flops(config, 64).attention
    assert found["attention"] == pytest.approx(attention / forward + 2 * attention / backward)
    parameters = build_model(config, device="meta").num_parameters()
    assert found["update"] == pytest.approx((ADAMW_BYTES + 12 * 4) * parameters / BANDWIDTH)
    mfu, rate = expected(config, WAYS[3], 16)
    total = sum(found.values())
    assert mfu == pytest.approx(nominal_flops(config, 64).training / total / PEAK)
    assert rate == pytest.approx(tokens / total)


def test_rows_that_a_router_moves() -> None:
    """Those of a recursion that a router selects: gathered, scaled, added and scattered, forward and backward."""
    for name, passes in (("mor3_expert", 1 + 2 / 3 + 1 / 3), ("rec3", 0)):
        config = case_of_size("360m", name).config(16)
        found = seconds(config, WAYS[3], micro_batch=16, accumulation=1)["routing"]
        assert found == pytest.approx(passes * 16 * 2048 * 24 * 960 / BANDWIDTH, rel=1e-3)


def test_each_way_is_faster_than_the_one_before() -> None:
    for size in ("135m", "360m", "1.7b"):
        found = [expected(estimated_case(size, "vanilla"), way, 8)[0] for way in WAYS]
        assert found == sorted(found)
        assert 0.1 < found[0] < found[-1] < 0.66
