"""The dashboard in a real, headless browser."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from tests.serve.fake import FakeEngine, serving

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
)


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
def test_the_page_shows_the_engine_at_work(tmp_path: Path) -> None:
    with serving(FakeEngine(lambda *_: "x" * 400, seconds=0.05)) as server:
        body = {"prompt": "a", "max_tokens": 400}
        address = server.url + "/v1/completions"
        client = threading.Thread(target=lambda: httpx.post(address, json=body, timeout=30))
        client.start()
        server.wait_until(lambda: server.engine.generated > 0)
        assert BROWSER is not None
        options = [f"--user-data-dir={tmp_path}", "--timeout=4000", "--virtual-time-budget=4000", "--dump-dom"]
        command = [BROWSER, *QUIET.split(), *options, server.url + "/dashboard"]
        page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        server.engine.seconds = 0
        client.join(20)
    assert '<span class="note" id="state">at work</span>' in page
    assert '<b id="resident">1</b>' in page
    assert '<b id="pages">25.0%</b>' in page
    assert page.partition("<script>")[0].count('class="bar"') == 4, "three recursions and the held exits"
    assert "<polyline" in page, "the page polls"
