"""What happens to every HTTP request before an endpoint sees it."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class JsonBodies:
    """ASGI middleware that treats every body as JSON, answers 413 to one of more than `max_bytes`, and HEAD like GET.

    `curl -d` calls everything a form, so the content type says nothing about what clients mean.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        scope["method"] = "GET" if scope["method"] == "HEAD" else scope["method"]  # the server leaves out the body
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes or (announced.isdigit() and int(announced) > self.max_bytes):
                # Close the connection, or the server would have to read the rest before the next request.
                reason = f"the body is longer than {self.max_bytes} bytes, the limit of this server"
                raise HTTPException(413, reason, {"Connection": "close"})
            return message

        await self.app(scope, counted, send)
