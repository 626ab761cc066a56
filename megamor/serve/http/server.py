"""The HTTP server: OpenAI's completions API, and what operators need (limits, metrics, graceful shutdown).

A token takes one path: the engine's thread puts the outputs of a step into the queue of their request, and the handler
of the request takes them from there, turns them into text, and writes them to the client. An error of the engine and
the end of the time limit arrive in the same queue.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from socket import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from megamor import __version__
from megamor.codec import TextCodec
from megamor.errors import MegamorError, TextError
from megamor.serve.engine.request import Engine, RequestError, describe_invalid
from megamor.serve.http import wire
from megamor.serve.http.async_engine import ENGINE_FAILED, AsyncEngine, Generation, StatusError
from megamor.serve.http.chat import ChatCompletion, ChatRequest, ChatRun, ChatTemplate
from megamor.serve.http.completions import CompletionRun
from megamor.serve.http.middleware import JsonBodies
from megamor.serve.http.monitoring import Monitoring
from megamor.serve.http.pages import add_pages, startup_message
from megamor.serve.options import ServerOptions

log = logging.getLogger("megamor.serve")
requests_log = logging.getLogger("megamor.serve.requests")

CLIENT_LEFT = 499
# Longer than clients and proxies keep an idle connection. Otherwise the server could close it just when they send.
KEEP_ALIVE_SECONDS = 75
LAST_BYTES_SECONDS = 0.05
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": wire.ErrorBody} for status in (400, 401, 404, 413, 422, 429, 500, 503, 504)
}


class Server:
    """State behind the endpoints; `create_app` makes one."""

    def __init__(
        self, engine: Engine, codec: TextCodec, name: str, options: ServerOptions, chat: ChatTemplate | None
    ) -> None:
        self.codec, self.options, self.chat = codec, options, chat
        self.model = wire.Model(id=name, created=int(time.time()), max_model_len=engine.context_length)
        self.runner = AsyncEngine(engine, options)
        self.monitoring = Monitoring()

    def check_model(self, name: str | None) -> None:
        """404 for the name of another model."""
        if name not in (None, "", self.model.id):
            raise StatusError(404, f"model {name!r} is not served here; {self.model.id!r} is", "model")

    def check_key(self, request: Request) -> None:
        """401 without one of the keys."""
        if not self.options.api_keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # All keys are compared, each in constant time: otherwise response times would tell how much of a key is right.
        # A header arrives as the characters of its bytes.
        found = given.strip().encode("latin-1")
        matches = [hmac.compare_digest(found, key.encode()) for key in self.options.api_keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise HTTPException(401, "a valid key is needed: send 'Authorization: Bearer KEY'")

    def run_of(self, body: wire.CompletionRequest | ChatRequest) -> CompletionRun:
        """What answers a body.

        Raises:
            RequestError, TextError: it can't be served.
        """
        if isinstance(body, wire.CompletionRequest):
            return CompletionRun(body, self.codec, self.runner, self.model.id, body.prompts(self.codec))
        if self.chat is None:
            raise RequestError("this is a base model without a chat template; use POST /v1/completions", "messages")
        return ChatRun(self.chat, body, self.codec, self.runner, self.model.id)

    async def complete(self, body: wire.CompletionRequest | ChatRequest, request: Request) -> Response:
        """`POST /v1/completions` and `POST /v1/chat/completions`."""
        self.check_model(body.model)
        self.runner.check_accepting()
        # In a thread: tokenizing a long prompt would hold up the streams of all other clients.
        run = await run_in_threadpool(self.run_of, body)
        if not body.stream:
            with self._generation(run, request) as generation:
                return JSONResponse((await run.complete(generation)).model_dump())
        events = self._events(run, request)
        # What is wrong with a request shows before its first output, when a status can still be sent.
        await anext(events)
        # Proxies such as nginx would hold events back until their buffer is full.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(self, run: CompletionRun, request: Request) -> AsyncIterator[str]:
        """Server-sent events. The first one is empty and comes with the first output; an error before it is raised."""
        started, options = False, run.body.stream_options or wire.StreamOptions()
        try:
            with self._generation(run, request) as generation:
                while generation.open:
                    choices = await run.next_choices(generation)
                    if not started:
                        started = True
                        yield ""
                    for choice in choices:
                        continuous = options.include_usage and options.continuous_usage_stats
                        yield _event(run.answer([choice], run.usage if continuous else None))
                if options.include_usage:
                    yield _event(run.answer([], run.usage))
        except MegamorError as error:
            if not started:
                raise
            yield _event(error_body(_status_of(error), str(error), _param_of(error)))
        yield "data: [DONE]\n\n"

    @contextmanager
    def _generation(self, run: CompletionRun, request: Request) -> Iterator[Generation]:
        """Submit `run` to the engine. However it ends, it is counted and logged."""
        status = CLIENT_LEFT  # if the handler is cancelled, which happens when the client of a stream leaves
        try:
            with self.runner.generation(run.prompts, run.params, run.body.fits) as generation:
                watcher = asyncio.ensure_future(_wait_until_client_leaves(request, generation))
                try:
                    yield generation
                finally:
                    watcher.cancel()
            status = 200
        except MegamorError as error:
            status = _status_of(error)
            raise
        finally:
            self._record(run, status)

    def _record(self, run: CompletionRun, status: int) -> None:
        ended = time.monotonic()
        if status == 200:
            self.monitoring.finished(run, ended)
        else:
            self.monitoring.failed(status)
        first = [choice.times[0] for choice in run.choices if choice.times]
        record = {
            "id": run.id,
            "status": status,
            "prompt_tokens": run.usage.prompt_tokens,
            "completion_tokens": run.usage.completion_tokens,
            "finish": [choice.finish_reason for choice in run.choices],
            "first_token_seconds": round(min(first) - run.arrived, 6) if first else None,
            "seconds": round(ended - run.arrived, 6),
        }
        requests_log.info(json.dumps(record))


def create_app(
    engine: Engine, codec: TextCodec, name: str, options: ServerOptions, chat: ChatTemplate | None = None
) -> FastAPI:
    """The ASGI application that serves `engine` as model `name`. `app.state.server` is the `Server` behind it."""
    server = Server(engine, codec, name, options, chat)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.runner.start()
        try:
            yield
        finally:
            await run_in_threadpool(server.runner.close)

    app = FastAPI(
        title="megamor", version=__version__, lifespan=lifespan, responses=_ANSWERS, docs_url=None, redoc_url=None
    )
    app.state.server = server
    app.add_middleware(JsonBodies, max_bytes=options.max_body_bytes)
    if options.cors_origins:
        allowed = options.cors_origins.split(",")
        app.add_middleware(CORSMiddleware, allow_origins=allowed, allow_methods=["*"], allow_headers=["*"])
    handle_errors(app)
    _add_inference(app, server)
    _add_operations(app, server)
    add_pages(app, {"model": name, **engine.description})
    return app


def serve(app: FastAPI, log_level: str) -> None:
    """Run the application until a signal."""
    options = app.state.server.options
    config = uvicorn.Config(
        app,
        options.host,
        options.port,
        log_level=log_level,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    DrainingServer(config, app.state.server.runner, options.drain_timeout).run()


def _add_inference(app: FastAPI, server: Server) -> None:
    guarded = [Depends(server.check_key)]

    @app.post("/v1/completions", dependencies=guarded, response_model=wire.Completion)
    async def completions(body: wire.CompletionRequest, request: Request) -> Response:
        return await server.complete(body, request)

    @app.post("/v1/chat/completions", dependencies=guarded, response_model=ChatCompletion)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await server.complete(body, request)

    @app.get("/v1/models/", dependencies=guarded, include_in_schema=False)
    @app.get("/v1/models", dependencies=guarded)
    async def models() -> wire.ModelList:
        return wire.ModelList(data=[server.model])

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model_by_name(name: str) -> wire.Model:
        server.check_model(name)
        return server.model

    @app.get("/tokenizer_info", dependencies=guarded)
    async def tokenizer_info() -> dict[str, Any]:
        end = server.codec.end_of_text.token if server.codec.end_of_text else None
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": server.model.max_model_len,
            "vocab_size": server.codec.tokenizer.get_vocab_size(),
            "bos_token": server.codec.begin_of_text or None,
            "eos_token": end,
            "pad_token": end,
            "chat_template": server.chat.source if server.chat else None,
        }

    @app.post("/tokenize", dependencies=guarded)
    async def tokenize(body: wire.TokenizeRequest) -> dict[str, Any]:
        server.check_model(body.model)
        encode = partial(server.codec.encode, what="prompt")
        if "add_special_tokens" in body.model_fields_set:
            # lm-eval asks so for the ids of texts, and for that of the end of text by its name.
            encode = partial(wire.encode_name, server.codec)
        tokens = await run_in_threadpool(encode, body.prompt, add_special_tokens=body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": server.model.max_model_len}

    @app.post("/detokenize", dependencies=guarded)
    async def detokenize(body: wire.DetokenizeRequest) -> dict[str, str]:
        server.check_model(body.model)
        unknown = next((token for token in body.tokens if server.codec.tokenizer.id_to_token(token) is None), None)
        if unknown is not None:
            raise RequestError(f"tokens: the tokenizer has no token with id {unknown}", "tokens")
        return {"prompt": server.codec.decode(body.tokens, skip_special_tokens=False)}


def _add_operations(app: FastAPI, server: Server) -> None:
    runner = server.runner

    @app.get("/health")
    async def health() -> dict[str, str]:
        if runner.failure is not None:
            raise HTTPException(500, ENGINE_FAILED)
        return {"status": "up"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        runner.check_accepting()
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        text = server.monitoring.exposition(await runner.stats(), len(runner.waiting), runner.num_running)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        figures = vars(await runner.stats())
        requests = {"requests_running": runner.num_running, "requests_queued": len(runner.waiting)}
        return {**figures, **requests, "recent_latencies": server.monitoring.recent_latencies(time.monotonic())}


def handle_errors(app: FastAPI) -> None:
    """Every error is answered in OpenAI's form."""

    def answer(status: int, message: str, param: str | None = None) -> JSONResponse:
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return JSONResponse(error_body(status, message, param).model_dump(), status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def known(_: Request, error: StarletteHTTPException) -> JSONResponse:
        response = answer(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # The place in a body that is no JSON is a number of characters.
        place = () if first["type"] == "json_invalid" else first["loc"][1:]
        described = describe_invalid(first, place)
        return answer(400, str(described), described.param)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return answer(500, f"an error of this server, whose log has more: {type(error).__name__}")

    async def ours(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MegamorError)
        return answer(_status_of(error), str(error), _param_of(error))

    app.add_exception_handler(MegamorError, ours)


def _param_of(error: MegamorError) -> str | None:
    """The field that an error is about. The message of a TextError begins with it, as in `prompt 1: ...`."""
    return re.split(r"\W", str(error))[0] if isinstance(error, TextError) else getattr(error, "param", None)


def _status_of(error: MegamorError) -> int:
    if isinstance(error, StatusError):
        return error.status
    return 400 if isinstance(error, RequestError | TextError) else 500


def error_body(status: int, message: str, param: str | None = None) -> wire.ErrorBody:
    """OpenAI's form of an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return wire.ErrorBody(error=wire.ErrorDetail(message=message, type=kind, param=param, code=status))


def _event(content: BaseModel) -> str:
    # ASCII: some clients take U+2028 and U+0085 for the end of a line.
    return f"data: {content.model_dump_json(ensure_ascii=True)}\n\n"


async def _wait_until_client_leaves(request: Request, generation: Generation) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.queue.put_nowait(StatusError(CLIENT_LEFT, "the client has left"))


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT, finishes the running requests for at most `drain_seconds`, then ends.

    Meanwhile new requests are answered with 503, and /ready tells load balancers to send them elsewhere.
    """

    def __init__(self, config: uvicorn.Config, runner: AsyncEngine, drain_seconds: float) -> None:
        super().__init__(config)
        self._runner, self._drain_seconds = runner, drain_seconds
        self._drain_until: float | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn; when it returns, the port accepts connections."""
        await super().startup(sockets)
        if self.started:
            # With --port 0 the system has chosen one.
            port = self.servers[0].sockets[0].getsockname()[1]
            print(startup_message(self.config.host, port), file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end."""
        if self._drain_until is None:
            log.info("draining: %d requests are running", self._runner.num_running)
            self._runner.draining = True
            self._drain_until = time.monotonic() + self._drain_seconds
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        if self._drain_until is not None:
            left = self._drain_until - time.monotonic()
            if not self._runner.num_running or left <= 0:
                if self._runner.num_running:
                    log.warning("%d requests are cut off after %g s", self._runner.num_running, self._drain_seconds)
                await asyncio.sleep(LAST_BYTES_SECONDS)  # the last answers are still being written
                return True
        return await super().on_tick(counter)
