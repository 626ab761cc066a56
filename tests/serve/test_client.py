"""The load generator, against a server with known answers and timing."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from pathlib import Path

import pytest

from megamor.bench import tables
from megamor.bench.load import Load, Record, parse_limits, send, served_model, served_vocabulary, summarise
from megamor.cli import bench
from megamor.errors import ConfigError, DataError
from tests.commands import refusal
from tests.serve.fake import MODEL, FakeEngine, serving


def test_measures_what_the_server_does() -> None:
    with serving(FakeEngine(lambda *_: "abcdefgh", seconds=0.02)) as server:
        load = Load(server.url, num_requests=5, input_tokens=3, output_tokens=6, vocab_size=100)
        figures = summarise(asyncio.run(send(load)), {"ttft": 5000.0})
    assert (figures["requests"], figures["failed"]) == (5, 0)
    assert figures["goodput_per_second"] == figures["requests_per_second"]
    assert figures["output_tokens_per_second"] == pytest.approx(30 / figures["seconds"])
    for name in ("itl_ms", "tpot_ms"):
        assert 18 < figures[name]["p50"] < 60, "a step takes 20 ms"
    assert figures["e2el_ms"]["p50"] > 6 * 20


def test_definitions() -> None:
    record = Record(sent=1.0, arrivals=[1.5, 1.6, 1.9], tokens=3)
    assert record.ttft == pytest.approx(0.5)
    assert record.e2el == pytest.approx(0.9)
    assert record.tpot == pytest.approx(0.2)
    assert record.itl == pytest.approx([0.1, 0.3])
    slow = Record(sent=0.0, arrivals=[3.0], tokens=1)
    figures = summarise([record, slow, Record(0.0, error="429: full")], {"ttft": 600.0})
    assert (figures["failed"], figures["first_error"]) == (1, "429: full")
    assert figures["seconds"] == pytest.approx(3.0)
    assert figures["goodput_per_second"] == pytest.approx(1 / 3)
    assert figures["requests_per_second"] == pytest.approx(2 / 3), "of those that were answered"
    assert figures["tpot_ms"]["mean"] == pytest.approx(200), "a single token has none"
    with pytest.raises(DataError, match="429: full"):
        summarise([Record(0.0, error="429: full")], {})


def test_errors_are_counted_not_hidden() -> None:
    with serving(FakeEngine(lambda *_: "x"), api_keys=("secret",)) as server:
        records = asyncio.run(send(Load(server.url, num_requests=2)))
        assert all(record.error is not None and record.error.startswith("401") for record in records)
        records = asyncio.run(send(Load(server.url, num_requests=2, api_key="secret")))
        assert [record.error for record in records] == [None, None]
    records = asyncio.run(send(Load("http://127.0.0.1:9", num_requests=1)))
    assert records[0].error is not None
    assert "ClientConnectorError" in records[0].error


def test_a_result_becomes_a_row_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key isn't written anywhere."""
    out = tmp_path / "serve_load_here.json"
    with serving(FakeEngine(lambda *_: "abc"), api_keys=("it's hidden",)) as server:
        # Words of `vllm bench serve`.
        options = ["--backend", "openai", "--dataset-name", "random", "--base-url", server.url, "--num-prompts", "3"]
        options += ["--random-input-len", "2", "--random-output-len", "3", "--api-key", "it's hidden"]
        assert "--model large isn't served" in refusal(capsys, bench.main, "load", *options, "--model", "large")
        bench.main(["load", *options, "--model", MODEL, "--json", str(out)])
    assert "hidden" not in out.read_text()
    table = tables.regenerate("<!-- generated: bench-load -->\n<!-- /generated -->\n", tmp_path)
    assert f"| {MODEL} | 3 | all | 2 + 3 | " in table
    assert table.count("| 0 |") == 1, "none failed"


def record_of(*sent: bytes, pause: float = 0.0) -> Record:
    """What the client records of a server that answers with these bytes, one after the other."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for each in sent:
            writer.write(each)
            await writer.drain()
            await asyncio.sleep(pause)
        writer.close()

    async def main() -> Record:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            (record,) = await send(Load(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", num_requests=1))
        return record

    return asyncio.run(main())


def test_tokens_of_one_read_share_its_time() -> None:
    """The network or a busy client may deliver several events at once, which doesn't make the server faster."""
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 8}}\n\ndata: [DONE]\n\n'
    record = record_of(event, b": ping\n\n" + 4 * event, event[:9], event[9:] + 2 * event + usage, pause=0.08)
    assert (record.error, record.tokens, len(record.arrivals)) == (None, 8, 8)
    first, second = record.itl[:4], record.itl[4:]
    assert first == pytest.approx([sum(first) / 4] * 4)
    assert second == pytest.approx([sum(second) / 3] * 3), "half an event is no event"
    assert sum(first) > 0.07
    assert sum(second) > 0.15
    assert record.e2el - record.ttft == pytest.approx(sum(record.itl))


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"data: {oh\n\n", "JSONDecodeError"), (b"data: {}\n\n", "KeyError"), (b"<html>", "without a token")],
)
def test_an_answer_that_is_no_stream_of_events_is_an_error(body: bytes, said: str) -> None:
    assert said in str(record_of(body).error)


def test_prompts_have_ids_of_the_servers_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the range that /tokenizer_info tells; the report goes where `vllm bench serve` would write it."""
    monkeypatch.chdir(tmp_path)
    engine = FakeEngine(lambda *_: "ab")
    engine.codec.tokenizer.add_tokens(["<one>", "<two>"])
    with serving(engine) as server:
        port = server.url.rsplit(":", 1)[1]
        where = ["--host", "127.0.0.1", "--port", port, "--endpoint", "/v1/completions", "--save-result"]
        shape = ["--num-prompts", "2", "--random-input-len", "200", "--random-output-len", "2"]
        bench.main(["load", *where, *shape])
        bench.main(["load", *where, *shape, "--result-dir", str(tmp_path / "results"), "--vocab-size", "9"])
        reports = [json.loads(next(path.glob("load-*.json")).read_text()) for path in (tmp_path, tmp_path / "results")]
        assert [report["load"]["vocab_size"] for report in reports] == [258, 9]
        assert max(map(max, Load("", 2, input_tokens=200, vocab_size=9).prompts())) == 8
        assert asyncio.run(served_vocabulary(Load(server.url + "/none"))) == 256, "it doesn't tell"


def test_what_is_no_server_is_named() -> None:
    with pytest.raises(DataError, match=r"no server answers at http://127\.0\.0\.1:9 .*Connect call failed"):
        asyncio.run(served_model(Load("http://127.0.0.1:9", num_requests=1)))


def test_arrivals_are_poisson_and_reproducible() -> None:
    load = Load("", num_requests=4000, rate=50.0)
    times = load.arrivals()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 50, rel=0.06)
    assert deviation == pytest.approx(mean, rel=0.1), "an exponential distribution"
    assert times == Load("", num_requests=4000, rate=50.0).arrivals()
    assert set(Load("", num_requests=9).arrivals()) == {0.0}


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_rates_that_send_nothing(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be more than 0" in refusal(capsys, bench.main, "load", "--request-rate", rate)


def test_limits() -> None:
    assert parse_limits(["ttft:200", "tpot:12.5"]) == {"ttft": 200.0, "tpot": 12.5}
    for wrong in ("ttft", "speed:3", "ttft:fast"):
        with pytest.raises(ConfigError, match="--goodput"):
            parse_limits([wrong])
