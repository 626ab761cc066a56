"""The real server under load and with misbehaving clients: no leak, no hang, no accepted request lost."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from megamor.bench.load import Load, send, summarise
from tests.serve.process import CONTEXT, Process, server_process, trained_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return trained_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def process(checkpoint: Path, tmp_path: Path) -> Iterator[Process]:
    with server_process(checkpoint, tmp_path, "--kv-memory", "4MiB", "--log-level", "info") as found:
        yield found


def load(process: Process, requests: int, **options: int) -> dict:
    """Figures of `requests` requests sent over 64 concurrent connections."""
    sent = Load(process.url, requests, max_concurrency=64, **options)  # type: ignore[arg-type]
    return summarise(asyncio.run(send(sent)), {"e2el": 60_000.0})


def check_nothing_is_held(process: Process) -> None:
    stats = process.wait_until_idle()
    assert set(stats["pages_used"].values()) == {0}, stats
    assert (stats["held_exits"], sum(stats["in_core"])) == (0, 0)


@pytest.mark.parametrize("requests", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_load_leaves_nothing_behind(process: Process, requests: int, record_property: pytest.RecordProperty) -> None:
    load(process, 64, input_tokens=20, output_tokens=10)  # lazy initialisation is done by now
    check_nothing_is_held(process)
    files, memory = process.open_files(), process.memory()
    figures = load(process, requests, input_tokens=20, output_tokens=10)
    check_nothing_is_held(process)
    assert figures["failed"] == 0, figures["first_error"]
    assert figures["goodput_per_second"] == figures["requests_per_second"], "no request hangs"
    assert process.open_files() <= files + 8
    assert process.memory() <= memory + 2**26
    assert process.stats()["generated_tokens"] == 10 * (64 + requests)
    for name in ("requests_per_second", "output_tokens_per_second", "ttft_ms", "itl_ms"):
        record_property(name, figures[name])


def test_disconnects_free_everything(process: Process) -> None:
    draw = random.Random(0)

    def leave_early() -> None:
        body = {"prompt": "the dog", "max_tokens": 200, "stream": draw.random() < 0.7, "n": draw.choice([1, 1, 2])}
        try:
            with httpx.stream(
                "POST", process.url + "/v1/completions", json=body, timeout=0.05 + draw.random()
            ) as answer:
                for number, _ in enumerate(answer.iter_lines()):
                    if number > draw.randrange(20):
                        return
        except httpx.TimeoutException:
            return

    def client() -> None:
        for _ in range(25):
            leave_early()

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    check_nothing_is_held(process)
    figures = load(process, 16, input_tokens=8, output_tokens=8)
    assert figures["failed"] == 0
    log = process.log.read_text(encoding="utf-8")
    assert "Traceback" not in log, log


def test_slow_readers_delay_no_other_client(process: Process) -> None:
    address = urlsplit(process.url)
    body = json.dumps({"prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    idle = []
    for _ in range(8):  # clients that send a request and never read the answer
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect((address.hostname, address.port))
        connection.sendall(head + body)
        idle.append(connection)
    figures = load(process, 32, input_tokens=8, output_tokens=8)
    assert figures["failed"] == 0
    assert figures["e2el_ms"]["p99"] < 30_000
    for connection in idle:
        connection.close()
    check_nothing_is_held(process)


def test_an_idle_connection_stays_open_longer_than_clients_wait(process: Process) -> None:
    """httpx and many others close idle connections after 5 seconds: the server must keep them open longer."""
    connection = HTTPConnection(urlsplit(process.url).netloc, timeout=30)
    for pause in (6.0, 0.0):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        time.sleep(pause)
    connection.close()


def test_prompts_of_every_length_up_to_the_context(process: Process) -> None:
    for length in (1, 2, CONTEXT // 2, CONTEXT - 1):
        body = {"prompt": [97] * length, "max_tokens": CONTEXT - length, "ignore_eos": True}
        answer = httpx.post(process.url + "/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] == CONTEXT
    for length, more in ((CONTEXT, 1), (CONTEXT + 1, 0), (CONTEXT * 100, 1)):
        body = {"prompt": [97] * length, "max_tokens": more}
        answer = httpx.post(process.url + "/v1/completions", json=body, timeout=120)
        assert answer.status_code == 400, answer.text
        assert str(CONTEXT) in answer.json()["error"]["message"]
    assert httpx.post(process.url + "/v1/completions", json={"prompt": [256]}).status_code == 400
    check_nothing_is_held(process)


def test_sigterm_under_load_finishes_what_was_accepted(process: Process) -> None:
    found: dict = {}

    def client() -> None:
        requests = Load(process.url, 64, max_concurrency=32, input_tokens=8, output_tokens=40)
        found["records"] = asyncio.run(send(requests))

    thread = threading.Thread(target=client)
    thread.start()
    while process.stats()["generated_tokens"] < 20:
        time.sleep(0.02)
    process.popen.send_signal(signal.SIGTERM)
    thread.join(120)
    assert not thread.is_alive(), "no client is left waiting"
    assert process.popen.wait(30) == 0
    records = found["records"]
    answered = [record for record in records if record.error is None]
    refused = [record for record in records if record.error is not None]
    assert len(answered) >= 20
    assert all(record.tokens == 40 for record in answered), "accepted requests were answered in full"
    assert all(r.error.startswith("503") or "Connect" in r.error or "RemoteProtocol" in r.error for r in refused)
    assert all(not record.arrivals for record in refused), "no answer was cut off"
