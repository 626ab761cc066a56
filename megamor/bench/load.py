"""A load generator: sends requests to a server at random times and measures what its users would experience.

The definitions are the field's. TTFT: from sending to the first token. ITL: between one token's arrival and the next.
TPOT: their mean over one request, (E2EL - TTFT) / (tokens - 1). E2EL: from sending to the last token. Goodput counts
the requests per second that keep within every given limit. Arrivals are a Poisson process, or all at once (infinite
rate).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from megamor.bench.report import Column, Row, Table, number, provenance, text
from megamor.errors import ConfigError, DataError

if TYPE_CHECKING:
    import aiohttp

SCHEMA = "megamor-bench-serve-load/1"
LIMITS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Load:
    """What is sent. `rate` in requests per second; prompts are `input_tokens` random ids below `vocab_size`."""

    url: str
    num_requests: int = 200
    rate: float = math.inf
    max_concurrency: int | None = None
    input_tokens: int = 64
    output_tokens: int = 64
    vocab_size: int = 256
    seed: int = 0
    ignore_eos: bool = True
    api_key: str | None = None

    def prompts(self) -> list[list[int]]:
        """The prompts, the same for a seed."""
        draw = random.Random(self.seed)
        return [draw.choices(range(self.vocab_size), k=self.input_tokens) for _ in range(self.num_requests)]

    def arrivals(self) -> list[float]:
        """Seconds after the start at which each request is sent."""
        draw, now, times = random.Random(self.seed + 1), 0.0, []
        for _ in range(self.num_requests):
            times.append(now)
            now += 0.0 if math.isinf(self.rate) else draw.expovariate(self.rate)
        return times


@dataclass
class Record:
    """One request: when it was sent, when each event with text arrived (in seconds), or what went wrong."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def e2el(self) -> float:
        """Seconds to the last token."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float:
        """Mean seconds of a token after the first."""
        return (self.e2el - self.ttft) / max(self.tokens - 1, 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [after - before for before, after in pairwise(self.arrivals)]


def run(args: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Send requests to the server at `--url`.

    Raises:
        ConfigError: a malformed limit, or another model's name.
        DataError: no such server, or no request was answered.
    """
    limits = parse_limits(args.goodput)
    if args.seed is None:  # the same prompts once more would be found in the server's prefix cache
        args.seed = random.getrandbits(32)
    load = Load(**{field.name: getattr(args, field.name) for field in fields(Load)})
    if not load.rate > 0:
        raise ConfigError(f"--request-rate {load.rate:g} must be more than 0; inf sends everything at once")
    report["served_model"] = served = asyncio.run(served_model(load))
    load = replace(load, vocab_size=load.vocab_size or asyncio.run(served_vocabulary(load)))
    if args.model not in (None, served):
        raise ConfigError(f"--model {args.model} isn't served at {load.url}; give {served}, or leave the option out")
    report["load"] = asdict(load) | {"api_key": None}
    report["result"] = summarise(asyncio.run(send(load)), limits)
    save()


def _session(load: Load) -> aiohttp.ClientSession:
    import aiohttp

    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    # By default aiohttp gives up after 5 minutes and keeps at most 100 connections: requests would wait here, and their
    # waiting would be reported as the server's.
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(load.url.rstrip("/") + "/", headers=headers, timeout=timeout, connector=connector)


async def served_model(load: Load) -> str:
    """Name of the model behind the URL.

    Raises:
        DataError: the server doesn't answer, or not with a model.
    """
    import aiohttp

    try:
        async with _session(load) as client, client.get("v1/models", raise_for_status=True) as response:
            return str((await response.json())["data"][0]["id"])
    except aiohttp.ClientConnectionError as error:
        cause = getattr(error, "os_error", error)  # aiohttp's own text speaks of TLS even where there is none
        raise DataError(f"no server answers at {load.url} ({cause}): start it, or correct --url") from error
    except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{load.url}/v1/models names no model: {type(error).__name__}: {error}") from error


async def served_vocabulary(load: Load) -> int:
    """Number of token ids of the server's tokenizer; the default of `Load` where the server doesn't tell."""
    async with _session(load) as client, client.get("tokenizer_info") as response:
        return int((await response.json()).get("vocab_size", Load.vocab_size)) if response.ok else Load.vocab_size


