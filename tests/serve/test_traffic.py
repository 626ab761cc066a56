"""Many clients at once: those that leave, turns of requests, limits, keys."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from megamor.cli.serve import read_keys
from megamor.errors import ConfigError
from megamor.serve.engine.request import SamplingParams
from megamor.serve.http.async_engine import AsyncEngine
from megamor.serve.options import ServerOptions
from tests.serve.fake import FakeEngine, serving
from tests.serve.test_api import real_engine
from tests.serve.test_server import error_of, post


def test_a_client_that_leaves_a_stream_leaves_no_traceback(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING), serving(FakeEngine(lambda *_: "x" * 400, seconds=0.005)) as server:
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/completions", {"prompt": ["a", "b"], "n": 3})):
            for events_read in (1, 3):
                with httpx.stream(
                    "POST", server.url + path, json={**body, "stream": True, "max_tokens": 300}
                ) as response:
                    lines = response.iter_lines()
                    for _ in range(events_read):
                        next(lines)
        server.wait_until(lambda: not server.engine.running and not server.uvicorn._runner.num_running)
    assert [record.getMessage() for record in caplog.records] == []
    said = capfd.readouterr().err.splitlines()  # uvicorn has a handler of its own
    assert [line for line in said if "http://127.0.0.1" not in line] == [], "only the addresses"


def test_a_cancelled_wait_harms_nobody() -> None:
    """A caller of the Python interface that cancels doesn't stop the engine for the others."""

    async def abandoned(runner: AsyncEngine) -> None:
        with runner.generation([[98]], SamplingParams()) as generation:
            await generation.next()

    async def main() -> None:
        engine = FakeEngine(lambda *_: "x" * 50, seconds=0.005)
        runner = AsyncEngine(engine, ServerOptions())
        runner.start()
        engine.gate.clear()
        with runner.generation([[97]], SamplingParams(max_tokens=50)) as generation:
            await asyncio.sleep(0.02)
            for waiting in (runner.stats(), generation.next()):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(waiting, 0.01)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(abandoned(runner), 0.01)
            engine.gate.set()
            while generation.open:
                await asyncio.wait_for(generation.next(), 5)
            assert runner.num_running == 1, "its answer may still be on its way"
        assert (await runner.stats()).generated_tokens >= 50
        assert runner.failure is None
        assert not engine.running
        await asyncio.to_thread(runner.close)

    asyncio.run(main())


def test_an_engine_that_fails_to_add_a_request_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(lambda *_: "x" * 400, seconds=0.01)
    with serving(engine) as server, httpx.Client(timeout=20) as client:
        body = {"prompt": "a", "max_tokens": 400, "stream": True}
        with client.stream("POST", server.url + "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            monkeypatch.setattr(engine, "add_request", lambda *_: 1 / 0)
            error_of(post(server, prompt="b"), 503)
            assert json.loads([line for line in lines if line][-2].removeprefix("data: "))["error"]["code"] == 503


def test_requests_take_turns() -> None:
    """One with many sequences doesn't hold up the next: it gets the next free place, not the last."""
    engine = real_engine(max_resident=4, prefix_caching=False)
    params = SamplingParams(max_tokens=4, temperature=0)
    grouped = params.model_copy(update={"group": 7})
    many = [engine.add_request([5, 6], grouped.model_copy(update={"n": 10}))]
    many += [engine.add_request([7, 8], grouped) for _ in range(10)]
    ended: list[int] = []
    others: list[int] = []
    while engine.has_work:
        ended += [output.request for output in engine.step() if output.finish_reason]
        if len(others) < 3 and len(ended) >= 4 * (len(others) + 1):
            others.append(engine.add_request([9], params))
    counts = Counter(ended)
    assert (counts[many[0]], sum(counts[name] for name in many[1:])) == (10, 10)
    # Each of the others came when at most four of the request were resident, and was admitted as soon as one had ended.
    for number, name in enumerate(others):
        assert ended.index(name) <= 4 * (number + 1) + 8


def test_a_request_of_many_sequences_finishes_under_steady_traffic() -> None:
    """Those that come later take turns with it; they don't all go first."""
    engine = real_engine(max_resident=4, prefix_caching=False)
    params = SamplingParams(max_tokens=2, temperature=0)
    many, left = engine.add_request([5, 6], params.model_copy(update={"n": 10})), 10
    single = [engine.add_request([9], params) for _ in range(8)]
    while left:
        for output in engine.step():
            if output.finish_reason:
                left -= output.request == many
                if output.request in single:
                    single.append(engine.add_request([9], params))
        assert len(single) < 200, "it waits while others that came later are served"


def test_limits_count_sequences() -> None:
    engine = FakeEngine(lambda *_: "x")
    engine.gate.clear()
    with serving(engine, max_queued_requests=6) as server, httpx.Client(timeout=20) as client:
        runner = server.uvicorn._runner
        thread = threading.Thread(target=post, args=(server,), kwargs={"prompt": ["a", "b"], "n": 2})
        thread.start()
        server.wait_until(lambda: len(runner.waiting) == 4)
        assert runner.num_running == 4
        assert sorted(runner.waiting) == [0, 0, 1, 1], "a prompt is read once for all its continuations"
        error_of(client.post(server.url + "/v1/completions", json={"prompt": "a", "n": 3}), 429)
        error_of(client.post(server.url + "/v1/completions", json={"prompt": "a", "n": 7}), 400)
        engine.gate.set()
        thread.join()
        assert (runner.waiting, runner.num_running) == ([], 0)


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbffirst\r\nsecond \xc3\xa9\r\n", "first\nsecond é".encode()], ids=["BOM", "plain"]
)
def test_files_of_keys(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    assert read_keys(path) == ("first", "second é")
    with serving(FakeEngine(lambda *_: "x"), api_keys=read_keys(path)) as server:
        for key, status in (
            (b"first", 200),
            ("second é".encode(), 200),
            (b"second e", 401),
            (b"\xe9", 401),
        ):
            headers = {b"Authorization": b"Bearer " + key}
            assert httpx.get(server.url + "/v1/models", headers=headers).status_code == status  # type: ignore[arg-type]
    for bad, message in (
        (b"a\x00b", "no header"),
        ("key".encode("utf-16"), "can't be read"),
        (b"\xef\xbb\xbf\n", "no key"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match=message):
            read_keys(path)
