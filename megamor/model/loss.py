"""Linear projection and cross-entropy in one, chunk by chunk.

The logits of a 49k vocabulary are the largest tensor of a training step. Here they exist for one chunk of tokens at a
time: the forward pass computes the chunk's loss and, if gradients are wanted, its gradients as well. Nothing is
recomputed and no logits are kept.

Which code does it is decided by `loss_kernels` and, between several, by a measurement (`train/loss_choice.py`): plain
operations, which are the reference for the others and the only ones for CPUs and distillation; a Triton kernel on GPUs
(`loss_kernel.py`); or torch's own function.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import Config
from megamor.errors import ConfigError

IGNORE = -100
HAS_TRITON = find_spec("triton") is not None
CHUNK_ELEMENTS = 1 << 25
"""Most logits in memory at once (128 MiB in fp32) where plain operations pass over them."""
GPU_ROWS, GPU_BYTES = 8192, 1 << 30


def gpu_chunk(rows: int, vocab: int, element: int) -> int:
    """How many of `rows` rows of logits, each `element` bytes, are in memory at once on a GPU, in chunks of equal size.

    Between 1 and 2 GiB, and 8,192 rows or more where these fit into 2 GiB: each chunk reads and writes the [vocab, dim]
    sum of the weight's gradient, 8 · dim / chunk bytes a logit. A multiple of 128, the rows of a product's tile.
    """
    most = 2 * GPU_BYTES // (vocab * element)
    chunks = max(1, rows // min(max(GPU_ROWS, most // 2), max(1, most)), -(-rows // max(1, most)))
    return max(128, -(-rows // chunks // 128) * 128)


def choose_loss(device: str, wanted: str = "auto", distills: bool = False) -> str:
    """`reference`, `triton` or `torch`: what computes the loss on this type of device under `train.loss_kernel`."""
    if wanted != "auto":
        return wanted
    return "triton" if device == "cuda" and HAS_TRITON and not distills else "reference"


def loss_kernels(config: Config, device: str) -> list[str]:
    """What may compute the loss of a run on this type of device, the preferred first.

    Raises:
        ConfigError: this machine doesn't have what `train.loss_kernel` wants.
    """
    wanted, distills = config.train.loss_kernel, config.distill.from_ is not None
    if wanted == "triton" and not (device == "cuda" and HAS_TRITON):
        found = f"{device} {'with' if HAS_TRITON else 'without'} triton"
        raise ConfigError(f"train.loss_kernel = triton needs a CUDA device and the package, here is {found}: use auto")
    has_torchs = hasattr(F, "linear_cross_entropy")
    if wanted == "torch" and not has_torchs:
        raise ConfigError(f"train.loss_kernel = torch needs torch 2.13, this is {torch.__version__}: use auto")
    others = has_torchs and wanted == "auto" and device == "cuda" and not distills and not config.train.z_loss_coeff
    return [choose_loss(device, wanted, distills), *(["torch"] if others else [])]


def logits_at_once(config: Config) -> int:
    """Rows of logits of a run that are in memory at once on a GPU."""
    rows, element = config.train.micro_batch_size * config.data.seq_len, 2 if config.train.precision == "bf16" else 4
    return min(rows, gpu_chunk(rows, config.model.vocab_size, element))


def describe_loss(config: Config, device: str, kernel: str, why: str) -> list[str]:
    """That `kernel` computes the loss of a run, and why, in a line if there was a choice."""
    if config.train.loss_kernel != "auto":
        why = "as configured"
    elif device == "cpu":
        return []
    elif config.distill.from_ is not None:
        why = "with a teacher"
    if kernel == "reference":
        return [f"loss: plain operations ({why})"]
    rows = config.train.micro_batch_size * config.data.seq_len
    return [f"loss: {kernel} ({why}), {logits_at_once(config):,} of {rows:,} rows of logits at once"]


@dataclass(frozen=True)
class Teacher:
    """Predictions to learn from: `hidden` [N, its dim] times `weight` [vocab, its dim] are the logits of each token.

    The loss has the factor `coeff`; for the rest see `DistillConfig`. Not a tuple: backends cast and
    copy tensors that they find in a model's arguments.
    """

    hidden: Tensor
    weight: Tensor
    coeff: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None

    def divergence(self, rows: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) [n] in nats where the student predicts `log_q` [n, vocab], and the distribution
        [n, vocab] by which its gradient at the student's logits, times the temperature, is exp(log_q) minus it.

        With `top_k`, all other tokens are one class. Its probability in the target is divided among them as the student
        divides its own, so that only the class as a whole is drawn to the teacher's.
        """
        logits = F.linear(self.hidden[rows], self.weight).to(log_q.dtype) / self.temperature
        log_p = logits.sub_(logits.logsumexp(1, keepdim=True))
        if self.top_k is None:
            target = log_p.exp()
            return (target * (log_p - log_q)).sum(1), target
        log_top, top = log_p.topk(self.top_k, dim=1)
        rest_p = log_p.scatter_(1, top, -torch.inf).logsumexp(1, keepdim=True)
        log_other = log_q.scatter(1, top, -torch.inf)
        rest_q = log_other.logsumexp(1, keepdim=True)
        found = (log_top.exp() * (log_top - log_q.gather(1, top))).sum(1) + (rest_p.exp() * (rest_p - rest_q))[:, 0]
        return found, log_other.add_(rest_p - rest_q).exp_().scatter_(1, top, log_top.exp())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        want_gradients: bool,
        z_coeff: float,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        z_loss, distill_loss = torch.zeros_like(loss), torch.zeros_like(loss)
        grad_hidden = torch.empty_like(hidden) if want_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=loss.dtype) if want_gradients else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight).to(loss.dtype)
            valid = labels[rows] != IGNORE
            target = labels[rows].clamp_min(0).unsqueeze(1)
            log_z = logits.logsumexp(1)
            loss += ((log_z - logits.gather(1, target).squeeze(1)) * valid).sum()
            if z_coeff:
                z_loss += z_coeff * (log_z.square() * valid).sum()
            if teacher is not None:
                softened = (logits / teacher.temperature).log_softmax(1)
                divergence, target_p = teacher.divergence(rows, softened)
                distill_loss += teacher.coeff * teacher.temperature**2 * (divergence * valid).sum()
                # One T of the factor T² is cancelled by that in softmax(logits / T).
                learned = softened.exp_().sub_(target_p).mul_(teacher.coeff * teacher.temperature)
            if grad_hidden is not None and grad_weight is not None:
                # d loss / d logits = softmax - one_hot(target), computed in the memory of the logits.
                grad = logits.sub_(log_z.unsqueeze(1)).exp_()
                if z_coeff:  # d log_z² / d logits = 2 · log_z · softmax
                    grad.mul_((1 + 2 * z_coeff * log_z).unsqueeze(1))
                grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
                if teacher is not None:
                    grad += learned
                grad = grad.mul_(valid.unsqueeze(1)).to(hidden.dtype)
                grad_hidden[rows] = grad @ weight
                grad_weight += grad.t() @ hidden[rows]
        # grad_weight is summed over the chunks in fp32 and rounded once: in bf16 late chunks would vanish in the sum.
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(z_loss, distill_loss)
        return loss, z_loss, distill_loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The gradients were computed for a loss with gradient 1, so the one that arrives is a common factor.
        scale = grads[0]
        own = grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale.to(grad_weight.dtype)
        return *own, None, None, None, None


