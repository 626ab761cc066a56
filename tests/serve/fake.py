"""An engine with scripted answers, and a server on a free port that runs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megamor.codec import TextCodec
from megamor.serve.engine.request import EngineStats, RequestError, RequestOutput, SamplingParams, TokenLogprob
from megamor.serve.http.chat import ChatTemplate
from megamor.serve.http.server import DrainingServer, create_app
from megamor.serve.options import ServerOptions

CONTEXT = 512
MODEL = "tiny"


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that most characters beyond ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass
class Scripted:
    """A running request: `left` [n] holds the tokens that each continuation has yet to produce."""

    prompt: list[int]
    params: SamplingParams
    left: list[list[int]]
    first: bool = True


@dataclass
class FakeEngine:
    """Continues every prompt with the ids of `answer(prompt text, index)`, one token a step.

    A step takes `seconds`; `fail` makes the next step raise; `gate` blocks all steps until it is set.
    """

    answer: Callable[[str, int], str]
    seconds: float = 0.0
    codec: TextCodec = field(default_factory=lambda: TextCodec(byte_tokenizer()))
    running: dict[int, Scripted] = field(default_factory=dict)
    aborted: list[int] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    fail: bool = False
    generated: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    context_length: int = CONTEXT
    description: dict[str, str] = field(default_factory=lambda: {"scheduling policy": "scripted </script>"})

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        if not prompt:
            raise RequestError("the prompt is empty")
        if len(prompt) + params.max_tokens > CONTEXT:
            param = "max_tokens" if len(prompt) < CONTEXT else "prompt"
            raise RequestError(f"{len(prompt)} + {params.max_tokens} tokens are over the context of {CONTEXT}", param)
        number = len(self.params)
        self.params.append(params)
        text = self.codec.decode(prompt)
        left = [self.codec.encode(self.answer(text, index))[: params.max_tokens] for index in range(params.n)]
        self.running[number] = Scripted(list(prompt), params, left)
        return number

    def step(self) -> list[RequestOutput]:
        self.gate.wait(10)
        time.sleep(self.seconds)
        if self.fail:
            raise RuntimeError("broken on purpose")
        outputs = []
        for number, request in list(self.running.items()):
            for index, tokens in enumerate(request.left):
                if request.first or tokens:
                    outputs.append(self._advance(number, index, request, tokens))
            request.first = False
            if not any(request.left):
                del self.running[number]
        return outputs

    def _advance(self, number: int, index: int, request: Scripted, tokens: list[int]) -> RequestOutput:
        new = tuple(tokens[:1])
        del tokens[:1]
        self.generated += len(new)
        wanted, asked = request.params.logprobs, request.params.prompt_logprobs
        prompt_logprobs = None
        if asked is not None and request.first and index == 0:
            prompt_logprobs = (None, *(self._logprob(token) for token in request.prompt[1:]))
        return RequestOutput(
            number,
            index,
            new,
            depths=(2,) * len(new),
            logprobs=None if wanted is None else tuple(self._logprob(token) for token in new),
            prompt_logprobs=prompt_logprobs,
            finish_reason=None if tokens else "length",
        )

    def _logprob(self, token: int) -> TokenLogprob:
        return TokenLogprob(token, -0.5, 1, ((token, -0.5),))

    def abort(self, request: int, index: int | None = None) -> None:
        if request not in self.running:
            return
        left = self.running[request].left
        for number in range(len(left)) if index is None else (index,):
            self.dropped.append((request, number))
            left[number] = []
        if not any(left):
            del self.running[request]
            self.aborted.append(request)

    def stats(self) -> EngineStats:
        return EngineStats(
            resident=len(self.running),
            in_core=[1, 0, 2],
            pages_total={"edge": 8, "core": 16},
            pages_used={"edge": 2, "core": 4},
            generated_tokens=self.generated,
            width_counts={1: 3, 7: 1},
            depth_counts=[0, 5, 4, 1],
        )


@dataclass
class Running:
    """A running server."""

    url: str
    engine: FakeEngine
    uvicorn: DrainingServer
    thread: threading.Thread

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Poll until `condition` holds; fail after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition did not become true"
            time.sleep(0.01)


@contextmanager
def serving(
    engine: FakeEngine, drain_seconds: float = 10.0, chat: ChatTemplate | None = None, **settings: object
) -> Iterator[Running]:
    """A real server on a free port of the loopback interface."""
    app = create_app(engine, engine.codec, MODEL, ServerOptions(**settings), chat)  # type: ignore[arg-type]
    config = uvicorn.Config(app, "127.0.0.1", 0, log_level="warning", timeout_graceful_shutdown=2)
    server = DrainingServer(config, app.state.server.runner, drain_seconds)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    running = Running("", engine, server, thread)
    running.wait_until(lambda: server.started)
    running.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield running
    finally:
        engine.gate.set()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
