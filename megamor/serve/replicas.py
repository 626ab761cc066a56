"""Several servers behind one address, on Ray Serve: `megamor serve --replicas`, or a deployment on a cluster.

A replica is the whole application of `http/server.py` with an engine of its own. The front reads a request's body,
chooses a replica for it, and passes on what that answers. Ray starts the replicas, restarts those that fail,
autoscales, and drains. What is decided here is where a request goes, and what its client is told if the replica dies.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from functools import reduce
from threading import Event
from typing import Any, NamedTuple, cast

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.types import ASGIApp, Message

from megamor.errors import ConfigError
from megamor.serve.http.middleware import JsonBodies
from megamor.serve.http.pages import startup_message
from megamor.serve.http.server import KEEP_ALIVE_SECONDS, error_body, handle_errors
from megamor.serve.options import ServerOptions

log = logging.getLogger("megamor.serve")

APPLICATION = "megamor"
PREFIX_CHARACTERS = 256
"""Requests whose prompts begin with the same so many characters (or token ids) go to the same replica if they can."""
SLACK = 8
"""So many requests more than the least busy replica may the one that knows the prefix have."""
ATTEMPTS = 3
"""Replicas that a request is sent to, one after the other, while they die before they answer."""
RUNNING: list[str] = []
"""In the front's process, the names of the replicas now running."""
LOST = "the replica that answered this request has failed; send the request again"


class Scale(NamedTuple):
    """Least and most replicas; Ray chooses between them by the requests under way."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Scale:
        """From "2" or "1-4".

        Raises:
            ConfigError: the text is neither.
        """
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 0 < least <= most:
            raise ConfigError(f"--replicas {text} is neither a number such as 2 nor a range such as 1-4")
        return cls(least, most)


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that probably has its prefix in its cache, unless that is much busier than others.

    The keyword arguments `prefix` and `replica` of a call decide: `replica` is the only one that may answer.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray whenever a replica starts or ends."""
        super().update_replicas(replicas)
        # Ray sends a copy of this class, with copies of the globals that it names. The front has the module.
        from megamor.serve.replicas import RUNNING

        RUNNING[:] = [replica.replica_id.unique_id for replica in replicas]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates; Ray takes the least busy of the first rank that accepts the request."""
        asked = pending_request.kwargs if pending_request else {}
        if only := asked.get("replica"):
            return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == only]]
        prefix, cache = asked.get("prefix"), self.replica_queue_len_cache
        if not prefix or len(candidate_replicas) < 2:
            return [candidate_replicas]
        # The replica with the highest hash of both: a replica that starts or ends changes the place of its own share.
        home = max(candidate_replicas, key=lambda replica: _digest(f"{prefix} {replica.replica_id.unique_id}"))
        least = min(cache.get(replica.replica_id) or 0 for replica in candidate_replicas)
        if (cache.get(home.replica_id) or 0) > least + SLACK:
            return [candidate_replicas]
        return [[home], [replica for replica in candidate_replicas if replica is not home]]


class Replica:
    """One engine and its application, which `build` makes."""

    def __init__(self, build: Callable[[], FastAPI]) -> None:
        self.app = build()
        self.lifespan: Any = None

    async def handle(
        self, scope: dict[str, Any], body: bytes, prefix: str | None = None, replica: str | None = None
    ) -> AsyncIterator[Message]:
        """What the application sends in answer to a request; `prefix` and `replica` are for the router."""
        if self.lifespan is None:  # not in the constructor, which runs in another event loop
            self.lifespan = self.app.router.lifespan_context(self.app)
            await self.lifespan.__aenter__()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        received = iter([{"type": "http.request", "body": body, "more_body": False}])
        left = asyncio.Event()

        async def receive() -> Message:
            for message in received:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        running = asyncio.ensure_future(self.app(scope, receive, messages.put))
        running.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            left.set()
            await running

    def check_health(self) -> None:
        """Ray ends a replica for which this raises, and starts another."""
        if (failure := self.app.state.server.runner.failure) is not None:
            raise failure

    async def __del__(self) -> None:
        """Called by Ray once the running requests have finished."""
        if self.lifespan is not None:
            await self.lifespan.__aexit__(None, None, None)


def front() -> ASGIApp:
    """The application that clients talk to; runs in a deployment of its own."""
    app = FastAPI(title=APPLICATION, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(JsonBodies, max_bytes=ServerOptions.max_body_bytes)
    handle_errors(app)
    replicas = serve.get_deployment_handle(Replica.__name__).options(stream=True)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        answers = await _from_each(replicas, request)
        if isinstance(answers, Response):
            return answers
        return Response(_labelled(answers), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    async def stats(request: Request) -> Response:
        answers = await _from_each(replicas, request)
        if isinstance(answers, Response):
            return answers
        return JSONResponse(reduce(_added, map(json.loads, answers.values()), {"replicas": len(answers)}))

    @app.api_route("/{path:path}", methods=["GET", "POST", "HEAD", "OPTIONS"])
    async def forward(request: Request) -> Response:
        body = await request.body()
        return await _forward(replicas, _scope(request), body, prefix=_prefix(body))

    return app


def _ask(replicas: DeploymentHandle[Any], *request: Any, **where: str | None) -> DeploymentResponseGenerator[Any]:
    return cast("DeploymentResponseGenerator[Any]", replicas.handle.remote(*request, **where))


async def _forward(
    replicas: DeploymentHandle[Any], scope: dict[str, Any], body: bytes, **where: str | None
) -> Response:
    """The answer of a replica. As long as nothing was passed on, another one is asked if the first one dies."""
    for attempt in range(ATTEMPTS):
        messages = _ask(replicas, scope, body, **where)
        try:
            start = await anext(messages)
            break
        except BackPressureError:
            return _error(429, "all replicas are busy; try again soon")
        except RayError as error:
            log.warning("attempt %d: a replica failed before it answered: %s", attempt + 1, error)
    else:
        return _error(503, LOST)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    streams = headers.get("content-type", "").startswith("text/event-stream")

    async def rest() -> AsyncIterator[bytes]:
        try:
            async for message in messages:
                yield message.get("body", b"")
        except RayError:
            if not streams:
                raise  # the connection breaks off: an answer that ends here must not look complete
            yield f"data: {error_body(503, LOST).model_dump_json()}\n\ndata: [DONE]\n\n".encode()
        finally:
            messages.cancel()  # type: ignore[no-untyped-call]

    return StreamingResponse(rest(), start["status"], headers)


async def _from_each(replicas: DeploymentHandle[Any], request: Request) -> dict[str, str] | Response:
    """The text that each replica answers, by its name; or the answer of one that refuses."""
    found: dict[str, str] = {}
    for name in list(RUNNING):
        try:
            start, *parts = [message async for message in _ask(replicas, _scope(request), b"", replica=name)]
        except RayError:
            continue  # it has just ended
        text = b"".join(part.get("body", b"") for part in parts)
        if start["status"] != 200:
            return Response(text, start["status"], media_type="application/json")
        found[name] = text.decode()
    return found


def _scope(request: Request) -> dict[str, Any]:
    """The parts of an ASGI scope that can be sent to another process."""
    kept = "type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server"
    return {"asgi": {"version": "3.0"}, "root_path": ""} | {key: request.scope.get(key) for key in kept}


def _prefix(body: bytes) -> str | None:
    """How the prompt of a request begins, or the first message of a chat; None for a body without either."""
    try:
        asked = json.loads(body)
        return repr(asked.get("prompt") or asked["messages"])[:PREFIX_CHARACTERS]
    except (ValueError, AttributeError, KeyError):
        return None  # whatever it is, the replica says what is wrong with it


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, message).model_dump(), status, {"Retry-After": "1"})


def _added(one: Any, other: Any) -> Any:
    """Sum of two replicas' figures: of numbers, and within lists and dictionaries."""
    if isinstance(one, dict):
        return {**one, **other, **{key: _added(one[key], other[key]) for key in one.keys() & other.keys()}}
    if isinstance(one, list):
        longer, shorter = sorted((one, other), key=len, reverse=True)
        return [_added(*pair) for pair in zip(longer, shorter, strict=False)] + longer[len(shorter) :]
    return one + other