async def send(load: Load) -> list[Record]:
    """Send everything; returns a record per request in the order of sending."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    gate = asyncio.Semaphore(load.max_concurrency or load.num_requests)
    async with _session(load) as client:
        columns = (BarColumn(), MofNCompleteColumn(), "requests,", TimeElapsedColumn())
        with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=load.num_requests)
            start = time.perf_counter()

            async def one(prompt: list[int], after: float) -> Record:
                await asyncio.sleep(max(0.0, start + after - time.perf_counter()))
                async with gate:
                    record = await _stream(client, load, prompt)
                bar.advance(task)
                return record

            # Waiting for the gate is not part of a request's latency: a record's clock starts when it is sent.
            return list(await asyncio.gather(*map(one, load.prompts(), load.arrivals())))


async def _stream(client: aiohttp.ClientSession, load: Load, prompt: list[int]) -> Record:
    import aiohttp

    body = {
        "prompt": prompt,
        "max_tokens": load.output_tokens,
        "temperature": 0.0,
        "ignore_eos": load.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    record = Record(time.perf_counter())
    try:
        async with client.post("v1/completions", json=body) as response:
            if response.status != 200:
                record.error = f"{response.status}: {(await response.text(errors='replace'))[:200]}"
                return record
            rest = b""
            async for read in response.content.iter_any():
                *lines, rest = (rest + read).split(b"\n")
                now, new = time.perf_counter(), 0
                for line in lines:
                    # Proxies send comments, which keep the connection open.
                    event = line.removeprefix(b"data:").strip()
                    if event in (line.strip(), b"[DONE]"):
                        continue
                    content = json.loads(event)
                    if "error" in content:
                        record.error = content["error"]["message"]
                        return record
                    # The last event has the usage alone and is not a token.
                    new += bool(content["choices"])
                    if content.get("usage"):
                        record.tokens = content["usage"]["completion_tokens"]
                # What comes in one read shares the time since the one before: gaps of zero would be this client's.
                begin = record.arrivals[-1] if record.arrivals else now
                record.arrivals += [begin + (now - begin) * (number + 1) / new for number in range(new)]
    except (aiohttp.ClientError, ValueError, LookupError) as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.error is None and not record.arrivals:
        record.error = "the stream ended without a token"
    return record


def summarise(records: Sequence[Record], limits: Mapping[str, float]) -> dict[str, Any]:
    """Figures of a run; `limits` [ms] by name of `LIMITS` define goodput.

    Raises:
        DataError: no request was answered.
    """
    good = [record for record in records if record.error is None]
    if not good:
        raise DataError(f"none of {len(records)} requests was answered; the first said: {records[0].error}")
    seconds = max(record.arrivals[-1] for record in good) - min(record.sent for record in records)
    kept = [r for r in good if all(1e3 * getattr(r, name) <= limit for name, limit in limits.items())]
    measures = {
        "ttft_ms": [record.ttft for record in good],
        "tpot_ms": [record.tpot for record in good if record.tokens > 1],
        "itl_ms": [gap for record in good for gap in record.itl],
        "e2el_ms": [record.e2el for record in good],
    }
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "first_error": next((record.error for record in records if record.error), None),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "goodput_per_second": len(kept) / seconds if limits else None,
        "output_tokens_per_second": sum(record.tokens for record in good) / seconds,
        **{name: _distribution(values) for name, values in measures.items() if values},
    }


def _distribution(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds."""
    values = [1e3 * value for value in seconds]
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {"mean": statistics.fmean(values), **{f"p{percent}": cuts[percent - 1] for percent in (50, 90, 99)}}


def parse_limits(pairs: Sequence[str]) -> dict[str, float]:
    """Limits in milliseconds from words such as `ttft:200`.

    Raises:
        ConfigError: another form.
    """
    limits = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        if name not in LIMITS or not value.replace(".", "", 1).isdigit():
            raise ConfigError(f"--goodput {pair}: give NAME:MILLISECONDS with a name of {', '.join(LIMITS)}")
        limits[name] = float(value)
    return limits


def tables(report: Row) -> Iterator[Table]:
    """One row: what was sent, and how fast it was answered."""
    load, machine = report["load"], report["machine"]

    def percentiles(name: str) -> Column:
        median, high = (number(f"result.{name}_ms.{percent}", ".0f") for percent in ("p50", "p99"))
        return Column(f"{name.upper()}, ms", lambda row: f"{median(row)} (p99 {high(row)})" if median(row) else "")

    columns = (
        Column("model", text("served_model"), left=True),
        Column("requests", number("load.num_requests", ",")),
        Column("at a time", lambda row: str(row["load"]["max_concurrency"] or "all")),
        Column("tokens each", lambda row: f"{load['input_tokens']} + {load['output_tokens']}"),
        Column("requests/s", number("result.requests_per_second", ".0f")),
        Column("within limits/s", number("result.goodput_per_second", ".0f")),
        Column("tokens/s", number("result.output_tokens_per_second", ",.0f")),
        *(percentiles(name) for name in ("ttft", "tpot", "itl", "e2el")),
        Column("failed", number("result.failed", "d")),
    )
    error = report["result"]["first_error"]
    notes = (f"The first failure: {error}",) if error else ()
    title = f"Load generator on {machine['cores']} cores of {machine['cpu']}; {provenance(report, 'torch')}."
    yield Table(columns, [report], title, notes)
