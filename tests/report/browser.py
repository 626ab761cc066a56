"""A headless Chromium, driven through its debugging protocol: pages at any width, light or dark."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run --hide-scrollbars --remote-debugging-port=0"
)


class Browser:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = count(1)
        self.requests: list[str] = []
        """Addresses that the page has asked for."""
        self.command("Page.enable")
        self.command("Network.enable")

    def command(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result."""
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=30))
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def look(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the screen and the preferred colours."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", features=scheme)

    def open(self, address: str) -> None:
        """Go to a page."""
        self.command("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.command("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str, seconds: float = 120.0) -> None:
        """Wait until the expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(script):
            assert time.monotonic() < deadline, (
                f"{script}: not in {seconds} s:\n{self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        found = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page."""
        path.write_bytes(base64.b64decode(self.command("Page.printToPDF", preferCSSPageSize=True)["data"]))


def poll(found: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until `found`."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Start a browser that keeps its files in `profile`."""
    assert BROWSER is not None
    command = [BROWSER, *QUIET.split(), f"--user-data-dir={profile}", "about:blank"]
    port = profile / "DevToolsActivePort"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            poll(lambda: port.is_file() and port.read_text().count("\n") >= 1)
            number = int(port.read_text().split()[0])
            with connect(f"ws://127.0.0.1:{number}{port.read_text().split()[1]}", max_size=None) as root:
                root.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
                target = json.loads(root.recv(timeout=15))["result"]["targetId"]
                with connect(f"ws://127.0.0.1:{number}/devtools/page/{target}", max_size=None) as tab:
                    yield Browser(tab)
        finally:
            process.terminate()
