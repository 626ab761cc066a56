"""What people see: addresses at the start, the pages, and the figures that the dashboard reads."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from megamor.serve.http.monitoring import Monitoring
from megamor.serve.http.pages import startup_message
from tests.serve.fake import FakeEngine, serving


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("::", "localhost"), ("::1", "[::1]"), ("node7", "node7")],
)
def test_the_start_names_addresses_that_a_browser_can_open(host: str, address: str) -> None:
    lines = startup_message(host, 8000).splitlines()
    assert [line.split()[-1] for line in lines] == [
        f"http://{address}:8000{path}" for path in ("/v1", "/dashboard", "/docs", "/metrics")
    ]


def test_pages(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeEngine(lambda *_: "x")) as server:
        shown = capsys.readouterr().err
        # The port is open by the time the addresses are shown.
        for address in re.findall(r"http://\S+/(?:dashboard|docs|metrics)", shown):
            assert address.startswith(server.url + "/")
            assert httpx.get(address).status_code == 200
        assert shown.count("http://") == 4
        root = httpx.get(server.url, follow_redirects=True)
        assert root.url == server.url + "/dashboard"
        assert '"model": "tiny"' in root.text
        assert '"scripted \\u003c/script>"' in root.text, "a name can't end the script"
        docs = httpx.get(server.url + "/docs").text
        for page in (root.text, docs):
            assert not re.findall(r"https?://|//cdn", page), "needs no network"
        assert "/docs" not in httpx.get(server.url + "/openapi.json").json()["paths"]


def answered(arrived: float, *times: float) -> Any:
    choice = SimpleNamespace(times=[*times], finish_reason="length")
    usage = SimpleNamespace(prompt_tokens=1, completion_tokens=len(times))
    return SimpleNamespace(choices=[choice], arrived=arrived, usage=usage)


def test_recent_latencies() -> None:
    monitoring = Monitoring()
    assert monitoring.recent_latencies(0.0) == {"TTFT": {}, "ITL": {}, "E2E": {}}
    monitoring.finished(answered(1000.0, 1000.5, 1000.5104, 1000.5208), 1001.0)
    monitoring.finished(answered(1100.0, 1100.123, 1100.1334), 1101.26)
    both = {"TTFT": {0.5: 1, 0.12: 1}, "ITL": {0.01: 3}, "E2E": {1.0: 1, 1.3: 1}}
    assert monitoring.recent_latencies(1102.0) == both
    # The first request ended more than two minutes ago.
    assert monitoring.recent_latencies(1126.0) == {"TTFT": {0.12: 1}, "ITL": {0.01: 1}, "E2E": {1.3: 1}}
    assert not any(monitoring.recent_latencies(1300.0).values())
