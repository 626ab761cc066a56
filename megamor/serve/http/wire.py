"""What goes over the wire: the OpenAI completions format, with vLLM's further sampling parameters and `max_depth`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megamor.serve.engine.request import RequestError, SamplingParams

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
MAX_PROMPTS, MAX_STOPS, MAX_N, MAX_LOGPROBS = 256, 16, 128, 20


class StreamOptions(BaseModel):
    """`include_usage`: a last event with the token counts."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """Body of `POST /v1/completions`. An unknown field is refused: without it, another question would be answered."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    model: str | None = None
    max_tokens: int = Field(16, ge=0)
    min_tokens: int = Field(0, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = Field(1, ge=1, le=MAX_N)
    best_of: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    user: str | None = None
    max_depth: int | None = Field(None, ge=1)
    """At most this many recursions for every token: less compute for less quality."""

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list.

        Raises:
            RequestError: there is none, or there are too many.
        """
        found: Any = self.prompt
        if isinstance(found, str) or (found and isinstance(found[0], int)):
            found = [found]
        if not 0 < len(found) <= MAX_PROMPTS:
            raise RequestError(f"prompt has {len(found)} prompts; give 1 to {MAX_PROMPTS}")
        return found

    def stops(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            RequestError: there are too many, or one is empty.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS or not all(stops):
            raise RequestError(f"stop must be at most {MAX_STOPS} strings, none of them empty")
        return stops

    def sampling(self) -> SamplingParams:
        """What the engine is told.

        Raises:
            RequestError: a value is out of its range, or asks for what isn't served.
        """
        if self.suffix:
            raise RequestError("suffix is not served: the model continues text and doesn't fill gaps")
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of = {self.best_of} must be left out or equal n = {self.n}")
        if self.stream_options and not self.stream:
            raise RequestError("stream_options are for stream = true only")
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            n=self.n,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            max_depth=self.max_depth,
        )


class Logprobs(BaseModel):
    """Of each token of a choice: text, natural log-probability, the likeliest tokens, and where its text begins."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class Choice(BaseModel):
    """One continuation, or what is new of it in a stream. `token_ids` and `depths` are this server's own addition."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: list[int] = []
    depths: list[int] = []


class Usage(BaseModel):
    """Tokens of all prompts and all continuations; of the prompts' tokens, those found in the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: dict[str, int] = {}


class Completion(BaseModel):
    """Answer to `POST /v1/completions`, and each event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    """An entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "megamor"
    max_model_len: int


class ModelList(BaseModel):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeRequest(BaseModel):
    """Body of `POST /tokenize`. Prompts of completions are read without special tokens."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    model: str | None = None
    add_special_tokens: bool = False


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(extra="forbid")
    tokens: list[TokenId]
    model: str | None = None


class ErrorDetail(BaseModel):
    """What went wrong, for people and for clients."""

    message: str
    type: str
    param: str | None = None
    code: int | str | None = None


class ErrorBody(BaseModel):
    """Every answer that isn't a success."""

    error: ErrorDetail
