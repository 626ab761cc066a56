"""From logits to tokens: temperature, top-k, top-p, min-p, penalties, log-probabilities.

The noise of a sample is a hash of seed, continuation, position and token, used by the Gumbel-max trick. So a
continuation does not depend on what it was batched with, on the schedule, or on having been preempted. A random state
that advances from draw to draw would depend on all of them.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megamor.routing.plan import to_device
from megamor.routing.random import uniform_array, uniform_hash
from megamor.serve.engine.request import SamplingParams, TokenLogprob

log = logging.getLogger("megamor.serve")

NO_TOKEN = -1
"""Returned in place of a token when there is none: NaN logits, all of them -inf, or a logits processor that failed."""
MANY_TOKENS = 4096
"""Vocabulary from which a CPU looks at the likeliest tokens first."""
# Top-k and top-p rarely leave more tokens.
SHORTLIST = 1024
# Noise is at most 36.8, where its hash is 1 - 2**-53.
MOST_NOISE = 37.0


@dataclass(frozen=True)
class Draw:
    """One token to sample after `tokens`, which begin with `prompt_length` of the prompt; `banned` can't be chosen."""

    params: SamplingParams
    seed: int
    index: int
    tokens: Sequence[int]
    prompt_length: int
    banned: Sequence[int] = ()

    @property
    def noise_key(self) -> int:
        """Int64 key of the noise at this position."""
        name = f"{self.seed},{self.index},{len(self.tokens)}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before sampling."""
        p = self.params
        penalties = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        return bool(self.banned or p.logits_processor or p.logit_bias or p.allowed_token_ids or penalties)


def sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token for each row of logits [M, vocab], fp32 or fp64, or `NO_TOKEN`: [M], without waiting for the device.

    The logits themselves are not changed.
    """
    logits = adjusted(logits, draws)
    tokens = most_likely(logits)
    if noisy := [row for row, draw in enumerate(draws) if draw.params.temperature > 0]:
        rows = to_device(noisy, logits.device)
        chosen = truncated(logits[rows], [draws[row].params for row in noisy])
        chosen = noised(chosen, [draws[row].noise_key for row in noisy])
        tokens = tokens.index_copy(0, rows, most_likely(chosen))
    return tokens


def most_likely(logits: Tensor) -> Tensor:
    """The token with the highest of each row of logits [M, vocab], or `NO_TOKEN`, [M]."""
    best, tokens = logits.max(-1)
    # The maximum of a row with NaN is NaN, which is not greater either.
    return tokens.where(best > float("-inf"), NO_TOKEN)


def adjusted(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits after the requests' own processors, bans and penalties."""
    special = [(row, draw) for row, draw in enumerate(draws) if draw.changes_logits]
    if special:
        logits = logits.clone()  # log-probabilities are computed from the model's own
    for row, draw in special:
        params = draw.params
        if params.logits_processor:
            try:
                logits[row] = params.logits_processor(draw.tokens, logits[row]).to(logits)
            except Exception:  # whatever it raises, the other rows are served
                log.exception("a logits_processor has failed; its request ends")
                logits[row] = float("nan")
        if params.logit_bias:
            biased = to_device([*params.logit_bias], logits.device)
            logits[row, biased] += to_device([*params.logit_bias.values()], logits.device, np.float64).to(logits.dtype)
        if params.allowed_token_ids:
            allowed = to_device(params.allowed_token_ids, logits.device)
            logits[row] = torch.full_like(logits[row], float("-inf")).index_copy(0, allowed, logits[row, allowed])
        if draw.banned:
            logits[row].index_fill_(0, to_device(draw.banned, logits.device), float("-inf"))
        if params.repetition_penalty != 1:
            # As in CTRL (arXiv 1909.05858): dividing a negative logit would make its token more likely.
            seen = to_device(sorted(set(draw.tokens)), logits.device)
            old = logits[row, seen]
            logits[row, seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        counts = Counter(draw.tokens[draw.prompt_length :])
        if counts and (params.presence_penalty or params.frequency_penalty):
            penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
            generated = to_device([*counts], logits.device)
            logits[row, generated] -= to_device(penalties, logits.device, np.float64).to(logits.dtype)
    return logits


def truncated(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits [M, vocab] divided by the temperature; tokens that top-k, top-p and min-p leave out are -inf."""

    def column(values: list[float]) -> Tensor:
        return to_device(values, logits.device, np.float64).to(logits.dtype).unsqueeze(1)

    logits = logits / column([p.temperature for p in params])
    vocab = logits.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    if cut := [row for row, p in enumerate(params) if top_k[row] < vocab or p.top_p < 1]:
        rows = to_device(cut, logits.device)
        limits = column([*top_k])[rows], column([p.top_p for p in params])[rows]
        logits = logits.index_copy(0, rows, likeliest(logits[rows], *limits))
    if any(p.min_p > 0 for p in params):
        floor = column([p.min_p for p in params]).log() + logits.amax(-1, keepdim=True)
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def likeliest(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits [M, vocab] in which the tokens that `top_k` and `top_p` [M, 1] leave out are -inf."""
    out, rows = torch.full_like(logits, float("-inf")), torch.arange(len(logits), device=logits.device)
    if logits.device.type == "cpu" and logits.shape[1] >= MANY_TOKENS:
        # Sorting all takes twenty times as long.
        order = logits.topk(SHORTLIST).indices.sort().values
        order, kept, last = cut_off(logits, order, top_k, top_p)
        out.scatter_(1, order, kept)
        # Unless they end before the shortlist does, further tokens may be left in, or others of equal logits; and top-p
        # is a share of all that top-k leaves.
        beyond = (top_k > SHORTLIST) & (top_k < logits.shape[1])
        rows = ((kept == last) | beyond).any(1).nonzero().squeeze(1)
    if len(rows):
        every = torch.arange(logits.shape[1], device=logits.device).expand(len(rows), -1)
        order, kept, _ = cut_off(logits[rows], every, top_k[rows], top_p[rows])
        out[rows] = torch.empty_like(kept).scatter_(1, order, kept)
    return out


def cut_off(logits: Tensor, tokens: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest `tokens` [M, n], in ascending order, sorted; their logits, -inf if left out; the last's own [M, 1].

    All other tokens are at most as likely.
    """
    # Stable: equal logits are cut off in the order of token ids, on every device.
    ordered, order = logits.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    first = ordered.masked_fill(torch.arange(ordered.shape[1], device=logits.device) >= top_k, float("-inf"))
    if first.shape == logits.shape:
        probabilities = first.softmax(-1)
    else:
        total = torch.where(top_k < logits.shape[1], first.logsumexp(-1, True), logits.logsumexp(-1, True))
        probabilities = (first - total).exp()
    # A token is outside if those before it reach top_p already. The first always stays, however small top_p is.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[:, 0] = False
    # The sum may round to 1 before the last tokens, which top_p = 1 must still keep.
    kept = first.masked_fill(outside & (top_p < 1), float("-inf"))
    return tokens.gather(1, order), kept, ordered[:, -1:]


def noised(logits: Tensor, keys: Sequence[int]) -> Tensor:
    """Logits [M, vocab] plus Gumbel noise: their argmax is a sample of the softmax. Others than it may be -inf."""
    if logits.device.type != "cpu" or logits.shape[1] < MANY_TOKENS:
        tokens = torch.arange(logits.shape[1], device=logits.device)
        uniform = uniform_hash(to_device(keys, logits.device).unsqueeze(1) + tokens)
        # Clamped because the hash can be 0, whose logarithm is infinite.
        return logits - torch.log(-torch.log(uniform.clamp_min(2.0**-60))).to(logits.dtype)
    out = torch.full_like(logits, float("-inf"))
    for row, own, key in zip(out.numpy(), logits.numpy(), keys, strict=True):
        first = own.argmax()
        if not np.isfinite(own[first]):
            row[first] = own[first]
            continue
        # What the likeliest token has with its noise, others need. Their noise -log(-log(u)) is great enough only if
        # 1 - u is less than exp(-noise), which needs no logarithm of most.
        ahead = own - (own[first] + gumbel(first[None] + np.int64(key)).astype(own.dtype))
        able = np.flatnonzero(ahead > -MOST_NOISE)
        able = able[1 - uniform_array(able + np.int64(key)) < np.exp(ahead[able]) * 1.001]
        able = np.append(able, first)
        row[able] = own[able] + gumbel(able + np.int64(key)).astype(own.dtype)
    return out


def gumbel(keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gumbel noise, one number for each key."""
    noise: NDArray[np.float64] = -np.log(-np.log(np.maximum(uniform_array(keys), 2.0**-60)))
    return noise


def logprobs_of(logits: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of one token per row of logits [M, vocab], with the `num_top` most likely tokens of each row."""
    table = logits.log_softmax(-1)
    chosen = table.gather(1, to_device(tokens, logits.device).unsqueeze(1))
    ranks = (table > chosen).sum(1) + 1
    top = table.topk(min(max(num_top), table.shape[1]), dim=-1)
    columns = chosen.squeeze(1).tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist()
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, count, logprob, rank, ids, values in zip(tokens, num_top, *columns, strict=True)
    ]
