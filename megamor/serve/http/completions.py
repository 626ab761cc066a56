"""From a completions request to its answer: prompts to the engine, outputs of the engine to choices."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from megamor.codec import Detokenizer, TextCodec
from megamor.serve.engine.request import FinishReason, RequestOutput, TokenLogprob
from megamor.serve.http.async_engine import AsyncEngine, Generation
from megamor.serve.http.text import TextStream
from megamor.serve.http.wire import Choice, Completion, GenerationRequest, Logprobs, PromptLogprob, Usage


@dataclass
class ChoiceState:
    """One continuation as it grows."""

    index: int
    stream: TextStream
    prompt: Sequence[int]
    # Finds where in the text of the choice each token's text begins; `offset` characters have come so far.
    measure: Detokenizer
    offset: int = 0
    started: bool = False
    finish_reason: FinishReason | None = None
    # When each token came, in monotonic seconds.
    times: list[float] = field(default_factory=list)


class CompletionRun:
    """The state of one request. Continuation j of prompt i is choice i · n + j.

    Raises (from the constructor):
        RequestError: the body asks for something that can't be served.
    """

    prefix = "cmpl"

    def __init__(
        self, body: GenerationRequest, codec: TextCodec, runner: AsyncEngine, model: str, prompts: list[list[int]]
    ) -> None:
        self.body, self.codec, self.runner, self.prompts = body, codec, runner, prompts
        if body.truncate_prompt_tokens is not None:
            self.prompts = [body.shortened(prompt, runner.context_length) for prompt in prompts]
        self.params, self.echo = body.sampling(), getattr(body, "echo", False)
        self.id, self.created, self.model = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), model
        self.arrived = time.monotonic()
        self.usage = Usage(prompt_tokens=sum(len(prompt) for prompt in self.prompts))
        self.cached: dict[int, int] = {}
        # For vLLM's field of this name, by prompt.
        self.prompt_logprobs: dict[int, list[dict[int, PromptLogprob] | None]] = {}
        stops = body.stops()
        self.early: dict[int, list[RequestOutput]] = {}
        self.choices: list[ChoiceState] = []
        for prompt in self.prompts:
            # An echo begins with the prompt. Otherwise the prompt decides how the text begins, such as with a space.
            context = () if self.echo else prompt
            for _ in range(body.n):
                decoder, measure = (Detokenizer(codec, context, body.skip_special_tokens) for _ in range(2))
                stream = TextStream(decoder, stops, body.include_stop_str_in_output, self.params.min_tokens)
                self.choices.append(ChoiceState(len(self.choices), stream, prompt, measure))

    async def next_choices(self, generation: Generation) -> list[Choice]:
        """Wait for the next output of the engine; returns what is new of the choices.

        Raises:
            MegamorError: as `Generation.next`.
        """
        prompt, output = await generation.next()
        self._count(prompt, output)
        states = self.choices[prompt * self.body.n : (prompt + 1) * self.body.n]
        found: list[Choice] = []
        outputs = [output]
        if self.echo and not states[0].started:
            # The prompt's log-probabilities come with continuation 0 and hold for all. Others may be faster, and wait.
            outputs = [*self.early.setdefault(prompt, []), output]
            if self.params.prompt_logprobs is not None and output.index != 0:
                self.early[prompt] = outputs
                return []
            found = [self._echo(state, output.prompt_logprobs) for state in states]
        for each in outputs:
            state = states[each.index]
            if state.finish_reason is not None:
                continue  # came after a stop string while it waited
            found.append(self._continue(state, each))
            if state.stream.stopped:
                # The engine doesn't know stop strings and would continue up to max_tokens.
                self.runner.drop(generation, prompt, each.index)
        return found

    async def complete(self, generation: Generation) -> BaseModel:
        """The whole answer; raises as `next_choices`."""
        whole = [Choice(index=state.index, text="") for state in self.choices]
        while generation.open:
            for new in await self.next_choices(generation):
                choice = whole[new.index]
                choice.text += new.text
                choice.token_ids += new.token_ids
                choice.depths += new.depths
                choice.finish_reason = new.finish_reason
                if new.logprobs is not None:
                    choice.logprobs = choice.logprobs or Logprobs()
                    for name in Logprobs.model_fields:
                        getattr(choice.logprobs, name).extend(getattr(new.logprobs, name))
        for choice in whole:
            choice.prompt_logprobs = self.prompt_logprobs.get(choice.index // self.body.n)
        return self.answer(whole, self.usage)

    def answer(self, choices: list[Choice], usage: Usage | None = None) -> BaseModel:
        """`choices` in the frame that every answer and every event of this request has."""
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _count(self, prompt: int, output: RequestOutput) -> None:
        self.usage.completion_tokens += len(output.tokens)
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        if output.index == 0:  # other continuations find what this one has read
            self.cached[prompt] = output.cached_tokens
            self.usage.prompt_tokens_details["cached_tokens"] = sum(self.cached.values())
        count = getattr(self.body, "prompt_logprobs", None)
        if count is not None and output.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = [
                None if entry is None else self._alternatives(entry, count) for entry in output.prompt_logprobs
            ]

    def _alternatives(self, entry: TokenLogprob, count: int) -> dict[int, PromptLogprob]:
        """The token itself and the `count` most likely ones."""
        ranked = [(token, value, rank) for rank, (token, value) in enumerate(entry.top[:count], 1)]
        found = {token: (value, rank) for token, value, rank in [(entry.token, entry.logprob, entry.rank), *ranked]}
        return {
            token: PromptLogprob(
                logprob=value, rank=rank, decoded_token=self.codec.decode([token], skip_special_tokens=False)
            )
            for token, (value, rank) in found.items()
        }

    def _echo(self, state: ChoiceState, entries: Sequence[TokenLogprob | None] | None) -> Choice:
        state.started = True
        text = state.stream.detokenizer.push(state.prompt)
        wanted = entries is not None and self.params.logprobs is not None
        logprobs = self._logprobs(state, state.prompt, entries or ()) if wanted else None
        return Choice(index=state.index, text=text, logprobs=logprobs, token_ids=list(state.prompt))

    def _continue(self, state: ChoiceState, output: RequestOutput) -> Choice:
        text = state.stream.push(output.tokens)
        if output.finish_reason is not None:
            text += state.stream.finish()
            state.finish_reason = output.finish_reason
        if state.stream.stopped:
            state.finish_reason = "stop"
        state.times += [time.monotonic()] * len(output.tokens)
        return Choice(
            index=state.index,
            text=text,
            logprobs=None if output.logprobs is None else self._logprobs(state, output.tokens, output.logprobs),
            finish_reason=state.finish_reason,
            token_ids=list(output.tokens),
            depths=list(output.depths),
        )

    def _logprobs(self, state: ChoiceState, tokens: Sequence[int], entries: Sequence[TokenLogprob | None]) -> Logprobs:
        result = Logprobs()
        for token, entry in zip(tokens, entries, strict=True):
            name = self.codec.name(token)
            result.tokens.append(name)
            result.token_logprobs.append(None if entry is None else entry.logprob)
            top: dict[str, float] = {}
            # The chosen one is always there. Of different tokens with one text the most likely counts.
            for other, value in () if entry is None else (*entry.top[: self.params.logprobs], (token, entry.logprob)):
                top.setdefault(self.codec.name(other), value)
            result.top_logprobs.append(None if entry is None else top)
            before = state.offset
            state.offset += len(state.measure.push([token]))
            # A whole token ends where the text ends now: bytes before it that form no character are certain only now. A
            # part of a character has the place of that character.
            own = state.offset if name.startswith("token_id:") else len(name)
            result.text_offset.append(max(before, state.offset - own))
        return result
