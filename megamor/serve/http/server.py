"""The HTTP server: OpenAI's completions interface and what operators need (SSE, limits, metrics, drain)."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from megamor.errors import MegamorError
from megamor.serve.engine.request import Engine, RequestError
from megamor.serve.http.async_engine import AsyncEngine, BusyError, UnavailableError
from megamor.serve.http.bodies import JsonBodies
from megamor.serve.http.completions import CompletionRun
from megamor.serve.http.monitoring import Monitoring
from megamor.serve.http.text import TextCodec
from megamor.serve.http.wire import (
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    ErrorDetail,
    Model,
    ModelList,
    TokenizeRequest,
)

requests_log = logging.getLogger("megamor.serve.requests")

CLIENT_LEFT = 499  # nginx's number for it
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_STATUS: tuple[tuple[type[MegamorError], int], ...] = ((RequestError, 400), (BusyError, 429), (UnavailableError, 503))
_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 413, 422, 429, 500, 503, 504)
}


@dataclass(frozen=True)
class ServerSettings:
    """What the operator decides. `api_keys` empty: anybody may ask. `request_timeout` in seconds."""

    model: str
    max_model_len: int
    api_keys: tuple[str, ...] = ()
    request_timeout: float = 600.0
    max_queued_requests: int = 1024
    max_queued_tokens: int = 2**20
    max_body_bytes: int = 2**24


class Server:
    """State behind the endpoints. `create_app` makes one."""

    def __init__(self, engine: Engine, codec: TextCodec, settings: ServerSettings) -> None:
        self.codec, self.settings = codec, settings
        self.runner = AsyncEngine(
            engine,
            max_queued_requests=settings.max_queued_requests,
            max_queued_tokens=settings.max_queued_tokens,
        )
        self.monitoring = Monitoring()
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        """404 for another model's name."""
        if name not in (None, "", self.settings.model):
            raise HTTPException(404, f"model {name!r} is not served here; {self.settings.model!r} is")

    def check_key(self, request: Request) -> None:
        """401 without one of the keys."""
        if not self.settings.api_keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Every key is compared, in constant time each: how long it takes tells nothing.
        matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.settings.api_keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise HTTPException(401, "a valid key is needed: send 'Authorization: Bearer KEY'")

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """`POST /v1/completions`."""
        self.check_model(body.model)
        self.runner.check_accepting()
        run = await run_in_threadpool(CompletionRun, body, self.codec, self.runner, self.settings.model)
        if not body.stream:
            answer = await self._until_client_leaves(request, self._whole(run))
            return JSONResponse(answer.model_dump())
        pieces = self._guarded(run)
        # What is wrong with a request shows before its first piece, when a status can still be sent.
        first = await self._until_client_leaves(request, anext(pieces, None))
        return StreamingResponse(self._events(run, pieces, first), media_type="text/event-stream")

    async def _whole(self, run: CompletionRun) -> Completion:
        async with self._accounted(run):
            return await asyncio.wait_for(run.complete(), self.settings.request_timeout)

    async def _guarded(self, run: CompletionRun) -> AsyncIterator[str]:
        """Events of a stream, each a JSON text."""
        deadline = time.monotonic() + self.settings.request_timeout
        async with self._accounted(run), aclosing(run.pieces()) as pieces:  # type: ignore[type-var]
            while True:
                try:
                    piece = await asyncio.wait_for(anext(pieces), deadline - time.monotonic())
                except StopAsyncIteration:
                    break
                yield run.answer([piece]).model_dump_json(exclude_none=False)
            options = run.body.stream_options
            if options is not None and options.include_usage:
                yield run.answer([], run.usage).model_dump_json()

    async def _events(self, run: CompletionRun, pieces: AsyncIterator[str], first: str | None) -> AsyncIterator[str]:
        async with aclosing(pieces):  # type: ignore[type-var]
            try:
                if first is not None:
                    yield f"data: {first}\n\n"
                    async for event in pieces:
                        yield f"data: {event}\n\n"
            except (MegamorError, TimeoutError, asyncio.TimeoutError) as error:
                status, message = self._describe(error)
                yield f"data: {_error_body(status, message).model_dump_json()}\n\n"
            yield "data: [DONE]\n\n"

    @asynccontextmanager
    async def _accounted(self, run: CompletionRun) -> AsyncIterator[None]:
        """Counts and logs the request whichever way it ends."""
        status = CLIENT_LEFT
        try:
            yield
            status = 200
        except (MegamorError, TimeoutError, asyncio.TimeoutError) as error:
            status = self._describe(error)[0]
            raise
        finally:
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

    def _describe(self, error: BaseException) -> tuple[int, str]:
        """Status and message for an error."""
        if isinstance(error, MegamorError):
            return next((status for kind, status in _STATUS if isinstance(error, kind)), 500), str(error)
        return 504, f"not finished within {self.settings.request_timeout:g} s, the limit of this server"

    async def _until_client_leaves(self, request: Request, work: Awaitable[Any]) -> Any:
        """Result of `work`, which is cancelled when the client goes."""
        task = asyncio.ensure_future(work)
        watcher = asyncio.ensure_future(_disconnection(request))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise HTTPException(CLIENT_LEFT, "the client has left")
            return task.result()
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise HTTPException(*self._describe(error)) from error
        finally:
            watcher.cancel()
            task.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)


