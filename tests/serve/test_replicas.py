"""Replicas on Ray Serve: routing alone, then two real replicas under load, a kill, a rolling restart and a drain."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

ray = pytest.importorskip("ray", reason="needs the extra replicas")

from fastapi import FastAPI  # noqa: E402

from megamor.errors import ConfigError  # noqa: E402
from megamor.serve import replicas  # noqa: E402
from megamor.serve.options import ServerOptions  # noqa: E402
from megamor.serve.replicas import LOST, SLACK, PrefixRouter, Scale, _added, _labelled, _prefix  # noqa: E402
from tests.serve.process import Process, server_process, trained_checkpoint  # noqa: E402


@pytest.mark.parametrize(("text", "scale"), [("2", (2, 2)), ("1-4", (1, 4)), ("3-3", (3, 3))])
def test_scale(text: str, scale: tuple[int, int]) -> None:
    assert Scale.parse(text) == scale


@pytest.mark.parametrize("text", ["0", "", "4-1", "-2", "two", "1-", "1-2-3"])
def test_no_scale(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a number such as 2 nor a range"):
        Scale.parse(text)


def ranks(queued: dict[str, int], **asked: Any) -> list[list[str]]:
    """Names of the replicas that the router ranks for a call, with so many requests at each."""
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in queued]
    router = SimpleNamespace(
        replica_queue_len_cache=SimpleNamespace(get=lambda replica_id: queued[replica_id.unique_id])
    )
    pending = SimpleNamespace(kwargs=asked)
    found = asyncio.run(PrefixRouter.choose_replicas(router, replicas, pending))  # type: ignore[arg-type]
    return [[replica.replica_id.unique_id for replica in rank] for rank in found]


def test_one_prefix_has_one_home_and_many_have_many() -> None:
    idle = dict.fromkeys("abcd", 0)
    homes = {prefix: ranks(idle, prefix=prefix)[0] for prefix in map(str, range(200))}
    assert all(len(home) == 1 for home in homes.values())
    assert all(ranks(idle, prefix=prefix)[0] == home for prefix, home in homes.items())
    counts = [sum(home == [name] for home in homes.values()) for name in "abcd"]
    assert min(counts) > 25, counts
    # One that ends leaves the homes of all others as they are.
    fewer = dict.fromkeys("abc", 0)
    assert all(ranks(fewer, prefix=prefix)[0] == home for prefix, home in homes.items() if home != ["d"])


def test_a_busy_home_is_left_for_the_least_busy() -> None:
    home = ranks(dict.fromkeys("abcd", 0), prefix="x")[0][0]
    others = sorted(set("abcd") - {home})
    busy = {**dict.fromkeys("abcd", 3), home: 3 + SLACK}
    assert ranks(busy, prefix="x") == [[home], others], "within the slack the cache is worth the wait"
    busy[home] += 1
    assert [sorted(rank) for rank in ranks(busy, prefix="x")] == [["a", "b", "c", "d"]], "Ray takes the least busy"
    assert ranks(busy, prefix=None) == [[*"abcd"]]
    assert ranks(busy, prefix="x", replica="b") == [["b"]]


def test_prefixes_of_bodies() -> None:
    long = "x" * 1000
    assert _prefix(json.dumps({"prompt": long + "a"}).encode()) == _prefix(json.dumps({"prompt": long + "b"}).encode())
    assert _prefix(b'{"prompt": "a"}') != _prefix(b'{"prompt": "b"}')
    assert _prefix(b'{"messages": [{"role": "user", "content": "hi"}]}') is not None
    assert _prefix(b'{"prompt": [1, 2]}') == "[1, 2]"
    assert [_prefix(body) for body in (b"", b"{", b"[]", b"3", b"{}", b"\xff")] == [None] * 6


def test_autoscaling_aims_at_full_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replica accepts as many requests again as it decodes at a time."""
    declared: list[dict[str, Any]] = []
    make = replicas.serve.deployment
    monkeypatch.setattr(replicas.serve, "deployment", lambda **options: declared.append(options) or make(**options))
    replicas.application(FastAPI, Scale(1, 4), ServerOptions(max_queued_requests=9), 128, 1)
    assert (declared[0]["max_ongoing_requests"], declared[0]["max_queued_requests"]) == (128, 9)
    assert declared[0]["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 64}
    replicas.application(FastAPI, Scale(2, 2), ServerOptions(), 128, 0)
    assert "autoscaling_config" not in declared[2]
    assert declared[2]["num_replicas"] == 2
    assert declared[2]["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}


def test_figures_of_replicas_add_up() -> None:
    one = {"n": 1, "pages": {"core": 2}, "depths": [1, 2], "widths": {"1": 3}}
    other = {"n": 4, "pages": {"core": 3}, "depths": [1, 1, 5], "widths": {"2": 1}}
    both = {"n": 5, "pages": {"core": 5}, "depths": [2, 3, 5], "widths": {"1": 3, "2": 1}}
    assert _added(one, other) == both == _added(other, one)


def test_metrics_name_their_replica() -> None:
    text = '# HELP megamor_x_total X.\n# TYPE megamor_x_total counter\nmegamor_x_total{kind="core"} %d.0\n'
    lines = _labelled({"a": text % 1, "b": text % 2}).decode().splitlines()
    assert 'megamor_x_total{kind="core",replica="a"} 1.0' in lines
    assert 'megamor_x_total{kind="core",replica="b"} 2.0' in lines
    assert sum(line.startswith("# TYPE megamor_x") for line in lines) == 1


# What follows starts a cluster of this machine alone. Its tests run in order, and the last ends it.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_checkpoint(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def process(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with server_process(
        checkpoint, tmp_path_factory.mktemp("log"), "--replicas", "2", "--dtype", "fp32", seconds=180
    ) as process:
        yield process


def replicas_of(process: Process) -> list[psutil.Process]:
    """The processes of the replicas."""
    found = []
    for child in psutil.Process(process.popen.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ends at this moment, or has ended and nobody has waited for it
            found += [child] if "ServeReplica:megamor:Replica" in " ".join(child.cmdline()) else []
    return found


def ask(process: Process, prompt: str, max_tokens: int = 16) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    return httpx.post(process.url + "/v1/completions", json=body, timeout=120)


def by_replica(process: Process, name: str) -> dict[str, float]:
    """A metric without labels of its own, by replica."""
    lines = [line for line in httpx.get(process.url + "/metrics").text.splitlines() if line.startswith(name + "{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_requests_are_spread_and_prefixes_stay_together(process: Process) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: ask(process, f"{number} the dog"), range(64)))
    assert [answer.status_code for answer in answers] == [200] * 64
    tokens = by_replica(process, "megamor_generation_tokens_total")
    assert len(tokens) == 2
    assert sum(tokens.values()) == 64 * 16
    assert min(tokens.values()) > 0
    assert process.stats()["replicas"] == 2
    assert process.stats()["generated_tokens"] == 64 * 16
    for _ in range(6):
        ask(process, "the quick brown fox jumps over the lazy dog, " * 3)
    after = by_replica(process, "megamor_generation_tokens_total")
    assert sorted(after[name] - tokens[name] for name in tokens) == [0, 6 * 16]
    assert max(by_replica(process, "megamor_prefix_cache_hits_total").values()) > 0
    assert httpx.get(process.url + "/v1/models").json()["data"][0]["id"] == "tiny"
    assert ask(process, "x", 10_000).status_code == 400
    for refused in (httpx.delete(process.url + "/v1/models"), httpx.post(process.url, content=b" " * (2**24 + 1))):
        assert refused.json()["error"]["code"] == refused.status_code, "errors of the front too"


def stream(process: Process, prompt: str, begun: threading.Semaphore) -> list[dict[str, Any]]:
    """The events of a stream; `begun` is released at the third."""
    events: list[dict[str, Any]] = []
    body = {"prompt": prompt, "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", process.url + "/v1/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
                if len(events) == 3:
                    begun.release()
    return events


@pytest.mark.slow
def test_a_killed_replica_loses_only_what_it_was_streaming(process: Process) -> None:
    pids = {replica.pid for replica in replicas_of(process)}
    assert len(pids) == 2
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(48) as pool:
        streams = [pool.submit(stream, process, f"{number} the fox", begun) for number in range(24)]
        whole = [pool.submit(ask, process, f"{number} the cat", 200) for number in range(24)]
        for _ in range(12):
            assert begun.acquire(timeout=60)
        psutil.Process(min(pids)).kill()
        answers = [future.result() for future in whole]
        events = [future.result() for future in streams]
    assert [answer.status_code for answer in answers] == [200] * 24, "what had not been answered yet is asked again"
    assert all(answer.json()["usage"]["completion_tokens"] == 200 for answer in answers)
    lost = [each for each in events if "error" in each[-1]]
    assert all(each[-1]["error"]["message"] == LOST and each[-1]["error"]["code"] == 503 for each in lost)
    finished = [each for each in events if "error" not in each[-1]]
    assert all(each[-1]["choices"][0]["finish_reason"] == "length" for each in finished)
    assert finished
    assert lost, "the replica was killed in the middle"
    wait_for(lambda: len(replicas_of(process)) == 2 and process.stats()["replicas"] == 2)
    assert ask(process, "the dog").status_code == 200


@pytest.mark.slow
def test_a_rolling_restart_fails_no_request(process: Process, checkpoint: Path) -> None:
    from ray import serve

    from megamor.cli.serve import deployment

    before = {replica.pid for replica in replicas_of(process)}
    stop, statuses = threading.Event(), list[int]()

    def client(number: int) -> None:
        while not stop.is_set():
            statuses.append(ask(process, f"{number} the dog", 32).status_code)

    ray.init(address="auto", log_to_driver=False)
    try:
        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, number) for number in range(4)]
            options = {"checkpoint": str(checkpoint), "replicas": "2", "dtype": "fp32", "name": "renamed"}
            serve.run(deployment(options), name="megamor", route_prefix="/")
            wait_for(lambda: len({each.pid for each in replicas_of(process)} - before) == 2)
            stop.set()
            for each in clients:
                each.result()
    finally:
        ray.shutdown()
    wait_for(lambda: not {each.pid for each in replicas_of(process)} & before)
    assert set(statuses) == {200}
    assert httpx.get(process.url + "/v1/models").json()["data"][0]["id"] == "renamed"


@pytest.mark.slow
def test_the_number_of_replicas_follows_the_load(
    process: Process, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one to two under load and back without it; no request is lost on the way."""
    from ray import serve

    from megamor.cli.serve import deployment

    make, quick = serve.deployment, {"upscale_delay_s": 1, "downscale_delay_s": 2, "look_back_period_s": 2}

    def impatient(**options: Any) -> Any:
        # Ray's own delays are 30 seconds up and 10 minutes down.
        if "autoscaling_config" in options:
            assert options["autoscaling_config"]["target_ongoing_requests"] == 4, "as many as are resident"
            options["autoscaling_config"] |= quick
        return make(**options)

    monkeypatch.setattr(serve, "deployment", impatient)
    options = {"checkpoint": str(checkpoint), "replicas": "1-2", "dtype": "fp32", "max-resident": "4"}
    before, statuses, stop = {each.pid for each in replicas_of(process)}, list[int](), threading.Event()

    def count() -> int:
        return len({each.pid for each in replicas_of(process)} - before)

    def client(number: int) -> None:
        while not stop.is_set():
            statuses.append(ask(process, f"{number} the dog", 100).status_code)

    ray.init(address="auto", log_to_driver=False)
    try:
        serve.run(deployment(options), name="megamor", route_prefix="/")
        wait_for(lambda: count() == 1 and len(replicas_of(process)) == 1)
        with ThreadPoolExecutor(12) as pool:
            clients = [pool.submit(client, number) for number in range(12)]
            wait_for(lambda: count() == 2 and process.stats()["replicas"] == 2)
            stop.set()
            for each in clients:
                each.result()
        wait_for(lambda: count() == 1)
        assert ask(process, "the dog").status_code == 200
    finally:
        stop.set()
        ray.shutdown()
    assert set(statuses) == {200}


@pytest.mark.slow
def test_sigterm_finishes_what_runs(process: Process) -> None:
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, process, f"{number} the fox", begun) for number in range(8)]
        for _ in range(8):
            assert begun.acquire(timeout=60)
        process.popen.send_signal(signal.SIGTERM)
        events = [future.result() for future in streams]
    assert all(each[-1]["choices"][0]["finish_reason"] == "length" for each in events)
    assert process.popen.wait(60) == 0
