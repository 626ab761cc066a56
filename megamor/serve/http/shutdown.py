"""Running the application until a signal, then letting what has begun come to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from types import FrameType

import uvicorn

from megamor.serve.http.async_engine import AsyncEngine

log = logging.getLogger("megamor.serve")
_POLL_SECONDS = 0.05


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT, goes on answering until nothing runs, at most `drain_seconds`; then ends.

    Meanwhile new requests get 503 and /ready says so, so that a load balancer turns away.
    """

    def __init__(self, config: uvicorn.Config, runner: AsyncEngine, drain_seconds: float) -> None:
        super().__init__(config)
        self._runner, self._drain_seconds = runner, drain_seconds
        self._drain_until: float | None = None

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
                await asyncio.sleep(_POLL_SECONDS)  # the last bytes of the last answers
                return True
        return await super().on_tick(counter)
