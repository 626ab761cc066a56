"""From a completions request to its answer: prompts to the engine, outputs of the engine to choices."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from megamor.serve.engine.request import FinishReason, RequestOutput, TokenLogprob
from megamor.serve.http.async_engine import AsyncEngine, Generation
from megamor.serve.http.text import TextCodec, TextStream
from megamor.serve.http.wire import Choice, Completion, CompletionRequest, Logprobs, Usage


@dataclass
class ChoiceState:
    """One continuation as it grows."""

    index: int
    stream: TextStream
    prompt: Sequence[int]
    started: bool = False
    # Where in the text of the choice the next token's text begins, in characters.
    offset: int = 0
    finish_reason: FinishReason | None = None
    # When each token came, in monotonic seconds.
    times: list[float] = field(default_factory=list)


class CompletionRun:
    """The state of one request. Continuation j of prompt i is choice i · n + j.

    Raises (from the constructor):
        RequestError: the body asks for something that can't be served.
    """

    def __init__(self, body: CompletionRequest, codec: TextCodec, runner: AsyncEngine, model: str) -> None:
        self.body, self.codec, self.runner = body, codec, runner
        self.params = body.sampling()
        self.prompts = [codec.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts()]
        self.id, self.created, self.model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.arrived = time.monotonic()
        self.usage = Usage(prompt_tokens=sum(len(prompt) for prompt in self.prompts))
        stops = body.stops()
        self.choices = [
            ChoiceState(
                number * body.n + index,
                TextStream(codec, stops, body.include_stop_str_in_output, body.skip_special_tokens),
                prompt,
            )
            for number, prompt in enumerate(self.prompts)
            for index in range(body.n)
        ]

    async def next_choices(self, generation: Generation) -> list[Choice]:
        """Wait for the next output of the engine; returns what is new of the choices.

        Raises:
            MegamorError: as `Generation.next`.
        """
        prompt, output = await generation.next()
        self._count(output)
        states = self.choices[prompt * self.body.n : (prompt + 1) * self.body.n]
        # The first output of a prompt has its log-probabilities, which hold for all of its continuations.
        fresh = [state for state in states if not state.started] if self.body.echo else ()
        found = [self._echo(state, output.prompt_logprobs) for state in fresh]
        found.append(self._continue(states[output.index], output))
        if states[output.index].stream.stopped:
            # The engine doesn't know stop strings and would continue up to max_tokens.
            self.runner.drop(generation, prompt, output.index)
        return found

    async def complete(self, generation: Generation) -> Completion:
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
        return self.answer(whole, self.usage)

    def answer(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        """`choices` in the frame that every answer and every event of this request has."""
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _count(self, output: RequestOutput) -> None:
        self.usage.completion_tokens += len(output.tokens)
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        if output.cached_tokens:
            cached = self.usage.prompt_tokens_details.get("cached_tokens", 0) + output.cached_tokens
            self.usage.prompt_tokens_details["cached_tokens"] = cached

    def _echo(self, state: ChoiceState, entries: Sequence[TokenLogprob | None] | None) -> Choice:
        state.started = True
        text = self.codec.decode(state.prompt, self.body.skip_special_tokens)
        logprobs = None if entries is None else self._logprobs(state, state.prompt, entries)
        # The text of the whole, which the texts of its tokens may not add up to.
        state.offset = len(text)
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
            result.tokens.append(self.codec.name(token))
            result.token_logprobs.append(None if entry is None else entry.logprob)
            top = None if entry is None else {self.codec.name(other): value for other, value in entry.top}
            result.top_logprobs.append(top)
            result.text_offset.append(state.offset)
            state.offset += len(self.codec.decode([token], self.body.skip_special_tokens))
        return result
