"""From a completions request to its answer: prompts to the engine, outputs of the engine to choices."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megamor.serve.engine.request import RequestOutput, SamplingParams, TokenLogprob
from megamor.serve.http.async_engine import AsyncEngine
from megamor.serve.http.text import TextCodec, TextStream
from megamor.serve.http.wire import Choice, Completion, CompletionRequest, Logprobs, Usage


@dataclass
class ChoiceState:
    """One continuation as it grows."""

    index: int
    stream: TextStream
    prompt: Sequence[int]
    echo: bool
    started: bool = False
    offset: int = 0
    """Where in the whole text of the choice the next token's text begins."""
    finish_reason: Literal["stop", "length"] | None = None
    times: list[float] = field(default_factory=list)
    """When each token came, in monotonic seconds."""


class CompletionRun:
    """One request at work. `pieces` yields what is new; `usage` counts once it has ended.

    Prompt i's continuation j is choice i · n + j. One that a stop string has ended is aborted.

    Raises (from the constructor):
        RequestError: the body asks for something that can't be served.
    """

    def __init__(self, body: CompletionRequest, codec: TextCodec, runner: AsyncEngine, model: str) -> None:
        self.body, self.codec, self.runner = body, codec, runner
        self.params: SamplingParams = body.sampling()
        self.prompts = [codec.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts()]
        self.id, self.created, self.model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.arrived = time.monotonic()
        self.usage = Usage(prompt_tokens=sum(len(prompt) for prompt in self.prompts))
        stops = body.stops()
        self.choices = [
            ChoiceState(
                number * body.n + place,
                TextStream(codec, stops, body.include_stop_str_in_output, body.skip_special_tokens),
                prompt,
                body.echo,
            )
            for number, prompt in enumerate(self.prompts)
            for place in range(body.n)
        ]

    async def pieces(self) -> AsyncIterator[Choice]:
        """What is new of each choice, as it comes. Leaving early aborts everything.

        Raises:
            RequestError, BusyError, UnavailableError: of any of the prompts; the others are aborted.
        """
        queue: asyncio.Queue[Choice | Exception | None] = asyncio.Queue()

        async def follow(number: int) -> None:
            try:
                async for piece in self._follow(number):
                    queue.put_nowait(piece)
                queue.put_nowait(None)
            except Exception as error:  # raised below, to whoever reads the pieces
                queue.put_nowait(error)

        tasks = [asyncio.create_task(follow(number)) for number in range(len(self.prompts))]
        remaining = len(tasks)
        try:
            while remaining:
                piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    remaining -= 1
                else:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def complete(self) -> Completion:
        """The whole answer."""
        merged = [Choice(index=choice.index, text="", logprobs=None) for choice in self.choices]
        async for piece in self.pieces():
            whole = merged[piece.index]
            whole.text += piece.text
            whole.token_ids += piece.token_ids
            whole.depths += piece.depths
            whole.finish_reason = piece.finish_reason or whole.finish_reason
            if piece.logprobs is not None:
                whole.logprobs = whole.logprobs or Logprobs()
                for name in Logprobs.model_fields:
                    getattr(whole.logprobs, name).extend(getattr(piece.logprobs, name))
        return self.answer(merged, self.usage)

    def answer(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        """`choices` in the frame that every answer and every event of this request has."""
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    async def _follow(self, number: int) -> AsyncIterator[Choice]:
        states = self.choices[number * self.body.n : (number + 1) * self.body.n]
        stopped = set[int]()
        outputs = self.runner.generate(self.prompts[number], self.params, stopped)
        try:
            async for output in outputs:
                self._count(output)
                for state in states if output.prompt_logprobs is not None or self.body.echo else ():
                    if not state.started:
                        state.started = True
                        yield self._prompt_piece(state, output.prompt_logprobs)
                state = states[output.index]
                yield self._piece(state, output)
                if state.stream.stopped:
                    stopped.add(output.index)
                if all(state.finish_reason for state in states):
                    return
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]

    def _count(self, output: RequestOutput) -> None:
        self.usage.completion_tokens += len(output.tokens)
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        if output.cached_tokens:
            cached = self.usage.prompt_tokens_details.get("cached_tokens", 0) + output.cached_tokens
            self.usage.prompt_tokens_details["cached_tokens"] = cached

    def _prompt_piece(self, state: ChoiceState, logprobs: Sequence[TokenLogprob | None] | None) -> Choice:
        text = self.codec.decode(state.prompt, self.body.skip_special_tokens)
        found = None
        if logprobs is not None:
            found = self._logprobs(state, list(state.prompt), logprobs)
        state.offset = len(text)
        return Choice(index=state.index, text=text, logprobs=found, token_ids=list(state.prompt))

    def _piece(self, state: ChoiceState, output: RequestOutput) -> Choice:
        text = state.stream.push(output.tokens)
        if output.finish_reason is not None:
            text += state.stream.finish()
            state.finish_reason = output.finish_reason
        if state.stream.stopped:
            state.finish_reason = "stop"
        state.times += [time.monotonic()] * len(output.tokens)
        logprobs = None
        if output.logprobs is not None:
            logprobs = self._logprobs(state, list(output.tokens), output.logprobs)
        return Choice(
            index=state.index,
            text=text,
            logprobs=logprobs,
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
            top = None if entry is None else {self.codec.name(other): value for other, value in entry.top}
            result.top_logprobs.append(top)
            result.text_offset.append(state.offset)
            state.offset += len(self.codec.decode([token], self.body.skip_special_tokens))
        return result
