"""What a request asks for, what the engine answers, and the interface between engine and server.

An engine is used from one thread:

    number = engine.add_request(prompt, SamplingParams(max_tokens=32, seed=7))   # raises RequestError
    while engine.has_work:
        for output in engine.step():          # runs one batch; often returns nothing
            ...output.request, output.index, output.tokens, output.finish_reason
    engine.abort(number)                      # between two steps; no output of it follows

Prompts and outputs are token ids. Text, stop strings and HTTP are the server's business.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor

from megamor.errors import MegamorError

FinishReason = Literal["stop", "length"]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
LEAST_TEMPERATURE = 1e-5
# Maps the tokens so far (prompt and continuation) and logits [vocab] to other logits; called before anything else.
LogitsProcessor = Callable[[Sequence[int], Tensor], Tensor]


class RequestError(MegamorError):
    """A request that can't be served as it is. The client can fix it, mostly by another value of the field `param`."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Fields(BaseModel):
    """The fields of a request. An unknown one is refused; null means the default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {n: value for n, value in values.items() if value is not None} if isinstance(values, dict) else values


class SamplingFields(Fields):
    """How to continue a prompt. Names and meanings are those of the OpenAI and vLLM APIs.

    `temperature` 0 takes the most likely token, and so does one that is almost 0. `logit_bias` is added to the logits
    of tokens, by id; with `allowed_token_ids` no others are chosen. With a `seed`, a continuation is reproducible
    whatever it is batched with; without one, the engine draws one. Each of `n` continuations has its own noise.
    `logprobs` is the number of alternatives to report beside each chosen token; 0 reports the chosen one alone. With
    `max_tokens` 0 the prompt is only read. `min_tokens` and `ignore_eos` suppress the stop tokens: the engine's end of
    text and `stop_token_ids`. `max_depth` bounds the recursions of every token, the prompt's included: less compute for
    less quality.
    """

    max_tokens: int = Field(16, ge=0)
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(0, ge=-1)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    allowed_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)] | None = None
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=0)
    max_depth: int | None = Field(None, ge=1)

    @field_validator("temperature")
    @classmethod
    def _greedy(cls, value: float) -> float:
        # Logits divided by such a number overflow.
        return value if value >= LEAST_TEMPERATURE else 0.0


class SamplingParams(SamplingFields):
    """What the engine is told. `prompt_logprobs` is like `logprobs`, for the tokens of the prompt.

    Requests take turns, sequence by sequence, so that one of many doesn't hold up the others. Those of one `group`
    count as one request.

    Raises:
        RequestError: a value is out of range.
    """

    model_config = ConfigDict(frozen=True)

    prompt_logprobs: int | None = Field(None, ge=0)
    logits_processor: LogitsProcessor | None = None
    group: int | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: Any, handler: ModelWrapValidatorHandler[SamplingParams]) -> SamplingParams:
        try:
            params = handler(values)
        except ValidationError as error:
            raise describe_invalid(error.errors()[0]) from error
        if params.min_tokens > params.max_tokens:
            message = f"min_tokens = {params.min_tokens} must be at most max_tokens = {params.max_tokens}"
            raise RequestError(message, "min_tokens")
        return params


_FAULTS = {
    "extra_forbidden": "unknown field, or one that is not served here",
    "json_invalid": "not valid JSON",
    "missing": "is needed",
    "too_short": "must not be empty",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}
_KINDS = {"int": "a whole number", "float": "a number", "finite": "a number", "bool": "true or false"}
_KINDS |= {"string": "a string", "list": "a list", "tuple": "a list", "dict": "an object", "model": "an object"}
_FORMS = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string or a list of strings",
    "content": "a string or a list of parts of type text",
}
"""Fields that have one of several types: pydantic reports what each of them would need."""


def describe_invalid(error: Mapping[str, Any], place: Sequence[int | str] | None = None) -> RequestError:
    """One of pydantic's errors in plain words, about the field at `place`, with the value where that is short."""
    place, kind, value = error["loc"] if place is None else place, error["type"], error.get("input")
    union = next((index for index, part in enumerate(place[:-1], 1) if part in _FORMS), None)
    name = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[:union] if part != "[key]"
    ).removeprefix(".")
    if union and kind not in ("missing", "extra_forbidden"):
        return RequestError(f"{name} must be {_FORMS[str(place[union - 1])]}", name)
    shown = f" = {value!r}" if isinstance(value, int | float | str) and len(repr(value)) < 40 else ""
    fault = (
        _FAULTS.get(kind, "").format(**error.get("ctx", {}))
        or f"must be {_KINDS.get(kind.split('_')[0], error['msg'])}"
    )
    return RequestError(f"{name or 'the body'}{shown}: {fault}", name or None)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural, of the model's own distribution) and rank (1 is the most likely) of a token.

    `top` are the most likely tokens at its position with theirs, in descending order.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class RequestOutput:
    """What is new about one continuation.

    `tokens` are new token ids. `depths` are, for each, the recursions taken at the position that predicted it: by the
    token before it. A stop token is the last of `tokens`, with finish reason "stop". `prompt_logprobs`, if requested,
    come with the first output of continuation 0: one entry per prompt token, None for the first, which nothing
    predicts. `cached_tokens` of the prompt were found in the prefix cache. An `error` ends the request, with all its
    continuations: no output of it follows.
    """

    request: int
    index: int
    tokens: tuple[int, ...]
    depths: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass
class EngineStats:
    """The engine's present state, and what it has done since it started. Seconds are wall time.

    Present state: `resident` sequences hold pages, `waiting` ones (preempted ones among them) don't. `in_core` [Nr]
    counts tokens that are about to take recursion r + 1, `held_exits` those that wait for the exit batch. Pages are by
    pool, `edge` (unshared layers) and `core`: `pages_used` by residents, `pages_cached` by the prefix cache alone;
    `pages_by_depth` [Nr] counts residents' pages of the core at each depth.

    Counters: `launches` (batches), `rows` and `seconds` by kind ("entry", "core", "exit"; seconds also of the
    "scheduler"). Of core batches, `width_counts` by number of rows and `mixed_depths` by number of different depths.
    `depth_counts` [Nr + 1] of read tokens by recursions taken; `rows_saved`, the further core rows that full depth
    would have taken. `prompt_tokens` of continuations that have begun, of which `cached_prompt_tokens` came from the
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
    launches: dict[str, int] = field(default_factory=Counter)
    rows: dict[str, int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    width_counts: dict[int, int] = field(default_factory=Counter)
    mixed_depths: dict[int, int] = field(default_factory=Counter)
    depth_counts: list[int] = field(default_factory=list)
    rows_saved: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


class Engine(Protocol):
    """What the server knows of the engine; see the module docstring."""

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its continuation together."""

    @property
    def description(self) -> dict[str, str]:
        """Facts about the model and how it is served, by name, for people to read."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt; returns the request's number.

        Raises:
            RequestError: the prompt is empty, has unknown token ids, or with `max_tokens` more exceeds the context or
                the memory.
        """

    def step(self) -> list[RequestOutput]:
        """Run one batch and return its outputs."""

    def abort(self, request: int, index: int | None = None) -> None:
        """Drop a request, or one of its continuations, and free what it holds; ignored if it is finished or unknown."""

    def stats(self) -> EngineStats:
        """A snapshot; cheap enough for every scrape of the metrics."""