def create_app(engine: Engine, codec: TextCodec, settings: ServerSettings) -> FastAPI:
    """The ASGI application, ready for uvicorn. `app.state.server` is the `Server` behind it."""
    server = Server(engine, codec, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.runner.start()
        try:
            yield
        finally:
            await run_in_threadpool(server.runner.close)

    app = FastAPI(title="megamor", version=metadata.version("megamor"), lifespan=lifespan, responses=_ANSWERS)
    app.state.server = server
    app.add_middleware(JsonBodies, max_bytes=settings.max_body_bytes)
    _handle_errors(app, server)
    _add_inference(app, server)
    _add_operations(app, server)
    return app


def _add_inference(app: FastAPI, server: Server) -> None:
    guarded = [Depends(server.check_key)]
    model = Model(id=server.settings.model, created=server.created, max_model_len=server.settings.max_model_len)

    @app.post("/v1/completions", dependencies=guarded, response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await server.complete(body, request)

    @app.post("/v1/chat/completions", dependencies=guarded, status_code=400, response_model=ErrorBody)
    async def chat() -> None:
        raise HTTPException(400, "this is a base model without a chat template; use POST /v1/completions")

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> ModelList:
        return ModelList(data=[model])

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model_by_name(name: str) -> Model:
        server.check_model(name)
        return model

    @app.post("/tokenize", dependencies=guarded)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        server.check_model(body.model)
        tokens = await run_in_threadpool(server.codec.encode, body.prompt, body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": server.settings.max_model_len}

    @app.post("/detokenize", dependencies=guarded)
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        server.check_model(body.model)
        return {"prompt": server.codec.decode(body.tokens, skip_special_tokens=False)}


def _add_operations(app: FastAPI, server: Server) -> None:
    runner = server.runner

    @app.get("/health")
    async def health() -> dict[str, str]:
        if runner.failure is not None:
            raise HTTPException(500, "the engine has failed; the server must be restarted")
        return {"status": "up"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        runner.check_accepting()
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": metadata.version("megamor")}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        text = server.monitoring.exposition(await runner.stats(), runner.num_queued, runner.num_running)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        figures = asdict(await runner.stats())
        return {**figures, "requests_running": runner.num_running, "requests_queued": runner.num_queued}

    @app.get("/dashboard", response_class=HTMLResponse)
    async def dashboard() -> str:
        return resources.files("megamor.serve").joinpath("dashboard.html").read_text(encoding="utf-8")


def _handle_errors(app: FastAPI, server: Server) -> None:
    async def answer(status: int, message: str, param: str | None = None) -> JSONResponse:
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return JSONResponse(_error_body(status, message, param).model_dump(), status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def known(_: Request, error: StarletteHTTPException) -> JSONResponse:
        response = await answer(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, int)) or "the body"
        return await answer(400, f"{place}: {first['msg']}", place)

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return await answer(*server._describe(error))

    app.add_exception_handler(MegamorError, ours)


def _error_body(status: int, message: str, param: str | None = None) -> ErrorBody:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=status))


async def _disconnection(request: Request) -> None:
    receive: Callable[[], Awaitable[Any]] = request.receive
    while (await receive())["type"] != "http.disconnect":
        pass
