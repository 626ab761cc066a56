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
from torch import Tensor

from megamor.routing.plan import to_device
from megamor.routing.random import uniform_hash
from megamor.serve.engine.request import SamplingParams, TokenLogprob

log = logging.getLogger("megamor.serve")

NO_TOKEN = -1
"""Returned in place of a token when there is none: NaN logits, all of them -inf, or a logits processor that failed."""


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
        return bool(self.banned or p.logits_processor or p.logit_bias or penalties)


def sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token for each row of logits [M, vocab], fp32 or fp64, or `NO_TOKEN`: [M], without waiting for the device.

    The logits themselves are not changed.
    """
    logits = adjusted(logits, draws)
    tokens = most_likely(logits)
    if noisy := [row for row, draw in enumerate(draws) if draw.params.temperature > 0]:
        rows = to_device(noisy, logits.device)
        chosen = truncated(logits[rows], [draws[row].params for row in noisy])
        chosen = chosen + gumbel([draws[row].noise_key for row in noisy], chosen)
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
    if min(top_k) < vocab or any(p.top_p < 1 for p in params):
        # Stable: equal logits are cut off in the order of token ids, on every device.
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(torch.arange(vocab, device=logits.device) >= column([*top_k]), float("-inf"))
        probabilities = ordered.softmax(-1)
        # A token is outside if those before it reach top_p already. The first always stays, however small top_p is.
        before = probabilities.cumsum(-1) - probabilities
        outside = before >= column([p.top_p for p in params])
        outside[:, 0] = False
        # The sum may round to 1 before the last tokens, which top_p = 1 must still keep.
        full = column([p.top_p for p in params]) >= 1
        ordered = ordered.masked_fill(outside & ~full, float("-inf"))
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    if any(p.min_p > 0 for p in params):
        floor = column([p.min_p for p in params]).log() + logits.amax(-1, keepdim=True)
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def gumbel(keys: Sequence[int], like: Tensor) -> Tensor:
    """Gumbel noise [M, vocab]: argmax of logits plus noise is a sample of the softmax."""
    tokens = torch.arange(like.shape[1], device=like.device)
    # Clamped because the hash can be 0, whose logarithm is infinite.
    uniform = uniform_hash(to_device(keys, like.device).unsqueeze(1) + tokens)
    return -torch.log(-torch.log(uniform.clamp_min(2.0**-60))).to(like.dtype)


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