def _labelled(texts: dict[str, str]) -> bytes:
    """The metrics of all replicas, each with the label `replica`."""
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples]

    class Merged(Collector):
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry()
    registry.register(Merged())
    return generate_latest(registry)


def application(
    build: Callable[[], FastAPI], scale: Scale, options: ServerOptions, ongoing: int, gpus: int
) -> Application:
    """What Ray Serve deploys: replicas that `build` makes, with `gpus` each, behind a front.

    A replica accepts up to `ongoing` requests; with a range of replicas, Ray aims at half of them.
    """
    count: dict[str, Any] = {"num_replicas": scale.least}
    if scale.least < scale.most:
        target = {"min_replicas": scale.least, "max_replicas": scale.most, "target_ongoing_requests": ongoing / 2}
        count = {"autoscaling_config": target}
    replica = serve.deployment(
        max_ongoing_requests=ongoing,
        max_queued_requests=options.max_queued_requests,
        graceful_shutdown_timeout_s=options.drain_timeout,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=f"{__name__}.{PrefixRouter.__name__}"),  # type: ignore[arg-type]
        **count,
    )(Replica)
    ingress = serve.deployment(
        name="Front",
        max_ongoing_requests=2**16,
        graceful_shutdown_timeout_s=options.drain_timeout,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress(front)())
    return ingress.bind(replica.bind(build))


def run(app: Application, options: ServerOptions) -> None:
    """Serve `app` on this machine, or on the cluster that RAY_ADDRESS names, until SIGTERM or Ctrl-C."""
    ray.init()
    port = options.port or _free_port(options.host)
    serve.start(http_options={"host": options.host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_SECONDS})
    serve.run(app, name=APPLICATION, route_prefix="/")
    stop = Event()
    for each in (signal.SIGTERM, signal.SIGINT):  # now, since Ray sets its own
        signal.signal(each, lambda *_: stop.set())
    print(f"running on http://{options.host}:{port}\n{startup_message(options.host, port)}", flush=True)
    stop.wait()
    log.info("finishing the running requests")
    serve.delete(APPLICATION)  # shutting down ends the process that holds the connections at once
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
