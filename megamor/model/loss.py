"""Linear projection and cross-entropy in one, chunk by chunk.

The logits of a 49k vocabulary are the largest tensor of a training step. Here they exist for one chunk of tokens at a
time: the forward pass computes the chunk's loss and, if gradients are wanted, its gradients as well. Nothing is
recomputed and no logits are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
CHUNK_ELEMENTS = 1 << 25
"""Most logits in memory at once (128 MiB in fp32)."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, want_gradients: bool, z_coeff: float
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        z_loss = torch.zeros_like(loss)
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
            if grad_hidden is not None and grad_weight is not None:
                # d loss / d logits = softmax - one_hot(target), computed in the memory of the logits.
                grad = logits.sub_(log_z.unsqueeze(1)).exp_()
                if z_coeff:  # d log_z² / d logits = 2 · log_z · softmax
                    grad.mul_((1 + 2 * z_coeff * log_z).unsqueeze(1))
                grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
                grad = grad.mul_(valid.unsqueeze(1)).to(hidden.dtype)
                grad_hidden[rows] = grad @ weight
                grad_weight += grad.t() @ hidden[rows]
        # grad_weight is summed over the chunks in fp32 and rounded once: in bf16 late chunks would vanish in the sum.
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The gradients were computed for a loss with gradient 1, so the one that arrives is a common factor.
        scale = grads[0]
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale.to(grad_weight.dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, z_coeff: float = 0.0) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the logits hidden · weightᵀ, and their summed z-loss.

    The z-loss is z_coeff · logsumexp(logits)² (PaLM, arXiv 2204.02311, section 5). It costs no second pass: the first
    result is the cross-entropy alone, but its gradient is that of both; the second has none.

    hidden [N, dim], weight [vocab, dim], labels [N] with -100 at positions to ignore; returns scalars in fp32 (in fp64
    for fp64 inputs). Products run in the type of `hidden` (or autocast's), the softmax in the type of the result.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    want_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        weight = weight.to(hidden.dtype)
        losses: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(hidden, weight, labels, want_gradients, z_coeff)  # type: ignore[no-untyped-call]
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
