"""Runs the engine in a thread of its own, for use from asyncio.

A step of the engine blocks for milliseconds, so it must not run in the event loop. The thread alternates between
commands from the event loop (new requests, aborts, statistics) and one engine step. The outputs of a step go to the
event loop in one call, and from there to the queue of each `Generation`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from megamor.errors import MegamorError
from megamor.serve.engine.request import Engine, EngineStats, RequestError, RequestOutput, SamplingParams
from megamor.serve.options import ServerOptions

log = logging.getLogger("megamor.serve")

Item = tuple[int, RequestOutput] | MegamorError
ENGINE_FAILED = "the engine has failed; the server must be restarted"


class StatusError(MegamorError):
    """Ends a request with an HTTP status: 429 if too much is waiting, 499 if the client has left (nginx's number),
    500 if there is no next token, 503 if the server is shutting down or the engine has failed, 504 at the time
    limit."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class Generation:
    """The prompts of one HTTP request in progress; belongs to the event loop.

    `open` [prompt] are the continuations that are neither finished nor dropped. `waiting` are those without any output
    yet: by prompt and index the tokens to read, counted once for each prompt. With `fit`, `max_tokens` shrinks to what
    the context has room for. `queue` gets everything the request can wait for: outputs, each with the number of its
    prompt, and whatever ends the request early.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], params: SamplingParams, fit: bool = False) -> None:
        self.prompts, self.params, self.fit = prompts, params, fit
        self.open = {number: set(range(params.n)) for number in range(len(prompts))}
        self.waiting = {
            (number, index): 0 if index else len(prompt)
            for number, prompt in enumerate(prompts)
            for index in range(params.n)
        }
        self.queue: asyncio.Queue[Item] = asyncio.Queue()
        # Number of each prompt in the engine; used by the engine's thread only.
        self.numbers: dict[int, int] = {}

    async def next(self) -> tuple[int, RequestOutput]:
        """The next output and the number of its prompt.

        Raises:
            RequestError: the engine can't serve a prompt.
            StatusError: the request ends early.
        """
        while True:
            item = await self.queue.get()
            if isinstance(item, MegamorError):
                raise item
            prompt, output = item
            if output.error is not None:
                raise StatusError(500, output.error)
            self.waiting.pop((prompt, output.index), None)
            # Outputs of a dropped continuation may have been in the queue when it was dropped.
            if output.index in self.open.get(prompt, ()):
                if output.finish_reason is not None:
                    self.forget(prompt, output.index)
                return item

    def forget(self, prompt: int, index: int) -> None:
        """A continuation has ended."""
        self.waiting.pop((prompt, index), None)
        self.open[prompt].remove(index)
        if not self.open[prompt]:
            del self.open[prompt]


class AsyncEngine:
    """Runs `engine` until `close`. All methods but `close` are called from the event loop of `start`."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self._engine, self._options = engine, options
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._generations: set[Generation] = set()
        self._groups = itertools.count()
        # By the engine's number of the request; used by the engine's thread only.
        self._active: dict[int, tuple[Generation, int]] = {}
        self.draining = False
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End the thread after its current step. Unfinished requests stay unfinished."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def context_length(self) -> int:
        """As of the engine."""
        return self._engine.context_length

    @property
    def num_running(self) -> int:
        """Sequences that are not completely answered: every continuation of every prompt."""
        # A request counts until it is closed, so that draining waits for an answer that is still being sent.
        return sum(max(1, sum(map(len, generation.open.values()))) for generation in self._generations)

    @property
    def waiting(self) -> list[int]:
        """Of each sequence without any output yet, the tokens to read; see `Generation`."""
        return [length for generation in self._generations for length in generation.waiting.values()]

    @contextmanager
    def generation(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, fit: bool = False
    ) -> Iterator[Generation]:
        """Continue `prompts`; at the end of the context, whatever is still open is aborted. `fit`: see `Generation`.

        Raises:
            RequestError: it asks for more sequences than may wait.
            StatusError: too much is waiting, or no new requests are accepted.
        """
        self.check_accepting()
        limits, waiting, seconds = self._options, self.waiting, self._options.request_timeout
        count, length = len(prompts) * params.n, sum(map(len, prompts))
        if count > limits.max_queued_requests:
            fault = f"n = {params.n} continuations of {len(prompts)} prompts are {count} sequences"
            raise RequestError(f"{fault}; this server takes up to {limits.max_queued_requests} at a time", "n")
        if len(waiting) + count > limits.max_queued_requests:
            raise StatusError(
                429, f"{len(waiting)} sequences are waiting already, {count} more are too many; try again soon"
            )
        # With nothing waiting, even a prompt over the limit is accepted: it could never be served otherwise.
        if waiting and sum(waiting) + length > limits.max_queued_tokens:
            busy = f"{sum(waiting)} prompt tokens are waiting already, {length} more are too many"
            raise StatusError(429, f"{busy}; try again soon")
        if len(prompts) > 1:
            params = params.model_copy(update={"group": next(self._groups)})
        generation = Generation(prompts, params, fit)
        late = StatusError(504, f"not finished within {seconds:g} s, the limit of this server")
        # One timer for the request. A timeout around every wait for an output would cost a task for each token.
        timer = asyncio.get_running_loop().call_later(seconds, generation.queue.put_nowait, late)
        self._generations.add(generation)
        self._commands.put(partial(self._add, generation))
        try:
            yield generation
        finally:
            timer.cancel()
            self._generations.remove(generation)
            self._commands.put(partial(self._end, generation))

    def drop(self, generation: Generation, prompt: int, index: int) -> None:
        """Abort a continuation, unless it is finished."""
        if index in generation.open.get(prompt, ()):
            generation.forget(prompt, index)
            self._commands.put(partial(self._abort, generation, prompt, index))

    async def stats(self) -> EngineStats:
        """The engine's statistics, taken between two steps."""
        answer: Future[EngineStats] = Future()

        def take() -> None:
            # False if the caller was cancelled meanwhile: a result would be an error then, in the engine's thread.
            if answer.set_running_or_notify_cancel():
                answer.set_result(self._engine.stats())

        self._commands.put(take)
        return await asyncio.wrap_future(answer)

    def check_accepting(self) -> None:
        """Raise StatusError if new requests are not accepted."""
        if self.failure is not None:
            raise StatusError(503, ENGINE_FAILED)
        if self.draining:
            raise StatusError(503, "the server is shutting down; try another one")

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._run_commands():
                self._deliver(self._engine.step())
        except Exception as error:  # of any kind: the clients that wait must be told
            log.exception("the engine has failed")
            self.failure = error
            self._call_in_loop(self._fail_all)
            self._run_commands()

    def _run_commands(self) -> bool:
        """Run the commands there are, and wait for more until the engine has work; False when it is time to end."""
        while True:
            idle = self.failure is not None or not self._engine.has_work
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _add(self, generation: Generation) -> None:
        try:
            for prompt, tokens in enumerate(generation.prompts):
                if self.failure is not None:
                    raise StatusError(503, ENGINE_FAILED)
                params, room = generation.params, max(1, self._engine.context_length - len(tokens))
                if generation.fit and params.max_tokens > room:
                    params = params.model_copy(update={"max_tokens": room})
                generation.numbers[prompt] = self._engine.add_request(tokens, params)
                self._active[generation.numbers[prompt]] = generation, prompt
        except MegamorError as error:
            if isinstance(error, RequestError) and len(generation.prompts) > 1:
                error = RequestError(f"prompt {prompt}: {error}", error.param)
            self._send([(generation, error)])

    def _abort(self, generation: Generation, prompt: int, index: int) -> None:
        if prompt in generation.numbers and self.failure is None:
            self._engine.abort(generation.numbers[prompt], index)

    def _end(self, generation: Generation) -> None:
        # The event loop doesn't change `open` any more once it has sent this command.
        for prompt, indices in generation.open.items():
            for index in indices:
                self._abort(generation, prompt, index)
        for number in generation.numbers.values():
            del self._active[number]

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        active = [(self._active[output.request], output) for output in outputs if output.request in self._active]
        if active:
            self._send([(generation, (prompt, output)) for (generation, prompt), output in active])

    def _send(self, items: list[tuple[Generation, Item]]) -> None:
        def put() -> None:
            for generation, item in items:
                generation.queue.put_nowait(item)

        # One call for all outputs of a step: each call costs a system call to wake the event loop.
        self._call_in_loop(put)

    def _fail_all(self) -> None:
        # In the event loop, which knows those too that the engine failed to add.
        for generation in self._generations:
            generation.queue.put_nowait(StatusError(503, ENGINE_FAILED))

    def _call_in_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)
