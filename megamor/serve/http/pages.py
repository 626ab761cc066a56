"""What people open in a browser: `/` leads to the dashboard, `/docs` describes the API. No page needs a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, RedirectResponse

FACTS = "FACTS_OF_THE_MODEL"
"""In `dashboard.html`, what becomes the facts as JSON."""


def startup_message(host: str, port: int) -> str:
    """The addresses of a server that listens, for its start; of one that listens everywhere, those for this machine."""
    name = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    paths = {"API": "/v1", "dashboard": "/dashboard", "API reference": "/docs", "metrics": "/metrics"}
    return "\n".join(f"{what:>15}: http://{name}:{port}{path}" for what, path in paths.items())


def add_pages(app: FastAPI, facts: Mapping[str, str]) -> None:
    """Add the pages to `app`; the dashboard shows the `facts`."""
    folder = resources.files(__package__)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("dashboard")

    @app.get("/dashboard", response_class=HTMLResponse)
    async def dashboard() -> str:
        # "<" is escaped so that no name can end the script.
        content = json.dumps(facts).replace("<", "\\u003c")
        return folder.joinpath("dashboard.html").read_text(encoding="utf-8").replace(FACTS, content)

    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    async def docs() -> str:
        return folder.joinpath("docs.html").read_text(encoding="utf-8")
