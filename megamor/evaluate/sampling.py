"""Continue a text token by token, routed by the inference rule, and record how deep each token went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamor.errors import CheckpointError, ConfigError
from megamor.model import CacheBound, KVCache, Transformer


@dataclass(frozen=True)
class GeneratedText:
    """Token ids [T] of prompt and continuation, and the recursions of each but the last [T - 1].

    The last token was sampled but never read, so it has no depth. Models without recursion have depth 0 everywhere.
    """

    ids: list[int]
    depths: list[int]
    prompt_length: int


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    bound: CacheBound | None = None,
) -> GeneratedText:
    """Continue `prompt` by up to `max_tokens` tokens, fewer if `stop_id` is sampled.

    Temperature 0 always takes the likeliest token. Each token is read once; a cache keeps the keys and values of
    earlier tokens at the depths to which they were routed, or with a `bound` some of them.

    Raises:
        ConfigError: prompt and continuation don't fit into the model's `max_seq_len`, or a value is out of range.
        CheckpointError: the model's logits are NaN.
    """
    ids, vocab_size = [int(token) for token in prompt], model.config.model.vocab_size
    if not ids or min(ids) < 0 or max(ids) >= vocab_size:
        raise ConfigError(f"a prompt needs at least one token, and ids from 0 to {vocab_size - 1}")
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ConfigError(f"temperature = {temperature}, top_p = {top_p}: give at least 0, and above 0 and at most 1")
    length, longest = len(ids) + max_tokens, model.config.model.max_seq_len
    if length > longest + 1:  # the last token is never read, so it needs no position
        raise ConfigError(
            f"a prompt of {len(ids)} tokens and {max_tokens} more don't fit into the model's context of {longest}: "
            "shorten the prompt or generate fewer"
        )
    weight = model.embed.weight
    cache = cache_for(model, 1, length, bound)
    generator = torch.Generator().manual_seed(seed)
    depths: list[int] = []
    unread = torch.tensor([ids], device=weight.device)  # the prompt first, then one token each
    for _ in range(max_tokens):
        for chunk in torch.split(unread, cache.chunk, dim=1):
            out = model(chunk, mode="causal", cache=cache)
            depths += [0] * chunk.shape[1] if out.depth is None else out.depth[0].tolist()
        assert out.logits is not None
        if out.logits[0, -1].isnan().any():
            raise CheckpointError("the model's logits are NaN: its weights are damaged, or its training diverged")
        ids.append(sample(out.logits[0, -1].float().cpu(), temperature, top_p, generator))
        unread = torch.tensor([ids[-1:]], device=weight.device)
        if ids[-1] == stop_id:
            break
    return GeneratedText(ids, depths, len(prompt))


def cache_for(model: Transformer, batch: int, length: int, bound: CacheBound | None) -> KVCache:
    """An empty cache for `batch` sequences of up to `length` tokens.

    Raises:
        ConfigError: the bound keeps tokens by depth, and the model has no recursion.
    """
    if bound is not None and bound.keep == "depth" and not model.stages:
        raise ConfigError("all tokens of a model without recursion have the same depth: use --kv-keep score or recent")
    weight = model.embed.weight
    return KVCache(model.config.model, batch, length, weight.dtype, weight.device, bound=bound)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token id from `logits` [vocab] by nucleus sampling (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(-1)
    ordered, ids = probabilities.sort(descending=True)
    # A token stays if those before it have less than `top_p` together, so that the likeliest one always stays.
    ordered[ordered.cumsum(-1) - ordered > top_p] = 0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])
