"""The HTTP server over real sockets, with an engine whose answers are known."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from megamor.serve.engine.request import EngineStats
from megamor.serve.http.monitoring import Monitoring
from megamor.serve.http.server import DrainingServer, Server
from megamor.serve.http.wire import Usage
from megamor.serve.options import ServerOptions
from tests.serve.fake import CONTEXT, MODEL, FakeEngine, Running, serving

TEXT = "naïve café, 漢字 and 👩‍🚀 done"


@pytest.fixture
def server() -> Iterator[Running]:
    with serving(FakeEngine(lambda prompt, index: f"{TEXT}{index}")) as running:
        yield running


def post(server: Running, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=20)


def events(server: Running, **body: Any) -> list[str]:
    found = []
    with httpx.stream("POST", server.url + "/v1/completions", json={"stream": True, **body}, timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                found.append(line.removeprefix("data: "))
    return found


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    return body["error"]


@pytest.mark.parametrize(
    ("prompt", "count"), [("ab", 1), (["ab", "c"], 2), ([97, 98], 1), ([[97, 98], [99]], 2)], ids=str
)
def test_every_form_of_prompt(server: Running, prompt: Any, count: int) -> None:
    answer = post(server, prompt=prompt, max_tokens=200, n=2, model=MODEL).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
    assert [choice["text"] for choice in answer["choices"]] == [f"{TEXT}0", f"{TEXT}1"] * count
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    tokens = len(f"{TEXT}0".encode())
    prompts = 2 if count == 1 else 3
    assert answer["usage"]["prompt_tokens"] == prompts
    assert answer["usage"]["completion_tokens"] == 2 * count * tokens
    assert answer["usage"]["total_tokens"] == prompts + 2 * count * tokens
    assert answer["choices"][0]["depths"] == [2] * tokens


def test_a_stream_is_the_same_text_in_whole_characters(server: Running) -> None:
    found = events(server, prompt="a", max_tokens=200, stream_options={"include_usage": True})
    assert found[-1] == "[DONE]"
    chunks = [json.loads(event) for event in found[:-1]]
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(f"{TEXT}0".encode())
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == f"{TEXT}0"
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)
    assert len(chunks) > 20, "one event a token"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    without_stream = post(server, prompt="a", stream_options={"include_usage": True})
    assert "stream_options" in error_of(without_stream, 400)["message"]


def test_an_incomplete_character_is_returned_at_the_end(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": len(b"na") + 1}
    whole = post(server, **body).json()["choices"][0]["text"]
    assert whole == "na\N{REPLACEMENT CHARACTER}"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events(server, **body)[:-1]) == whole


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(server: Running, include: bool) -> None:
    body = {"prompt": "a", "max_tokens": 200, "stop": ["漢字 and", "never"], "include_stop_str_in_output": include}
    want = "naïve café, " + ("漢字 and" if include else "")
    choice = post(server, **body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (want, "stop")
    texts = [json.loads(event)["choices"][0]["text"] for event in events(server, **body)[:-1]]
    assert "".join(texts) == want
    server.wait_until(lambda: len(server.engine.aborted) == 2, 5)  # the engine may stop computing this one


def test_a_stop_string_ends_only_its_own_continuation() -> None:
    answers = "x" * 100, "xy" + "x" * 98, "x" * 100
    with serving(FakeEngine(lambda _, index: answers[index], seconds=0.005)) as server:
        body = {"prompt": "a", "max_tokens": 100, "stop": "y", "n": 3}
        choices = post(server, **body).json()["choices"]
        whole = ("x" * 100, "length")
        assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [whole, ("x", "stop"), whole]
        assert server.engine.dropped == [(0, 1)]
        assert server.engine.generated < 250, "the engine stopped computing it"


@pytest.mark.parametrize("stop", ["done1", "done0!"])
def test_text_like_the_beginning_of_a_stop_string_is_not_lost(server: Running, stop: str) -> None:
    body = {"prompt": "a", "max_tokens": 200, "stop": stop}
    assert post(server, **body).json()["choices"][0]["text"] == f"{TEXT}0"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events(server, **body)[:-1]) == f"{TEXT}0"


def test_echo_with_logprobs(server: Running) -> None:
    body = {"prompt": "xyz", "max_tokens": 2, "logprobs": 1, "echo": True, "temperature": 0}
    choice = post(server, **body).json()["choices"][0]
    assert choice["text"] == "xyzna"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("xyzna")
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, *({letter: -0.5} for letter in "yzna")]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert server.engine.params[-1].prompt_logprobs == 1
    reading = post(server, **body | {"max_tokens": 0}).json()["choices"][0]
    assert (reading["text"], reading["logprobs"]["tokens"]) == ("xyz", list("xyz"))
    streamed = [json.loads(event)["choices"][0] for event in events(server, **body)[:-1]]
    assert "".join(chunk["text"] for chunk in streamed) == "xyzna"


def test_sampling_parameters_reach_the_engine(server: Running) -> None:
    body = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 5, "max_depth": 2, "min_tokens": 1}
    body |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "stop_token_ids": [3]}
    body |= {"ignore_eos": True, "max_tokens": 4}
    assert post(server, prompt="a", **body).status_code == 200
    got = server.engine.params[-1]
    assert {name: getattr(got, name) for name in body} == {**body, "stop_token_ids": (3,)}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": [-1]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "best_of": 4}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "logprobs": 1000}, "logprobs"),
        ({"prompt": "a", "max_tokens": CONTEXT}, "context"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_told_what_is_wrong(server: Running, body: dict[str, Any], said: str, stream: bool) -> None:
    content = json.dumps({**body, "stream": stream})
    error = error_of(httpx.post(server.url + "/v1/completions", content=content, timeout=20), 400)
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"prompt": "a"', b"\xff\xfe", b"[" * 10**5])
def test_malformed_bodies(server: Running, content: bytes) -> None:
    assert error_of(httpx.post(server.url + "/v1/completions", content=content, timeout=20), 400)["message"]


def test_long_bodies_are_refused() -> None:
    with serving(FakeEngine(lambda *_: "x"), max_body_bytes=1000) as server:
        error_of(post(server, prompt="a" * 1000), 413)
        chunks = (b" " * 100 for _ in range(11))
        error_of(httpx.post(server.url + "/v1/completions", content=chunks, timeout=20), 413)
        assert post(server, prompt="a").status_code == 200
        exactly = b'{"prompt": "a"}'.ljust(1000)
        assert httpx.post(server.url + "/v1/completions", content=exactly, timeout=20).status_code == 200


def test_other_endpoints(server: Running) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "up"}
    assert httpx.get(server.url + "/ready").status_code == 200
    assert set(httpx.get(server.url + "/version").json()) == {"version"}
    models = httpx.get(server.url + "/v1/models").json()
    assert [model["id"] for model in models["data"]] == [MODEL]
    assert models["data"][0]["max_model_len"] == CONTEXT
    assert httpx.get(server.url + "/v1/models/").json() == models
    assert httpx.get(f"{server.url}/v1/models/{MODEL}").json() == models["data"][0]
    error_of(httpx.get(server.url + "/v1/models/other"), 404)
    error_of(post(server, prompt="a", model="other"), 404)
    error_of(httpx.get(server.url + "/nothing"), 404)
    error_of(httpx.get(server.url + "/v1/completions"), 405)
    assert "template" in error_of(post(server, "/v1/chat/completions", messages=[]), 400)["message"]
    tokens = post(server, "/tokenize", prompt=TEXT).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(TEXT.encode())
    assert post(server, "/detokenize", tokens=tokens["tokens"]).json() == {"prompt": TEXT}
    assert post(server, "/tokenize", prompt=TEXT, model=MODEL, add_special_tokens=False).json() == tokens
    error_of(post(server, "/tokenize", prompt=3), 400)
    page = httpx.get(server.url + "/dashboard")
    assert page.headers["content-type"].startswith("text/html")
    assert httpx.get(server.url + "/stats").json()["in_core"] == [1, 0, 2]


def test_keys() -> None:
    with serving(FakeEngine(lambda *_: "x"), api_keys=("first-key", "second-key")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}):
            for path in ("/v1/models", "/v1/models/x"):
                error_of(httpx.get(server.url + path, headers=headers), 401)
        error_of(post(server, prompt="a"), 401)
        for key in ("first-key", "second-key"):
            assert httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(server.url + "/health").status_code == 200


def test_a_full_queue_says_so_and_empties() -> None:
    engine = FakeEngine(lambda *_: "x" * 5)
    engine.gate.clear()
    with serving(engine, max_queued_requests=2, max_queued_tokens=10) as server, httpx.Client(timeout=20) as client:
        runner = server.uvicorn._runner
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(post, server, prompt="abcd")]
            server.wait_until(lambda: len(runner.waiting) == 1)
            long = client.post(server.url + "/v1/completions", json={"prompt": "a" * 7})
            error_of(long, 429)
            assert long.headers["retry-after"] == "1"
            waiting.append(pool.submit(post, server, prompt="abcd"))
            server.wait_until(lambda: len(runner.waiting) == 2)
            error_of(client.post(server.url + "/v1/completions", json={"prompt": "a", "stream": True}), 429)
            engine.gate.set()
            assert [future.result().status_code for future in waiting] == [200, 200]
        assert post(server, prompt="a" * 11).status_code == 200, "over the limit, but nothing else waits"
        assert (runner.waiting, runner.num_running) == ([], 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request(stream: bool) -> None:
    with serving(FakeEngine(lambda *_: "x" * 400, seconds=0.02)) as server:
        body = {"prompt": ["a", "b"], "max_tokens": 400, "stream": stream}
        if stream:
            with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=20) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + "/v1/completions", json=body, timeout=0.3)
        server.wait_until(lambda: sorted(server.engine.aborted) == [0, 1])
        assert not server.engine.running
        text = httpx.get(server.url + "/metrics").text
        assert 'megamor_request_failure_total{status="499"} 1.0' in text


def test_a_request_that_takes_too_long() -> None:
    with serving(FakeEngine(lambda *_: "x" * 400, seconds=0.02), request_timeout=0.3) as server:
        error_of(post(server, prompt="a", max_tokens=400), 504)
        found = events(server, prompt="a", max_tokens=400)
        assert json.loads(found[-2])["error"]["code"] == 504
        assert found[-1] == "[DONE]"
        server.wait_until(lambda: sorted(server.engine.aborted) == [0, 1])


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    with serving(FakeEngine(lambda *_: "x" * 100, seconds=0.02)) as server, httpx.Client(timeout=20) as client:
        body = {"prompt": "a", "max_tokens": 100, "stream": True}
        with client.stream("POST", server.url + "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.uvicorn.handle_exit(signal.SIGTERM, None)
            refused = httpx.get(server.url + "/ready")
            error_of(refused, 503)
            assert refused.headers["retry-after"] == "1"
            assert httpx.get(server.url + "/health").status_code == 200
            error_of(post(server, prompt="a"), 503)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 100
        server.thread.join(10)
        assert not server.thread.is_alive(), "the server exited"


def test_draining_has_a_limit_and_a_second_signal() -> None:
    def draining(seconds: float) -> DrainingServer:
        runner: Any = SimpleNamespace(num_running=1, draining=False)
        server = DrainingServer(uvicorn.Config("none"), runner, seconds)
        server.handle_exit(signal.SIGTERM, None)
        assert runner.draining
        return server

    assert asyncio.run(draining(0.0).on_tick(1)), "the time is over"
    patient = draining(60.0)
    assert not asyncio.run(patient.on_tick(1))
    assert not patient.should_exit
    patient.handle_exit(signal.SIGTERM, None)
    assert patient.should_exit


def test_latencies_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """Two continuations of one request: each has a time to its first token, and times between its tokens."""
    choices = [SimpleNamespace(times=times, finish_reason="stop") for times in ([101.5, 101.75], [101.25], [])]
    run: Any = SimpleNamespace(choices=choices, arrived=101.0, usage=Usage(), id="x")
    monitoring = Monitoring()
    monitoring.finished(run, 103.0)
    families = {f.name: f for f in text_string_to_metric_families(monitoring.exposition(EngineStats(), 0, 0).decode())}
    for name, total, count in (
        ("time_to_first_token", 0.75, 2),
        ("inter_token_latency", 0.25, 1),
        ("e2e_request_latency", 2, 1),
    ):
        samples = {s.name.rsplit("_", 1)[1]: s.value for s in families[f"megamor_{name}_seconds"].samples}
        assert (samples["sum"], samples["count"]) == (total, count)
    server = Server(FakeEngine(lambda *_: ""), FakeEngine(lambda *_: "").codec, MODEL, ServerOptions(), None)
    with caplog.at_level(logging.INFO):
        server._record(run, 499)
    assert json.loads(caplog.messages[-1])["first_token_seconds"] == 0.25


def test_an_engine_failure_is_reported_to_every_client() -> None:
    with serving(FakeEngine(lambda *_: "x" * 400, seconds=0.01)) as server, httpx.Client(timeout=20) as client:
        with client.stream("POST", server.url + "/v1/completions", json={"prompt": "a", "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.engine.fail = True
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == 503
        error_of(post(server, prompt="a"), 503)
        error_of(httpx.get(server.url + "/health"), 500)


def test_metrics_are_valid_and_change(server: Running) -> None:
    post(server, prompt="a", max_tokens=5)
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(server.url + "/metrics").text)}
    for name in [
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens",
        "generation_tokens",
        "exit_depth",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_success",
        "num_preemptions",
        "core_launch_width",
        "core_launch_depths",
        "num_held_exits",
        "kv_pages_by_depth",
        "rows_saved",
    ]:
        assert f"megamor_{name}" in families, name
    generated = families["megamor_generation_tokens"].samples
    assert [sample.value for sample in generated if sample.name.endswith("_total")] == [5]
    first = {s.name.rsplit("_", 1)[1]: s.value for s in families["megamor_time_to_first_token_seconds"].samples}
    assert first["count"] == 1
    widths = {s.labels["le"]: s.value for s in families["megamor_core_launch_width"].samples if "le" in s.labels}
    assert (widths["1.0"], widths["6.0"], widths["8.0"], widths["+Inf"]) == (3, 3, 4, 4)


def test_the_openai_client(server: Running) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.completions.create(model=MODEL, prompt="a", max_tokens=200, extra_body={"max_depth": 1})
        assert answer.choices[0].text == f"{TEXT}0"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 1
        chunks = client.completions.create(model=MODEL, prompt="a", max_tokens=200, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == f"{TEXT}0"
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="template"):
            client.chat.completions.create(model=MODEL, messages=[])
