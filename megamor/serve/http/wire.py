"""What goes over the wire: OpenAI's completions format, with vLLM's further sampling parameters and `max_depth`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from megamor.codec import TextCodec
from megamor.serve.engine.request import Fields, FinishReason, RequestError, SamplingFields, SamplingParams, TokenId

MAX_PROMPTS, MAX_STOPS, MAX_N, MAX_LOGPROBS = 256, 16, 128, 20
# Values of further fields of OpenAI and vLLM that ask for nothing, or for what this server always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "spaces_between_special_tokens": (True,),
}
NEUTRAL |= {"priority": (0,), "bad_words": ([],), "return_token_ids": (True, False), "add_special_tokens": (False,)}


class StreamOptions(Fields):
    """`include_usage` asks for a last event with the token counts; `continuous_usage_stats` for them in all events."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(SamplingFields):
    """What completions and chat completions have in common.

    An unknown field is refused: ignoring it would answer another question. `truncate_prompt_tokens` keeps the last so
    many of a prompt, -1 as many as the context has room for. `user` and what follows it is for logs.
    """

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value not in NEUTRAL.get(name, ())}

    @property
    def fits(self) -> bool:
        """Whether `max_tokens` is a default, which the end of the context may shorten."""
        return "max_tokens" not in self.model_fields_set

    def stops(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            RequestError: there are too many, or one is empty.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS or not all(stops):
            raise RequestError(f"stop must be at most {MAX_STOPS} strings, none of them empty", "stop")
        return stops

    def shortened(self, prompt: list[int], context: int) -> list[int]:
        """What `truncate_prompt_tokens` keeps of a prompt.

        Raises:
            RequestError: that would be nothing, or more than the context.
        """
        kept = self.truncate_prompt_tokens
        if kept == -1:
            kept = max(1, context - (1 if self.fits else self.sampling().max_tokens))
        if kept == 0 or (kept or 0) > context:
            fault = f"truncate_prompt_tokens = {kept} must be -1, or 1 to the context of {context}"
            raise RequestError(fault, "truncate_prompt_tokens")
        return prompt if kept is None else prompt[-kept:]

    def sampling(self, **changes: Any) -> SamplingParams:
        """What the engine is told.

        Raises:
            RequestError: fields contradict each other, or ask for something that isn't served.
        """
        if self.stream_options and not self.stream:
            raise RequestError("stream_options need stream = true", "stream_options")
        return SamplingParams(**self.model_dump(include=set(SamplingFields.model_fields)) | changes)


def encode_name(codec: TextCodec, text: str, add_special_tokens: bool) -> list[int]:
    """As `TextCodec.encode`; but a text that is nothing but the name of the beginning or end of text is that token."""
    special = text in (codec.begin_of_text, codec.end_of_text and codec.end_of_text.token)
    return codec.encode(text, "prompt", special_tokens=special, add_special_tokens=add_special_tokens)


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`. `logprobs` true is 1, and false is null. `prompt_logprobs` is vLLM's."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    best_of: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    suffix: str | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return None if value is False else value

    def prompts(self, codec: TextCodec) -> list[list[int]]:
        """The tokens of each prompt.

        Raises:
            RequestError: there is none, or there are too many.
            TextError: the tokenizer can't represent a prompt.
        """
        given: Any = self.prompt
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        prompts: list[Any] = [given] if single else given
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise RequestError(f"prompt has {len(prompts)} prompts; give 1 to {MAX_PROMPTS}", "prompt")
        names = ["prompt"] if len(prompts) == 1 else [f"prompt {number}" for number in range(len(prompts))]
        return [
            codec.encode(each, name) if isinstance(each, str) else each
            for each, name in zip(prompts, names, strict=True)
        ]

    def sampling(self, **changes: Any) -> SamplingParams:
        """As in `GenerationRequest`."""
        if self.suffix:
            raise RequestError("suffix is not served: the model continues text and can't fill gaps", "suffix")
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of = {self.best_of} must be left out or equal n = {self.n}", "best_of")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs are not available with stream = true", "prompt_logprobs")
        asked = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return super().sampling(prompt_logprobs=max(asked, default=None), **changes)


class Logprobs(BaseModel):
    """For each token of a choice: text, natural log-probability, the most likely tokens, and where its text begins."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class PromptLogprob(BaseModel):
    """Natural log-probability of a token at a position of the prompt, and its rank: 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str


class Choice(BaseModel):
    """One continuation, or what is new of it in a stream. `token_ids` and `depths` are additions of this server.

    `prompt_logprobs` has by id each token of the prompt and the most likely ones in its place; null for the first.
    """

    index: int
    text: str
    logprobs: Logprobs | None = None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = Field(None, exclude_if=lambda value: value is None)
    finish_reason: FinishReason | None = None
    token_ids: list[int] = []
    depths: list[int] = []


class Usage(BaseModel):
    """Numbers of tokens. `prompt_tokens_details.cached_tokens` of the prompts were found in the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: dict[str, int] = {"cached_tokens": 0}


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


class TokenizeRequest(Fields):
    """Body of `POST /tokenize`. The default is how prompts of completions are read."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = False


class DetokenizeRequest(Fields):
    """Body of `POST /detokenize`."""

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
