"""The engine in a thread of its own, used from asyncio.

The thread alternates between taking what the server asked for (new requests, aborts, statistics) and one engine step.
What comes out of a step goes to the event loop in one call. The server refuses what would wait too long.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from megamor.errors import MegamorError
from megamor.serve.engine.request import Engine, EngineStats, RequestOutput, SamplingParams

log = logging.getLogger("megamor.serve")

T = TypeVar("T")


class BusyError(MegamorError):
    """The queue is full; the client should come back later."""


class UnavailableError(MegamorError):
    """The server is shutting down, or the engine has failed."""


@dataclass
class Generation:
    """A request on its way. The continuations in `remaining` have yet to be given out to their end; the engine works on
    those in `unfinished`, and knows the request by `number`."""

    prompt_tokens: int
    remaining: set[int]
    unfinished: set[int]
    outputs: asyncio.Queue[RequestOutput | MegamorError] = field(default_factory=asyncio.Queue)
    number: int | None = None
    has_output: bool = False


class AsyncEngine:
    """Runs `engine` until `close`. All methods but `close` are called from the event loop of `start`.

    Args:
        max_queued_requests: requests without any output yet; one more is refused.
        max_queued_tokens: prompt tokens of those.
    """

    def __init__(self, engine: Engine, *, max_queued_requests: int, max_queued_tokens: int) -> None:
        self._engine = engine
        self._max_requests, self._max_tokens = max_queued_requests, max_queued_tokens
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._active: dict[int, Generation] = {}  # by engine number; of the engine's thread
        self._running: set[int] = set()  # id() of generations; of the event loop
        self._queued_requests = self._queued_tokens = 0  # of the event loop
        self.draining = False
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End the thread after its current step; what is unfinished stays so."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def num_running(self) -> int:
        """Requests that have not been answered to their end."""
        return len(self._running)

    @property
    def num_queued(self) -> int:
        """Those of them without any output."""
        return self._queued_requests

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, unwanted: Set[int] = frozenset()
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one request as they come. Leaving early aborts it and frees what it holds.

        `unwanted` are continuations to abort as well, and may grow between two outputs.

        Raises:
            RequestError: the engine can't serve it.
            BusyError: too much is waiting.
            UnavailableError: the server is shutting down or the engine has failed.
        """
        self.check_accepting()
        if self._queued_requests >= self._max_requests:
            raise BusyError(f"{self._queued_requests} requests are waiting already; try again soon")
        if self._queued_requests and self._queued_tokens + len(prompt) > self._max_tokens:
            waiting = f"{self._queued_tokens} prompt tokens are waiting already"
            raise BusyError(f"{waiting}, {len(prompt)} more are too many; try again soon")
        generation = Generation(len(prompt), set(range(params.n)), set(range(params.n)))
        self._running.add(id(generation))
        self._queued_requests += 1
        self._queued_tokens += len(prompt)
        try:
            self._command(lambda: self._add(generation, prompt, params))
            while generation.remaining:
                output = await generation.outputs.get()
                if isinstance(output, MegamorError):
                    raise output
                if not generation.has_output:
                    generation.has_output = True
                    self._leave_queue(generation)
                if output.index not in generation.remaining:
                    continue  # it was on its way when nobody wanted it any more
                if output.finish_reason is not None:
                    generation.remaining.remove(output.index)
                yield output
                for index in generation.remaining & unwanted:
                    generation.remaining.remove(index)
                    self._command(partial(self._abort, generation, index))
        finally:
            if not generation.has_output:
                self._leave_queue(generation)
            self._running.discard(id(generation))
            for index in generation.remaining:
                self._command(partial(self._abort, generation, index))

    async def stats(self) -> EngineStats:
        """The engine's figures, taken between two steps."""
        return await self.ask(self._engine.stats)

    async def ask(self, question: Callable[[], T]) -> T:
        """Result of `question`, called in the engine's thread between two steps."""
        answer: Future[T] = Future()
        self._command(lambda: answer.set_result(question()))
        return await asyncio.wrap_future(answer)

    def check_accepting(self) -> None:
        """Raise UnavailableError unless new requests are welcome."""
        if self.failure is not None:
            raise UnavailableError("the engine has failed; the server must be restarted")
        if self.draining:
            raise UnavailableError("the server is shutting down; try another one")

    def _leave_queue(self, generation: Generation) -> None:
        self._queued_requests -= 1
        self._queued_tokens -= generation.prompt_tokens

    def _command(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(action)
            self._wake.notify()

    # In the engine's thread from here on.

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._engine.has_work:
                    self._deliver(self._engine.step())
        except Exception as error:  # whatever it is, clients that wait must hear of it
            log.exception("the engine has failed")
            self.failure = error
            failed = UnavailableError("the engine has failed; the server must be restarted")
            for generation in self._active.values():
                self._call(generation.outputs.put_nowait, failed)
            while self._take_commands():
                pass

    def _take_commands(self) -> bool:
        """Do what was asked for, waiting for it if there is nothing else to do; False at the end."""
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

    def _add(self, generation: Generation, prompt: Sequence[int], params: SamplingParams) -> None:
        try:
            if self.failure is not None:
                raise UnavailableError("the engine has failed; the server must be restarted")
            generation.number = self._engine.add_request(prompt, params)
        except MegamorError as error:
            self._call(generation.outputs.put_nowait, error)
            return
        self._active[generation.number] = generation

    def _abort(self, generation: Generation, index: int) -> None:
        if generation.number is not None and self.failure is None:
            self._engine.abort(generation.number, index)
            self._end(generation, index)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        found = [(self._active[output.request], output) for output in outputs if output.request in self._active]
        if found:
            self._call(_put_all, found)
        for generation, output in found:
            if output.finish_reason is not None:
                self._end(generation, output.index)

    def _end(self, generation: Generation, index: int) -> None:
        generation.unfinished.discard(index)
        if not generation.unfinished:
            assert generation.number is not None
            self._active.pop(generation.number, None)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _put_all(outputs: list[tuple[Generation, RequestOutput]]) -> None:
    for generation, output in outputs:
        generation.outputs.put_nowait(output)