class _InPlaceCrossEntropy(_LinearCrossEntropy):
    """The same with the kernel. Logits have the type of `hidden`, also in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        want_gradients: bool,
        z_coeff: float,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from megamor.model.loss_kernel import in_place_cross_entropy  # Triton may be missing where it isn't used

        assert teacher is None
        chunk = gpu_chunk(len(hidden), len(weight), hidden.element_size())
        loss, z_loss, grad_hidden, grad_weight = in_place_cross_entropy(
            hidden, weight, labels, chunk, IGNORE, z_coeff, want_gradients
        )
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        distill_loss = torch.zeros_like(loss)
        ctx.mark_non_differentiable(z_loss, distill_loss)
        return loss, z_loss, distill_loss


def _torch_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with torch's function, which rounds the loss to the type of `hidden` and has no z-loss."""
    chunk = gpu_chunk(len(hidden), len(weight), hidden.element_size())
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # By default it would compute the softmax, and sum over rows, in the type of `hidden`.
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=chunk, chunking_method=None, acc_policy="balanced", acc_dtype=wide
    )
    loss = F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=IGNORE, options=options)
    zero = torch.zeros_like(loss, dtype=wide)
    return loss.to(wide), zero, zero


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_coeff: float = 0.0,
    teacher: Teacher | None = None,
    kernel: str = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy of the logits hidden · weightᵀ, their summed z-loss, and the loss that a teacher adds.

    The z-loss is z_coeff · logsumexp(logits)² (PaLM, arXiv 2204.02311, section 5); the last is coeff · temperature² ·
    KL(teacher || student) (arXiv 1503.02531). They cost no second pass of the student: the first result is the
    cross-entropy alone, but its gradient is that of all three; the others have none.

    hidden [N, dim], weight [vocab, dim], labels [N] with -100 at positions to ignore; returns scalars in fp32 (in fp64
    for fp64 inputs). Products run in the type of `hidden` (or autocast's), the softmax in the type of the result.
    `kernel` is a result of `choose_loss`.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    want_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        weight = weight.to(hidden.dtype)
        if kernel == "torch":
            return _torch_cross_entropy(hidden, weight, labels)
        function = _InPlaceCrossEntropy if kernel == "triton" else _LinearCrossEntropy
        losses: tuple[Tensor, Tensor, Tensor] = function.apply(  # type: ignore[no-untyped-call]
            hidden, weight, labels, want_gradients, z_coeff, teacher
        )
        return losses


class TokenScores(NamedTuple):
    """How well each token was predicted; zero where its label is `IGNORE`.

    `nll` is its negative log-likelihood in nats, `entropy` that of the prediction in nats, and `correct` whether it was
    the likeliest one.
    """

    nll: Tensor
    entropy: Tensor
    correct: Tensor


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenScores:
    """Scores [N] of `labels` [N] under the logits of `hidden` [N, dim] and `weight` [vocab, dim].

    The sum of `nll` is the first result of `linear_cross_entropy`, with the same types.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (hidden, weight))
    found = []
    with torch.autocast(device, enabled=False):
        weight = weight.to(hidden.dtype)
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for rows, targets in zip(torch.split(hidden, size), torch.split(labels, size), strict=True):
            logits = F.linear(rows, weight).to(torch.promote_types(rows.dtype, torch.float32))
            log_p, valid = logits.log_softmax(1), targets != IGNORE
            nll = -log_p.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
            entropy = -(log_p.exp() * log_p).sum(1)
            found.append((nll * valid, entropy * valid, (logits.argmax(1) == targets) & valid))
    return TokenScores(*map(torch.cat, zip(*found, strict=True)))
