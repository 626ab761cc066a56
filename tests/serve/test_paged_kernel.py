"""The paged kernel without a GPU: run in Triton's interpreter, and compiled to GPU machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from megamor.serve.engine.paged_kernel import attend_rows, combine_splits

POINTERS, SIZES = ("q", "k", "v", "out"), {"kv_heads": 5, "num_queries": 3, "head_dim": 64, "page_size": 16}


def test_interpreted() -> None:
    assert " passed" in interpret("interpreted_kernel.py")


def interpret(name: str) -> str:
    """Run the cases of the file `name` in a new process, because `triton.jit` picks the interpreter at import.

    None may fail or be skipped; returns what pytest says.

    Before 3.7 the interpreter needs a NumPy before 2.4.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    cases = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout
    return result.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "total", "slides", "splits", "rows"),
    [
        ("bf16", tl.float32, True, 8, 1),
        ("bf16", tl.float32, True, 1, 16),
        ("fp16", tl.float32, False, 4, 16),
        ("fp32", tl.float32, False, 1, 1),
        ("fp64", tl.float64, True, 2, 1),
    ],
)
def test_compiles(
    name: str,
    total: tl.dtype,
    slides: bool,
    splits: int,
    rows: int,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter accepts code that the compiler refuses. In 16 bits, the products are those of tensor cores."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    matrix, sums = name in ("bf16", "fp16"), "*fp64" if name == "fp64" else "*fp32"
    constants = {
        **SIZES,
        **({"QUERIES": 64 if rows > 1 else 16, "ENTRIES": 64} if matrix else {"QUERIES": 4, "ENTRIES": 16}),
        "ROWS": rows,
        "DIMS": 64,
        "SPLITS": splits,
        "MATRIX": matrix,
        "FACTOR": tl.float16 if name == "fp16" else tl.bfloat16,
        "SUM": total,
        "slides": slides,
    }
    signature = {
        **dict.fromkeys(POINTERS, f"*{name}"),
        **({"out": sums} if splits > 1 else {}),
        "sums": sums,
        "tables": "*i32",
        **dict.fromkeys(("owners", "ends", "begins", "starts"), "*i64"),
        **dict.fromkeys(("table_stride", "page_stride"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    target = GPUTarget("cuda", capability, 32)
    kernel = compile(ASTSource(attend_rows, signature, constants), target=target)
    assert len(kernel.asm["cubin"]) > 1000
    assert f"sm_{capability}" in kernel.asm["ptx"]
    assert ("mma" in kernel.asm["ptx"]) == (name in ("bf16", "fp16"))
    if splits > 1:
        own = {"head_dim": 64, "DIMS": 64, "SPLITS": splits}
        pointers = {"parts": sums, "sums": sums, "out": f"*{name}"}
        source = ASTSource(combine_splits, pointers | dict.fromkeys(own, "constexpr"), own)
        assert len(compile(source, target=target).asm["cubin"]) > 1000
