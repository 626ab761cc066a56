"""Runs the engine in a thread of its own, for use from asyncio.

A step of the engine blocks for milliseconds, so it must not run in the event loop. The thread alternates between
commands from the event loop (new requests, aborts, statistics) and one engine step. The outputs of a step go to the
event loop in one call, and from there to the queue of each `Generation`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from megamor.errors import MegamorError
from megamor.serve.engine.request import Engine, EngineStats, RequestOutput, SamplingParams

log = logging.getLogger("megamor.serve")

ENGINE_FAILED = "the engine has failed; the server must be restarted"


class BusyError(MegamorError):
    """The queue is full; the client should try again later."""


class UnavailableError(MegamorError):
    """The server is shutting down, or the engine has failed."""


class RequestTimeoutError(MegamorError):
    """The request was not finished within the server's time limit."""


class Generation:
    """The prompts of one HTTP request in progress, made by `AsyncEngine.submit` and used from its event loop.

    `open` [prompt] are the continuations that are neither finished nor dropped. `waiting` [prompt] is the length of a
    prompt without any output yet. Close it when done; that aborts what is still open.
    """

    def __init__(self, runner: AsyncEngine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        self._runner, self.prompts, self.params = runner, prompts, params
        self.open = {number: set(range(params.n)) for number in range(len(prompts))}
        self.waiting = {number: len(prompt) for number, prompt in enumerate(prompts)}
        self.queue: asyncio.Queue[tuple[int, RequestOutput] | MegamorError] = asyncio.Queue()
        """Everything the consumer can wait for: outputs with the number of their prompt, errors, the timeout."""
        self.timer: asyncio.TimerHandle | None = None
        self.engine_numbers: dict[int, int] = {}
        """By prompt; used by the engine's thread alone."""

    async def next(self) -> tuple[int, RequestOutput]:
        """The next output and the number of its prompt.

        Raises:
            RequestError: the engine can't serve a prompt.
            UnavailableError: the engine has failed.
            RequestTimeoutError: the time is up.
        """
        while True:
            item = await self.queue.get()
            if isinstance(item, MegamorError):
                raise item
            prompt, output = item
            self.waiting.pop(prompt, None)
            # A dropped continuation may still have outputs in the queue.
            if output.index in self.open.get(prompt, ()):
                if output.finish_reason is not None:
                    self._forget(prompt, output.index)
                return item

    def drop(self, prompt: int, index: int) -> None:
        """Abort a continuation, unless it is finished."""
        if index in self.open.get(prompt, ()):
            self._forget(prompt, index)
            self._runner.abort(self, prompt, index)

    def close(self) -> None:
        """Abort whatever is open. Nothing more is expected from the engine."""
        if self.timer is not None:
            self.timer.cancel()
        self._runner.end(self)

    def _forget(self, prompt: int, index: int) -> None:
        self.open[prompt].remove(index)
        if not self.open[prompt]:
            del self.open[prompt]


class AsyncEngine:
    """Runs `engine` until `close`. All methods but `close` are called from the event loop of `start`.

    Args:
        max_queued_requests: prompts without any output yet; further ones are refused.
        max_queued_tokens: total length of those prompts.
    """

    def __init__(self, engine: Engine, *, max_queued_requests: int, max_queued_tokens: int) -> None:
        self._engine = engine
        self._max_requests, self._max_tokens = max_queued_requests, max_queued_tokens
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._generations: set[Generation] = set()
        self._active: dict[int, tuple[Generation, int]] = {}
        """Generation and prompt by the engine's number of the request; used by the engine's thread alone."""
        self.draining = False
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End the thread after its current step. Unfinished requests stay unfinished."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def num_running(self) -> int:
        """Prompts that are not completely answered."""
        # A request counts until it is closed, so that draining waits for an answer that is still being sent.
        return sum(max(1, len(generation.open)) for generation in self._generations)

    @property
    def num_queued(self) -> int:
        """Prompts without any output yet."""
        return sum(len(generation.waiting) for generation in self._generations)

    @property
    def num_queued_tokens(self) -> int:
        """Total length of the prompts without any output yet."""
        return sum(sum(generation.waiting.values()) for generation in self._generations)

    def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams, timeout: float) -> Generation:
        """Start to continue `prompts`; errors of the engine and the end of `timeout` [s] come from `Generation.next`.

        Raises:
            BusyError: too much is waiting.
            UnavailableError: the server is shutting down or the engine has failed.
        """
        self.check_accepting()
        requests, tokens = self.num_queued, self.num_queued_tokens
        for prompt in prompts:
            if requests >= self._max_requests:
                raise BusyError(f"{requests} requests are waiting already; try again soon")
            # A single prompt over the limit is accepted when nothing waits, otherwise it could never be served.
            if requests and tokens + len(prompt) > self._max_tokens:
                raise BusyError(
                    f"{tokens} prompt tokens are waiting already, {len(prompt)} more are too many; try again soon"
                )
            requests, tokens = requests + 1, tokens + len(prompt)
        generation = Generation(self, prompts, params)
        expired = RequestTimeoutError(f"not finished within {timeout:g} s, the limit of this server")
        generation.timer = asyncio.get_running_loop().call_later(timeout, generation.queue.put_nowait, expired)
        self._generations.add(generation)
        self._command(partial(self._add, generation))
        return generation

    def abort(self, generation: Generation, prompt: int, index: int) -> None:
        """Stop computing a continuation."""
        self._command(partial(self._abort, generation, [(prompt, index)]))

    def end(self, generation: Generation) -> None:
        """Stop computing whatever of `generation` is open, and forget it."""
        self._generations.discard(generation)
        still_open = [(prompt, index) for prompt, indices in generation.open.items() for index in indices]
        self._command(partial(self._end, generation, still_open))

    async def stats(self) -> EngineStats:
        """The engine's statistics, taken between two steps."""
        answer: Future[EngineStats] = Future()
        self._command(lambda: answer.set_result(self._engine.stats()))
        return await asyncio.wrap_future(answer)

    def check_accepting(self) -> None:
        """Raise UnavailableError if new requests are not accepted."""
        if self.failure is not None:
            raise UnavailableError(ENGINE_FAILED)
        if self.draining:
            raise UnavailableError("the server is shutting down; try another one")

    def _command(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(action)
            self._wake.notify()

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._engine.has_work:
                    self._deliver(self._engine.step())
        except Exception as error:  # of any kind: the clients that wait must be told
            log.exception("the engine has failed")
            self.failure = error
            for generation in {generation for generation, _ in self._active.values()}:
                self._call(generation.queue.put_nowait, UnavailableError(ENGINE_FAILED))
            while self._take_commands():
                pass

    def _take_commands(self) -> bool:
        """Run the commands, waiting for one if there is nothing else to do; False when it is time to end."""
        with self._wake:
            idle = self.failure is not None or not self._engine.has_work
            while idle and not self._commands and not self._closing:
                self._wake.wait()
            commands = list(self._commands)
            self._commands.clear()
            closing = self._closing
        for command in commands:
            command()
        return not closing

    def _add(self, generation: Generation) -> None:
        try:
            for number, prompt in enumerate(generation.prompts):
                if self.failure is not None:
                    raise UnavailableError(ENGINE_FAILED)
                engine_number = self._engine.add_request(prompt, generation.params)
                generation.engine_numbers[number] = engine_number
                self._active[engine_number] = generation, number
        except MegamorError as error:
            self._call(generation.queue.put_nowait, error)

    def _abort(self, generation: Generation, continuations: Sequence[tuple[int, int]]) -> None:
        for prompt, index in continuations:
            number = generation.engine_numbers.get(prompt)
            if number is not None and self.failure is None:
                self._engine.abort(number, index)

    def _end(self, generation: Generation, still_open: Sequence[tuple[int, int]]) -> None:
        self._abort(generation, still_open)
        for number in generation.engine_numbers.values():
            del self._active[number]

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        found = [(*self._active[output.request], output) for output in outputs if output.request in self._active]
        if found:
            # One call for all: waking the event loop costs a system call.
            self._call(_put_all, found)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _put_all(outputs: list[tuple[Generation, int, RequestOutput]]) -> None:
    for generation, prompt, output in outputs:
        generation.queue.put_nowait((prompt, output))
