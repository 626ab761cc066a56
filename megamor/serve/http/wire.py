"""What goes over the wire: OpenAI's completions format, with vLLM's further sampling parameters and `max_depth`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megamor.serve.engine.request import FinishReason, RequestError, SamplingFields, SamplingParams, TokenId

MAX_PROMPTS, MAX_STOPS, MAX_N, MAX_LOGPROBS = 256, 16, 128, 20


class StreamOptions(BaseModel):
    """`include_usage` asks for a last event with the token counts."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`. An unknown field is refused: ignoring it would answer another question."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    best_of: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    user: str | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list.

        Raises:
            RequestError: there is none, or there are too many.
        """
        given: Any = self.prompt
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        prompts: list[str] | list[list[int]] = [given] if single else given
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise RequestError(f"prompt has {len(prompts)} prompts; give 1 to {MAX_PROMPTS}")
        return prompts

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
            RequestError: fields contradict each other, or ask for something that isn't served.
        """
        if self.suffix:
            raise RequestError("suffix is not served: the model continues text and can't fill gaps")
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of = {self.best_of} must be left out or equal n = {self.n}")
        if self.stream_options and not self.stream:
            raise RequestError("stream_options need stream = true")
        fields = self.model_dump(include=set(SamplingFields.model_fields))
        return SamplingParams(**fields, prompt_logprobs=self.logprobs if self.echo else None)


class Logprobs(BaseModel):
    """For each token of a choice: text, natural log-probability, the most likely tokens, and where its text begins."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class Choice(BaseModel):
    """One continuation, or what is new of it in a stream. `token_ids` and `depths` are additions of this server."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] = []
    depths: list[int] = []


class Usage(BaseModel):
    """Numbers of tokens. `prompt_tokens_details.cached_tokens` of the prompts were found in the prefix cache."""

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
    """Body of `POST /tokenize`. The default is how prompts of completions are read."""

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
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: int | str | None = None


class ErrorBody(BaseModel):
    """Body of every answer that isn't a success."""

    error: ErrorDetail
