"""Cases of the loss's kernel for Triton's interpreter, which runs it on a CPU; `test_loss_kernel.py` starts them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.model import loss as loss_module
from megamor.model import loss_kernel as loss_kernel
from megamor.model import transformer
from megamor.model.loss import IGNORE, linear_cross_entropy
from tests.combinations import ROUTERS, lively_model, tiny_config, tokens


@pytest.fixture(autouse=True)
def blocks_of_32_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_kernel, "BLOCK", 32)


@loss_kernel.add_product_.register_kernel("cpu")
def _(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """What cuBLAS does: products of 16 bits, sums in fp32."""
    assert total.dtype == torch.promote_types(left.dtype, torch.float32)
    total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=0 if first else 1)


def losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_coeff: float, kernel: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses, and three times their gradients, as if the loss had a weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, z_loss, _ = linear_cross_entropy(hidden, weight, labels, z_coeff, None, kernel)
    grad_hidden, grad_weight = torch.autograd.grad(3 * loss, (hidden, weight))
    return loss, z_loss, grad_hidden, grad_weight


def exact(logits: Tensor, labels: Tensor, z_coeff: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies and z-losses of the rows, and the gradient of all of them at the logits, in fp64."""
    logits = logits.double().requires_grad_()
    nll = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    z_loss = z_coeff * logits.logsumexp(1).square() * (labels != IGNORE)
    (gradient,) = torch.autograd.grad((nll + z_loss).sum(), logits)
    return nll.detach(), z_loss.detach(), gradient


def run(logits: Tensor, labels: Tensor, z_coeff: float, gradients: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the kernel."""
    nll, z_loss = torch.empty(2, len(logits), dtype=torch.promote_types(logits.dtype, torch.float32)).unbind()
    logits = logits.clone()
    loss_kernel.cross_entropy_(logits, labels, nll, z_loss, IGNORE, z_coeff, gradients)
    return nll, z_loss, logits


def some_labels(rows: int, vocab: int) -> Tensor:
    """Both ends of the vocabulary, one ignored row, and anything."""
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    labels[0], labels[-1] = 0, vocab - 1
    if rows > 4:
        labels[2] = IGNORE
    return labels


@pytest.mark.parametrize("z_coeff", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 100), (5, 31), (5, 32), (6, 33), (5, 161)])
def test_rows_of_every_shape(rows: int, vocab: int, z_coeff: float) -> None:
    """Of fp64; of fp32 within its rounding; of 16 bits within one rounding, which is that of the gradient.

    The interpreter truncates to bf16, an error of up to 2⁻⁷; compiled code rounds, see `test_compiles`.
    """
    base = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab), dtype=torch.float64)
    labels = some_labels(rows, vocab)
    for dtype, rounding, least in (
        (torch.float64, 0.0, 0.0),
        (torch.float32, 2.0**-24, 0.0),
        (torch.bfloat16, 2.0**-7, 0.0),
        (torch.float16, 2.0**-11, 2.0**-25),  # half of the smallest subnormal
    ):
        logits = base.to(dtype)
        nll, z_loss, gradient = run(logits, labels, z_coeff)
        wanted_nll, wanted_z, wanted = exact(logits, labels, z_coeff)
        # The softmax is computed in fp32, whose error of log Z (about 10) is 10 · 2⁻²⁴ in the exponent.
        inner = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(nll.double(), wanted_nll, rtol=inner, atol=inner)
        torch.testing.assert_close(z_loss.double(), wanted_z, rtol=2 * inner, atol=inner)
        bound = (rounding + 10 * inner) * wanted.abs() + least + inner
        assert ((gradient.double() - wanted).abs() <= bound).all(), dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Rows: huge, tiny, one huge at the end or start, one excluded, equal ones, and with a difference of 2e4."""
    logits = torch.zeros(7, 70, dtype=dtype)
    logits[0], logits[1], logits[2, -1], logits[3, 0] = 1e4, -1e4, 1e4, 1e4
    logits[4, 40] = -torch.inf
    logits[6, 35:] = -1e4
    logits[6, :35] = 1e4
    labels = torch.tensor([3, 69, 69, 1, 0, 5, 60])
    nll, z_loss, gradient = run(logits, labels, 1e-4)
    wanted_nll, wanted_z, wanted = exact(logits, labels, 1e-4)
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=1e-6, atol=1e-3)  # 1e-3: an ulp of 1e4 in fp32
    torch.testing.assert_close(z_loss.double(), wanted_z, rtol=1e-6, atol=1e-6)
    # An ulp of log Z is an error of 1e-3 of the softmax; the rest is the truncation of the interpreter.
    torch.testing.assert_close(gradient.double(), wanted, rtol=2**-7, atol=2e-3)
    assert nll[2] == 0
    assert nll[3] == logits[3, 0]


