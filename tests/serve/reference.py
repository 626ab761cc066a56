"""The naive reference: one sequence, a full forward pass for every token, sampling in Python floats."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamor.model import Transformer
from megamor.routing import DepthBounds
from megamor.serve.engine.request import SamplingParams

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Answer:
    """Tokens, the depth of the token before each, and log-probabilities (of the prompt: from its second token on)."""

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float, ...]


def forward(model: Transformer, tokens: Sequence[int], max_depth: int | None) -> tuple[list[list[float]], list[int]]:
    """Logits and depths at every position, under the inference rule."""
    bounds = None
    if max_depth is not None:
        least = torch.zeros(len(tokens), dtype=torch.int64)
        bounds = DepthBounds(least, torch.full_like(least, max_depth))
    with torch.no_grad():
        out = model(torch.tensor([list(tokens)]), mode="causal", bounds=bounds)
    return out.logits[0].tolist(), [0] * len(tokens) if out.depth is None else out.depth[0].tolist()


def replayed_logprobs(model: Transformer, tokens: Sequence[int], depths: Sequence[int]) -> list[list[float]]:
    """Log-probabilities of all tokens after each of `tokens`, which take exactly these `depths`."""
    exact = torch.tensor(list(depths))
    with torch.no_grad():
        out = model(torch.tensor([list(tokens)]), mode="causal", bounds=DepthBounds(exact, exact))
    logprobs: list[list[float]] = out.logits[0].log_softmax(-1).tolist()
    return logprobs


def answer(model: Transformer, prompt: Sequence[int], params: SamplingParams, index: int, end: int | None) -> Answer:
    """The continuation of `prompt`; `end` is the end-of-text token."""
    tokens, depths, logprobs = list(prompt), list[int](), list[float]()
    ends = {*params.stop_token_ids} | ({end} if end is not None and not params.ignore_eos else set())
    logits, _ = forward(model, tokens, params.max_depth)
    given = tuple(log_softmax(row)[token] for row, token in zip(logits, tokens[1:], strict=False))
    while len(tokens) - len(prompt) < params.max_tokens:
        logits, depth = forward(model, tokens, params.max_depth)
        banned = ends if len(tokens) - len(prompt) < params.min_tokens else set()
        token = sample(logits[-1], params, index, tokens, len(prompt), banned)
        logprobs.append(log_softmax(logits[-1])[token])
        depths.append(depth[-1])
        tokens.append(token)
        if token in ends:
            break
    return Answer(tuple(tokens[len(prompt) :]), tuple(depths), tuple(logprobs), given)


def sample(
    logits: list[float], params: SamplingParams, index: int, tokens: list[int], prompt_length: int, banned: set[int]
) -> int:
    """Sample one token, with the steps in the order of docs/serving.md."""
    allowed = range(len(logits)) if params.allowed_token_ids is None else params.allowed_token_ids
    z = [value if token in allowed and token not in banned else -math.inf for token, value in enumerate(logits)]
    for token in set(tokens):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token in set(tokens[prompt_length:]):
        z[token] -= params.presence_penalty + params.frequency_penalty * tokens[prompt_length:].count(token)
    if params.temperature == 0:
        return max(range(len(z)), key=lambda token: z[token])
    z = [value / params.temperature for value in z]
    order = sorted(range(len(z)), key=lambda token: -z[token])
    kept = order[: params.top_k] if params.top_k > 0 else order
    total, highest = sum(math.exp(z[token] - z[order[0]]) for token in kept), z[order[0]]
    nucleus: list[int] = []
    mass = 0.0
    for token in kept:
        if nucleus and params.top_p < 1 and mass >= params.top_p:
            break
        nucleus.append(token)
        mass += math.exp(z[token] - highest) / total
    if params.min_p > 0:
        nucleus = [token for token in nucleus if math.exp(z[token] - highest) >= params.min_p]
    key = hashlib.blake2b(f"{params.seed},{index},{len(tokens)}".encode(), digest_size=8).digest()
    first = int.from_bytes(key, "little", signed=True)
    return max(nucleus, key=lambda token: z[token] - math.log(-math.log(max(uniform(first + token), 2.0**-60))))


def uniform(key: int) -> float:
    """Map a 64-bit key to a number in [0, 1)."""
    x = key & MASK
    for multiplier, shift in ((-7046029254386353131, 31), (-4417276706812531889, 29), (-8663945395140668459, 32)):
        x = (x + 1) * multiplier & MASK
        x ^= x >> shift
    return (x >> 11) / (1 << 53)


def log_softmax(logits: list[float]) -> list[float]:
    """Natural logarithm of the softmax."""
    highest = max(logits)
    total = math.log(sum(math.exp(value - highest) for value in logits)) + highest
    return [value - total for value in logits]
