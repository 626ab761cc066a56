"""The loss of GPUs without one: its kernel run by Triton's interpreter and compiled, its operations counted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from megamor.config import Config, DataConfig, ModelConfig, TrainConfig
from megamor.config.schema import DistillConfig
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.model import loss as loss_module
from megamor.model.loss import IGNORE, choose_loss, describe_loss, gpu_chunk, linear_cross_entropy, loss_kernels
from megamor.model.loss_kernel import BLOCK, WARPS, in_place_cross_entropy, softmax_row
from megamor.plan.activations import ElementSizes, loss_bytes
from megamor.plan.mfu import FUSED_LOSS, REFERENCE_LOSS
from tests.live_bytes import LiveBytes

VOCAB = 49152
SHAPES = {"135m": (65536, 576), "360m": (32768, 960), "1.7b": (16384, 2048)}
"""Tokens of a micro-batch and width."""


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(which: str) -> None:
    """Run `interpreted_loss.py` in a new process, because `triton.jit` picks the interpreter at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", which]
    command.append(str(Path(__file__).with_name("interpreted_loss.py")))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.parametrize(("name", "vocab", "sm"), [("bf16", VOCAB, 80), ("bf16", VOCAB, 90), ("fp16", 50257, 90)])
def test_compiles(name: str, vocab: int, sm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole 16-byte loads; nothing is spilled by the 1,024 threads; rounded, not truncated, to 16 bits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"ignore": IGNORE, "vocab": vocab, "z_coeff": 1e-4, "gradients": True, "BLOCK": BLOCK}
    constants["SUM"] = tl.float32
    signature = {"logits": f"*{name}", "labels": "*i64", "nll": "*fp32", "z_loss": "*fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(4)}
    source = ASTSource(softmax_row, signature, constants, aligned)
    kernel = compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": WARPS})
    (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(tmp_path / "cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(usage.split("REG:")[1].split()[0])
    assert registers * 32 * WARPS <= 65536
    assert int(usage.split("STACK:")[1].split()[0]) <= 8, "none, but for 8 bytes with Triton 3.7.1"
    assert "LOCAL:0 " in usage
    assert kernel.metadata.shared <= 256
    assert f"cvt.rn.{name.replace('fp', 'f')}" in kernel.asm["ptx"]
    if vocab % 8 == 0:
        assert len(re.findall(r"ld\.global.*v4\.b32", kernel.asm["ptx"])) == 2
        assert not re.search(r"st\.global\S*\.b16", kernel.asm["ptx"]), "single logits are stored"


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that operations read and write, each tensor once per operation: of all, and of logits.

    The kernel's second reading of a row comes from the cache, so it counts as any operation in place.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dim, self.logits, self.all = dim, 0, 0
        self.chunks: list[int] = []
        self.names: list[str] = []

    def note(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.all += tensor.nbytes
            self.logits += tensor.nbytes if VOCAB in tensor.shape and self.dim not in tensor.shape else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or "empty" in str(func):
            return out
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            found = [value for value in tree_leaves(named.get(argument.name)) if isinstance(value, Tensor)]
            if not argument.is_out:
                self.note(*found)
            if argument.is_write:
                self.note(*found)
        if not any(argument.is_write for argument in func._schema.arguments):
            self.note(*(value for value in tree_leaves(out) if isinstance(value, Tensor)))
        self.names.append(str(func))
        if func is torch.ops.megamor.cross_entropy_.default:
            self.chunks.append(len(args[0]))
        return out


def counted(kernel: str, tokens: int, dim: int, gradients: bool = True) -> Traffic:
    """The operations of a loss in bf16 on tensors without values, for which no device is needed."""
    with torch.no_grad():
        hidden, weight = (torch.empty(n, dim, dtype=torch.bfloat16, device="meta") for n in (tokens, VOCAB))
        labels = torch.empty(tokens, dtype=torch.long, device="meta")
        with Traffic(dim) as traffic:
            if kernel == "triton":
                chunk = gpu_chunk(tokens, VOCAB, 2)
                found = in_place_cross_entropy(hidden, weight, labels, chunk, IGNORE, 1e-4, gradients)
                expected = [(), (), (tokens, dim), (VOCAB, dim)] if gradients else [(), (), None, None]
                assert [None if value is None else tuple(value.shape) for value in found] == expected
                types = [torch.float32] * 2 + [torch.bfloat16] * 2
                assert all(value is None or value.dtype == dtype for value, dtype in zip(found, types, strict=True))
            else:
                loss_module._LinearCrossEntropy.forward(FakeContext(), hidden, weight, labels, gradients, 1e-4, None)
    return traffic


class FakeContext:
    """What a function saves for its backward pass is of no interest."""

    def save_for_backward(self, *_: Tensor) -> None: ...
    def mark_non_differentiable(self, *_: Tensor) -> None: ...


@pytest.mark.parametrize("size", SHAPES)
def test_bytes_per_logit(size: str) -> None:
    tokens, dim = SHAPES[size]
    found = counted("triton", tokens, dim)
    assert found.logits / (tokens * VOCAB) == FUSED_LOSS[0] <= 10
    assert found.all / (tokens * VOCAB) < 10 + 26 * dim / found.chunks[0], "with weights, hidden states and sums"
    assert min(found.chunks) >= 8192
    evaluated = counted("triton", tokens, dim, gradients=False)
    assert evaluated.logits / (tokens * VOCAB) == 6
    before = counted("reference", tokens, dim)
    assert before.logits / (tokens * VOCAB) == REFERENCE_LOSS[0]


def test_one_chunk_needs_no_sum() -> None:
    names = counted("triton", 16_384, 576).names
    assert names.count("megamor.cross_entropy_.default") == 1
    assert not any("add" in name or ("zero" in name and "like" in name) for name in names), names
    assert counted("triton", 32_768, 576).names.count("megamor.add_product_.default") == 3


@pytest.mark.parametrize(
    ("rows", "vocab", "element", "chunk"),
    [
        (65536, VOCAB, 2, 11008),
        (16384, VOCAB, 2, 16384),
        (16384, VOCAB, 4, 8192),
        (100, VOCAB, 2, 128),
        (0, VOCAB, 2, 128),
        (32768, 128256, 2, 8192),
        (32768, 128256, 4, 4096),
        (32768, 1 << 32, 4, 128),
    ],
)
def test_chunks(rows: int, vocab: int, element: int, chunk: int) -> None:
    assert gpu_chunk(rows, vocab, element) == chunk


@pytest.mark.parametrize("tokens", [4096, 32768])
def test_the_plan_knows_the_memory(tokens: int) -> None:
    """Gradients and the widest moment, as the plan estimates them and as tensors exist."""
    model = ModelConfig(VOCAB, dim=960, num_layers=2, num_heads=15, num_kv_heads=5, ffn_dim=2560, max_seq_len=2048)
    train = TrainConfig(micro_batch_size=tokens // 2048, global_batch_size=tokens // 2048, max_steps=10)
    config = Config(model=model, data=DataConfig(seq_len=2048), train=train)
    with torch.no_grad():
        hidden, weight = (torch.empty(n, 960, dtype=torch.bfloat16, device="meta") for n in (tokens, VOCAB))
        labels = torch.empty(tokens, dtype=torch.long, device="meta")
        with LiveBytes([]) as live:
            in_place_cross_entropy(hidden, weight, labels, gpu_chunk(tokens, VOCAB, 2), IGNORE, 0.0, gradients=True)
    # The estimate has the norm's input besides; the count has the weight.
    kept, widest = loss_bytes(config, ElementSizes(2, 2, on_gpu=True))
    assert kept + widest - hidden.nbytes == pytest.approx(live.peak - weight.nbytes, rel=0.1)
    teacher = replace(config, distill=DistillConfig(from_="runs/x"))
    assert sum(loss_bytes(teacher, ElementSizes(2, 2, on_gpu=True))) < kept + widest


def test_the_loss_is_chosen_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(device: str, kernel: Any = "auto", teacher: str | None = None) -> str:
        train = TrainConfig(max_steps=10, loss_kernel=kernel)
        config = Config(train=train, distill=DistillConfig(from_=teacher))
        return "".join(describe_loss(config, device, loss_kernels(config, device)[0], "the fastest"))

    assert choose_loss("cuda") == "triton"
    assert choose_loss("cpu") == choose_loss("cuda", distills=True) == "reference"
    assert choose_loss("cuda", "torch") == "torch"
    assert told("cpu") == ""
    assert told("cuda") == "loss: triton (the fastest), 11,008 of 32,768 rows of logits at once"
    assert told("cuda", teacher="runs/x") == "loss: plain operations (with a teacher)"
    assert told("cuda", "reference") == "loss: plain operations (as configured)"
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        told("cpu", "triton")
    monkeypatch.setattr(loss_module, "HAS_TRITON", False)
    assert told("cuda") == "loss: plain operations (the fastest)"
    with pytest.raises(ConfigError, match="cuda without triton"):
        told("cuda", "triton")
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(ConfigError, match=r"needs torch 2\.13"):
        told("cuda", "torch")


def test_contradictions_are_refused() -> None:
    train = TrainConfig(max_steps=10, loss_kernel="torch", z_loss_coeff=1e-4)
    with pytest.raises(ConfigError, match="has no z-loss"):
        validate(Config(train=train))
    train = TrainConfig(max_steps=10, loss_kernel="triton")
    with pytest.raises(ConfigError, match=r"computes no loss of distill\.from"):
        validate(Config(train=train, distill=DistillConfig(from_="runs/x")))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
def test_torchs_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "gpu_chunk", lambda *_: 7)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(50, (30,), generator=generator)
    labels[::5] = IGNORE
    # In bf16 the roundings of two results, of which the reference has the larger ones.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        hidden, weight = (torch.randn(n, 16, generator=generator, dtype=dtype, requires_grad=True) for n in (30, 50))
        results = []
        for kernel in ("reference", "torch"):
            loss, z_loss, _ = linear_cross_entropy(hidden, weight, labels, 0.0, None, kernel)
            assert loss.dtype == z_loss.dtype == torch.float32
            results.append([loss, *torch.autograd.grad(2 * loss, (hidden, weight))])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)