def test_rows_that_nothing_should_be_learned_from() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    logits[0, 3], logits[1, 5], logits[2, 7], logits[3, 39] = torch.nan, torch.inf, torch.nan, torch.nan
    nll, _, gradient = run(logits, torch.tensor([IGNORE, 0, 0, 39, 40, -1]), 0.1)
    assert nll[0] == 0
    assert not gradient[0].any(), "an ignored row has no gradient whatever it holds"
    assert not nll[1:].isfinite().any(), "infinities, NaN and labels outside the vocabulary must reach the loss"
    labels = torch.full((6,), IGNORE)
    for gradients in (True, False):
        nll, z_loss, gradient = run(logits, labels, 0.1, gradients)
        assert not nll.any()
        assert not z_loss.any()
        torch.testing.assert_close(gradient, torch.zeros(6, 40) if gradients else logits, equal_nan=True)
    nll, _, gradient = run(logits[4:], some_labels(2, 40), 0.0, gradients=False)
    torch.testing.assert_close(nll.double(), exact(logits[4:], some_labels(2, 40), 0.0)[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(gradient, logits[4:]), "evaluation leaves the logits alone"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [100, 13, 5, 1])
def test_the_whole_loss_equals_the_reference(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 and fp32; in bf16 against fp64 products of the same logits, within the roundings of the two results."""
    monkeypatch.setattr(loss_module, "gpu_chunk", lambda *_: chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64).to(dtype) for n in (13, 70))
    labels = some_labels(13, 70)
    found = losses(hidden, weight, labels, 0.1, "triton")
    assert [value.dtype for value in found] == [torch.promote_types(dtype, torch.float32)] * 2 + [dtype] * 2
    if dtype != torch.bfloat16:
        inner = 1e-13 if dtype == torch.float64 else 2e-6
        for ours, theirs in zip(found, losses(hidden, weight, labels, 0.1, "reference"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=inner, atol=10 * inner)
        return
    nll, z_loss, gradient = exact(F.linear(hidden, weight), labels, 0.1)
    torch.testing.assert_close(found[0].double(), nll.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), z_loss.sum(), rtol=1e-6, atol=0)
    for ours, left, right in ((found[2], gradient, weight), (found[3], gradient.t(), hidden)):
        # 2⁻⁷ for the gradient at the logits, which is truncated here; 2⁻⁸ for the product, and for the product times 3.
        bound = (2 * 2**-7 + 1e-4) * 3 * (left.abs() @ right.double().abs())
        assert ((ours.double() - 3 * left @ right.double()).abs() <= bound).all()


def test_the_weight_gradient_of_many_chunks_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """3/4 of 2048 + 8 · 1: in fp16 each of the ones would add 1 to the sum."""
    monkeypatch.setattr(loss_module, "gpu_chunk", lambda *_: 1)
    hidden, weight = torch.ones(9, 2).half(), torch.zeros(4, 2).half().requires_grad_()
    hidden[0] = 2048
    loss, *_ = linear_cross_entropy(hidden, weight, torch.ones(9, dtype=torch.long), 0.0, None, "triton")
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient[1].tolist() == [-1542, -1542]


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_predict(rows: int) -> None:
    hidden, weight, labels = torch.randn(rows, 8), torch.randn(40, 8), torch.full((rows,), IGNORE)
    for value in losses(hidden, weight, labels, 0.1, "triton"):
        assert not value.any()


@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_trains_as_with_the_reference(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tied heads, alone and under autocast, whose weights are in fp32."""
    found = []
    for kernel in ("reference", "triton"):
        monkeypatch.setattr(transformer, "choose_loss", lambda *_, kernel=kernel: kernel)
        model, ids = lively_model(tiny_config(ROUTERS["expert_choice"])), tokens(batch=1, length=16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(ids, ids.roll(1, 1))
        (out.loss_sum / 100).backward()
        found.append([out.loss_sum.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6)


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    labels, results = some_labels(6, 40), []
    for function in (linear_cross_entropy, torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)):
        loss, *_ = function(hidden, weight, labels, 0.1, None, "triton")
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
