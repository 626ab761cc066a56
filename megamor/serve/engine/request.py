"""What a request asks for, what the engine answers, and the interface between engine and server.

An engine is used from one thread:

    number = engine.add_request(prompt, SamplingParams(max_tokens=32, seed=7))   # raises RequestError
    while engine.has_work:
        for output in engine.step():          # one launch; often empty
            ...output.request, output.index, output.tokens, output.finish_reason
    engine.abort(number)                      # any time between two steps; nothing more comes out of it

Token ids go in and out; text, stop strings and HTTP are the server's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from megamor.errors import MegamorError

FinishReason = Literal["stop", "length"]

LogitsProcessor = Callable[[Sequence[int], Tensor], Tensor]
"""Tokens so far (prompt and continuation) and logits [vocab] to other logits; called before anything else."""


class RequestError(MegamorError):
    """A request that can't be served as it is; the client's to mend."""


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Names and meanings are those of the OpenAI and vLLM interfaces.

    `temperature` 0 takes the likeliest token. `seed` makes a continuation reproducible whatever it is batched with
    (None draws one); the i-th of `n` continuations uses its own noise. `logprobs` is the number of alternatives to
    report beside each chosen token (0: the chosen one alone), `prompt_logprobs` the same for the prompt's tokens.
    `max_tokens` may be 0, to read the prompt alone. `min_tokens` and `ignore_eos` hold back the stop tokens, which are
    the engine's end-of-text and `stop_token_ids`. `max_depth` bounds the recursions of every token, prompt included.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    max_depth: int | None = None
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_tokens": (self.max_tokens >= 0, "at least 0"),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            "temperature": (0 <= self.temperature < float("inf"), "a number that is not negative"),
            "top_k": (self.top_k >= -1, "the number of tokens to keep, or 0 for all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            "n": (self.n >= 1, "at least 1"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "at least 0"),
            "prompt_logprobs": (self.prompt_logprobs is None or self.prompt_logprobs >= 0, "at least 0"),
            "max_depth": (self.max_depth is None or self.max_depth >= 1, "at least 1"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "an integer of 64 bits"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise RequestError(f"{name} = {getattr(self, name)} must be {rule}")


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural, of the model's own distribution) and rank (1 = likeliest) of a token.

    `top` are the likeliest tokens at its place with theirs, in descending order.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """What is new about one continuation.

    `tokens` are new token ids, `depths` the recursions that each took to be read *before* it was sampled (those of the
    token at whose place it was predicted). A stop token is the last of `tokens` with finish reason "stop".
    `prompt_logprobs`, if asked for, come with the first output of continuation 0: one entry per prompt token, None for
    the first, which nothing predicts. `cached_tokens` of the prompt were found in the prefix cache.
    """

    request: int
    index: int
    tokens: tuple[int, ...]
    depths: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass
class EngineStats:
    """Where the engine stands and what it has done since it started. Seconds are wall time.

    `resident` sequences hold pages, `waiting` ones (preempted ones among them) don't. `in_core` [Nr] tokens stand
    before recursion r + 1, `held_exits` tokens wait for the exit launch. Pages are of the pools `edge` (unshared
    layers) and `core`: `pages_used` are held by residents, `pages_cached` by the prefix cache alone; `pages_by_depth`
    [Nr] are residents' pages of the core at each depth.

    Counters: `launches` and `rows` by kind ("entry", "core", "exit"), `seconds` by kind and of the "scheduler";
    `width_counts` of core launches by rows, `mixed_depths` of core launches by the number of different depths in them,
    `depth_counts` [Nr + 1] of read tokens by recursions taken, `rows_saved` (core rows that full depth would have
    taken more); `prompt_tokens` of continuations that have begun, `cached_prompt_tokens` of these from the
    prefix cache.
    """

    resident: int = 0
    waiting: int = 0
    in_core: list[int] = field(default_factory=list)
    held_exits: int = 0
    pages_total: dict[str, int] = field(default_factory=dict)
    pages_used: dict[str, int] = field(default_factory=dict)
    pages_cached: dict[str, int] = field(default_factory=dict)
    pages_by_depth: list[int] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    width_counts: dict[int, int] = field(default_factory=dict)
    mixed_depths: dict[int, int] = field(default_factory=dict)
    depth_counts: list[int] = field(default_factory=list)
    rows_saved: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


class Engine(Protocol):
    """What the server knows of the engine; see the module docstring."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt; returns the request's number.

        Raises:
            RequestError: the prompt is empty, has unknown token ids, or doesn't fit the context or the memory with
                `max_tokens` more.
        """

    def step(self) -> list[RequestOutput]:
        """Run one launch and return what came out of it."""

    def abort(self, request: int, index: int | None = None) -> None:
        """Drop a request, or one of its continuations, and free what it holds; what is finished is ignored."""

    def stats(self) -> EngineStats:
        """A snapshot; cheap enough for every scrape of the metrics."""
