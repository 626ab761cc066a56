"""The kernels of GPUs without one: run in Triton's interpreter, and compiled to GPU machine code; and what takes them.

The engine runs a whole schedule with them in `interpreted_kernel.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from megamor.load import cast
from megamor.model import build_model
from megamor.serve.engine import attention
from megamor.serve.engine.engine import ServingEngine
from megamor.serve.engine.gpu_kernels import gate_row, norm_row, rotate_and_store
from megamor.serve.engine.packed import PackedBlock, PackedLinear, packed
from megamor.serve.options import EngineOptions
from tests.combinations import ROUTERS, lively_model, tiny_config, tokens
from tests.serve.test_paged_kernel import interpret


def test_interpreted() -> None:
    assert " passed" in interpret("interpreted_blocks.py")


HEADS = {"heads": 15, "kv_heads": 5, "half": 40, "HALF": 64}
KERNELS: list[tuple[Any, tuple[str, ...], dict[str, Any]]] = [
    (norm_row, ("x", "weight", "out"), {"dim": 960, "eps": 1e-5, "BLOCK": 1024}),
    (gate_row, ("gate_up", "out"), {"dim": 2560, "BLOCK": 512}),
    (rotate_and_store, ("qkv", "cos", "signed_sin", "q", "k", "v", "addresses"), {**HEADS, "placed": True}),
    (rotate_and_store, ("qkv", "cos", "signed_sin", "q", "k", "v", "addresses"), {**HEADS, "placed": False}),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "fp64"])
def test_compiles(name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts code that the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide = "fp64" if name == "fp64" else "fp32"
    types = {"cos": f"*{wide}", "signed_sin": f"*{wide}", "addresses": "*i64"}
    for function, pointers, own in KERNELS:
        constants = {**own, "SUM": getattr(tl, f"float{wide[2:]}")}
        signature = {pointer: types.get(pointer, f"*{name}") for pointer in pointers}
        source = ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), constants)
        kernel = compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(kernel.asm["cubin"]) > 1000
        assert f"sm_{capability}" in kernel.asm["ptx"]
        if name != "fp64":
            assert "f64" not in kernel.asm["ptx"]


def test_a_gpu_has_stacked_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN prepacks nothing, the model's projections become parts of the stacks; its logits stay."""
    monkeypatch.setattr(attention, "reads_in_place", lambda device: True)
    model = lively_model(tiny_config(ROUTERS["expert_choice"])).eval()
    ids = tokens(seed=1, batch=1, length=19)
    with torch.no_grad():
        before = model(ids, mode="causal").logits
        other = packed(model)
        torch.testing.assert_close(other(ids, mode="causal").logits, before, rtol=1e-10, atol=1e-10)
        assert torch.equal(model(ids, mode="causal").logits, before)
    products = [module for module in other.modules() if isinstance(module, PackedLinear)]
    mine = {product.weight.untyped_storage().data_ptr() for product in products}
    projections = [value for name, value in model.named_parameters() if "_proj" in name]
    assert {value.untyped_storage().data_ptr() for value in projections} < mine
    block, packed_block = model.prelude[0], other.prelude[0]
    assert isinstance(packed_block, PackedBlock)
    rows = [len(each) for each in (block.attention.q_proj.weight, block.attention.k_proj.weight)]
    assert torch.equal(packed_block.qkv.weight[rows[0] : sum(rows)], block.attention.k_proj.weight)
    assert torch.equal(packed_block.gate_up.weight[-64:], block.ffn.up_proj.weight)


def test_without_triton_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TRITON", False)
    assert not attention.reads_in_place(torch.device("cuda"))
    monkeypatch.setattr(attention, "TRITON", True)
    assert attention.reads_in_place(torch.device("cuda"))
    for name in ("megamor.serve.engine.gpu_kernels", "megamor.serve.engine.paged_kernel"):
        monkeypatch.setitem(sys.modules, name, None)  # an import is an error
    # In place of a GPU: the meta device.
    model = cast(build_model(tiny_config(ROUTERS["token_choice"]), device="meta"), torch.bfloat16)
    engine = ServingEngine(model, EngineOptions(kv_memory=1 << 22))
    assert engine.kernels == "none for meta without Triton"
    assert engine.unpacked is None
    assert isinstance(engine.model.prelude[0], PackedBlock)
    stored = ServingEngine(model, EngineOptions(kv_memory=1 << 22, prepacked=False))
    assert stored.unpacked == stored.kernels == "--no-prepacked"
