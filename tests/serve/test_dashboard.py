"""The dashboard and the API reference in a real, headless browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from megamor.serve.engine.request import EngineStats
from megamor.serve.http.monitoring import Monitoring
from tests.serve.fake import FakeEngine, serving

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")


def page_of(url: str, directory: Path) -> str:
    """The page's elements after four seconds of its own time, which stands still while it waits for the server."""
    assert BROWSER is not None
    options = [f"--user-data-dir={directory}", "--timeout=30000", "--virtual-time-budget=4000"]
    command = [BROWSER, *QUIET.split(), *options, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@dataclass
class BusyEngine(FakeEngine):
    """Its counters grow with each look at them."""

    looks: int = 0

    def stats(self) -> EngineStats:
        self.looks += 1
        counts, launches = [0, 5 + 8 * self.looks, 4 + 4 * self.looks, 1 + 4 * self.looks], self.looks
        core = {"launches": {"core": 4 * launches, "exit": 2 * launches}, "rows": {"core": 28 * launches}}
        mixed = Counter({1: 3 * launches, 2: launches})
        held = 4 * (self.looks % 2)
        return replace(super().stats(), depth_counts=counts, mixed_depths=mixed, held_exits=held, **core)  # type: ignore[arg-type]


def test_the_page_shows_the_engine_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"TTFT": Counter({0.3: 4, 0.1: 50, 1.2: 1, 0.2: 45}), "ITL": Counter({0.0045: 3}), "E2E": Counter[float]()}
    monkeypatch.setattr(Monitoring, "recent_latencies", lambda *_: seen)
    with serving(BusyEngine(lambda *_: "x" * 400, seconds=0.05)) as server:
        body = {"prompt": "a", "max_tokens": 400}
        address = server.url + "/v1/completions"
        client = threading.Thread(target=lambda: httpx.post(address, json=body, timeout=30))
        client.start()
        server.wait_until(lambda: server.engine.generated > 0)
        page = page_of(server.url, tmp_path).partition("<script>")[0]
        server.engine.seconds = 0
        client.join(20)
    assert '<span id="model">tiny</span> <span class="note" id="state">at work</span>' in page
    assert "scheduling policy: scripted &lt;/script&gt;" in page
    assert '<b id="resident">1</b>' in page
    assert '<b id="pages">25.0%</b>' in page
    # Nearest rank: of 100 times to the first token, the 50th, 95th and 99th.
    cells = {row[0]: row[1:] for row in (re.findall("<td>(.*?)</td>", row) for row in page.split("<tr>")) if row}
    assert cells == {
        "TTFT": ["100", "200", "300", "100"],
        "ITL": ["4.5", "4.5", "4.5", "3"],
        "E2E": ["–", "–", "–", "0"],
    }
    bars = dict(re.findall(r'class="bar"><span>(.*?)</span>.*?<span>(.*?)</span>', page))
    shares = {name: value.partition(" (")[0] for name, value in bars.items() if "(" in value}
    assert shares == {"1 recursion": "50%", "2 recursions": "25%", "3 recursions": "25%"}
    assert {name: bars[f"recursion {name}"] for name in "123"} == {"1": "1.0", "2": "0.0", "3": "2.0"}
    assert 0 < float(bars["held exits"]) < 4, "a mean of several looks"
    for name, value in {"depth": "1.75", "hold": "2.0", "mixed": "25%", "width": "7.0"}.items():
        assert f'<b id="{name}">{value}</b>' in page
    # Each step has 16 exits in 4 core batches: on average 4 rows at recursion 1, 2 at 2, 1 at 3.
    widths = page.partition('id="widths"')[2]
    assert "<span>8</span><span>4</span><span>0</span>" in widths
    edges = [{float(point.split(",")[1]) for point in area.split()} for area in re.findall('points="(.*?)"', widths)]
    assert edges == [{100.0, 50.0}, {50.0, 25.0}, {25.0, 12.5}]
    assert "<dt>Held exits</dt>" in page


def test_the_reference_lists_the_api(tmp_path: Path) -> None:
    with serving(FakeEngine(lambda *_: "x")) as server:
        page = page_of(server.url + "/docs", tmp_path)
        paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    assert re.findall(r"<summary><b>(\w+)</b> (.*?)</summary>", page) == [
        (method.upper(), path) for path, methods in paths.items() for method in methods
    ]
    assert re.search(r'<h3 id="CompletionRequest">.*?<td>max_tokens</td><td>integer ≥ 0.*?<td>default 16</td>', page)
