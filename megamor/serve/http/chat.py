"""Chat completions: the checkpoint's chat template makes a prompt of messages, and choices become messages.

Templates are written for transformers, so they are rendered as transformers does it: sandboxed Jinja with the same
settings and functions. As there, special tokens that the rendered text spells out are read as such, those in a message
too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from megamor.codec import TextCodec
from megamor.errors import ConfigError
from megamor.serve.engine.request import Fields, FinishReason, RequestError, SamplingParams
from megamor.serve.http.async_engine import AsyncEngine
from megamor.serve.http.completions import CompletionRun
from megamor.serve.http.wire import MAX_LOGPROBS, Choice, GenerationRequest, Logprobs, Usage


class ContentPart(Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Fields):
    """A message; the template sees further fields too."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[ContentPart] | None = None


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`. With `logprobs` true, `top_logprobs` alternatives are reported."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return super().fits and self.max_completion_tokens is None

    def sampling(self, **changes: Any) -> SamplingParams:
        """As in `GenerationRequest`."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs need logprobs = true", "top_logprobs")
        changes |= {"logprobs": self.top_logprobs if self.logprobs else None}
        if self.fits:
            changes["max_tokens"] = 2**31
        elif self.max_completion_tokens is not None:
            changes["max_tokens"] = self.max_completion_tokens
        return super().sampling(**changes)


class ChatChoice(BaseModel):
    """An answer; `message` is `delta` in a stream. `token_ids` and `depths` are additions of this server."""

    index: int
    message: dict[str, str] | None = Field(None, exclude_if=lambda value: value is None)
    delta: dict[str, str] | None = Field(None, exclude_if=lambda value: value is None)
    logprobs: dict[str, list[dict[str, Any]]] | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] = []
    depths: list[int] = []


class ChatCompletion(BaseModel):
    """Answer to `POST /v1/chat/completions`, and each event of a stream."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ChatTemplate:
    """The chat template `source`.

    Raises:
        ConfigError: it isn't a template.
    """

    def __init__(self, source: str, codec: TextCodec) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> NoReturn:
            raise TemplateError(message)

        def tojson(value: Any, **options: Any) -> str:
            # Jinja's own filter escapes the characters of HTML.
            return json.dumps(value, **{"ensure_ascii": False} | options)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.globals["bos_token"] = codec.begin_of_text
        environment.globals["eos_token"] = codec.end_of_text.token if codec.end_of_text else ""
        # `{% generation %}` marks for training what the assistant says. A condition that holds leaves the same spaces.
        plain = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
        plain = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", plain)
        try:
            self.source, self.template = source, environment.from_string(plain)
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of the checkpoint can't be read: {error}; remove or fix it"
            ) from error

    @classmethod
    def read(cls, path: Path, codec: TextCodec) -> ChatTemplate | None:
        """The template in a file, None if there is no such file."""
        return cls(path.read_text(encoding="utf-8"), codec) if path.is_file() else None

    def render(self, body: ChatRequest) -> str:
        """The text of the messages.

        Raises:
            RequestError: the template refuses them.
        """
        messages = [message.model_dump(exclude_unset=True) for message in body.messages]
        for message in messages:
            if isinstance(message.get("content"), list):
                message["content"] = "\n".join(part["text"] for part in message["content"])
        if not messages:
            raise RequestError("messages must have at least one message", "messages")
        options = {"add_generation_prompt": body.add_generation_prompt, "tools": None, "documents": None}
        try:
            return self.template.render(**options | body.chat_template_kwargs | {"messages": messages})
        except Exception as error:  # whatever an expression of the template raises
            raise RequestError(f"the chat template can't render these messages: {error}", "messages") from error


class ChatRun(CompletionRun):
    """A chat completion, served as a completion of the rendered messages."""

    prefix = "chatcmpl"

    def __init__(
        self, template: ChatTemplate, body: ChatRequest, codec: TextCodec, runner: AsyncEngine, model: str
    ) -> None:
        prompt = codec.encode(template.render(body), "messages", special_tokens=True)
        super().__init__(body, codec, runner, model, [prompt])
        self.num_top = body.top_logprobs

    def answer(self, choices: Sequence[Choice], usage: Usage | None = None) -> ChatCompletion:
        """`choices` as messages, or as what is new of them."""
        stream, found = self.body.stream, []
        for choice in choices:
            state, logs = self.choices[choice.index], choice.logprobs or Logprobs()
            role = {} if stream and state.started else {"role": "assistant"}
            state.started = True
            content = [
                # The chosen token comes last in `top` if it is not among the likeliest.
                info(token, value) | {"top_logprobs": [info(*each) for each in [*(top or {}).items()][: self.num_top]]}
                for token, value, top in zip(logs.tokens, logs.token_logprobs, logs.top_logprobs, strict=True)
            ]
            fields: dict[str, Any] = {"delta" if stream else "message": {**role, "content": choice.text}}
            fields["logprobs"] = {"content": content} if choice.logprobs else None
            found.append(ChatChoice(**choice.model_dump(exclude={"text", "logprobs", "prompt_logprobs"}), **fields))
        kind: Any = "chat.completion.chunk" if stream else "chat.completion"
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return ChatCompletion(**frame, choices=found, usage=usage)


def info(token: str, logprob: float | None) -> dict[str, Any]:
    """An entry of the log-probabilities; a token that is only part of a character has no bytes of its own."""
    return {"token": token, "logprob": logprob, "bytes": None if token.startswith("token_id:") else [*token.encode()]}
